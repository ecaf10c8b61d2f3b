"""The experiments of S0, S2 and S3 on dense models: the short run, the long run, learning rates and sizes.

S0 to S4 are the documents (`Suite.source`). We do not repeat their errors: schedules count steps, each optimizer's rate
comes from its own sweep, and weight decay is the same for both.
"""

from suites.scales import Scale
from suites.suite import OPTIMIZERS, Condition, Winners, as_written, at_rates, both, suite, width_scaled


@suite(
    "speedrun-lr",
    "Which learning rate is best for each optimizer on the short run?",
    source="S0",
    varies="lr",
    claimed=False,
)
def speedrun_lr(scale: Scale, winners: Winners) -> list[Condition]:
    base = {**scale.dense, "spectra_every": 0}
    return [c for o in OPTIMIZERS for c in at_rates(base, o, scale.rates[f"speedrun-lr {o}"])]


@suite(
    "speedrun-2m",
    "Who wins the short run, both tuned?",
    source="S0",
    varies="optimizer",
    confirms=True,
    needs=("speedrun-lr",),
    extra_tests=9,
    beside=("baseline",),
)
def speedrun_2m(scale: Scale, winners: Winners) -> list[Condition]:
    fair = both(scale.dense, lambda optimizer: winners("speedrun-lr", optimizer)["lr"])
    return fair + as_written(scale.dense, "S0", **scale.written)


@suite(
    "baseline",
    "Does the lead last when training continues?",
    source="S3",
    varies="optimizer",
    confirms=True,
    needs=("speedrun-lr",),
    extra_tests=16,
)
def baseline(scale: Scale, winners: Winners) -> list[Condition]:
    fair = both(scale.baseline, lambda optimizer: winners("speedrun-lr", optimizer)["lr"])
    return fair + as_written(scale.baseline, "S3", **scale.written)


@suite(
    "lr-sensitivity",
    "How wide is the range of good learning rates?",
    source="S2",
    varies="lr",
    extra_tests=2,
)
def lr_sensitivity(scale: Scale, winners: Winners) -> list[Condition]:
    return [c for o in OPTIMIZERS for c in at_rates(scale.search, o, scale.rates[f"lr-sensitivity {o}"])]


@suite(
    "model-size",
    "Does the lead grow with the model?",
    source="S2",
    varies="params",
    confirms=True,
    needs=("lr-sensitivity",),
    extra_tests=10,
)
def model_size(scale: Scale, winners: Winners) -> list[Condition]:
    conditions = []
    for name, fields in scale.sizes.items():
        conditions += both(fields, width_scaled(scale, winners, fields), f" {name}")
    for name, fields in scale.sizes.items():
        conditions += as_written(fields, "S2", f" {name}", spectra_every=0)
    return conditions
