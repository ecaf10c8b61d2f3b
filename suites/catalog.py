"""The experiments of the five documents, each a function from a scale to named conditions.

    conditions = SUITES["moe-momentum"].plan(SCALES["nano"], winners)

A condition holds all settings of train.py except seed, data and folder; its name tells what it changes. Both optimizers
of a suite share model, batches, initialisation, validation tokens and weight decay. S0 to S4 are the documents
(`Suite.source`). We do not repeat their errors: schedules count steps, each optimizer's rate comes from its own sweep,
and weight decay is the same for both (except in moe-final, where each has the winner of its sweep). Conditions "as
written" have a document's own settings.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from suites import documents

Fields = Mapping[str, Any]  # of settings.Settings
Winners = Callable[[str, str], Fields]  # (suite, optimizer) -> the settings of its best condition

OPTIMIZERS = ("muon", "adamw")
AS_WRITTEN = "as written"  # ends the name of a condition with the settings of a document
SEEDS = (0, 1, 2)
FRESH_SEEDS = (1, 2, 3)  # after a learning rate chosen on seed 0
FINAL_SEEDS = (3, 4, 5)  # after settings chosen on seeds 0 to 2


@dataclass(frozen=True)
class Condition:
    """Named settings, and the condition of the same suite against which they are tested."""

    name: str
    fields: Fields
    versus: str | None = None


@dataclass(frozen=True)
class Scale:
    """Model and budget of each kind of suite, and the grids of their sweeps."""

    dense: Fields  # S0's short run
    baseline: Fields  # S3's longer run
    search: Fields  # S2's learning-rate search
    sizes: Mapping[str, Fields]  # S2's four models
    moe: Fields  # S4's mixture of experts
    moe_long: Fields
    moe_short: Fields  # S4's fast sweep, 200 of its 500 steps
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # by suite and optimizer
    claim_seeds: tuple[int, ...] | None = None  # of the other suites on which a claim hangs
    fresh_seeds: tuple[int, ...] | None = None  # of the suites whose settings other seeds chose
    written: Fields = field(default_factory=dict)  # what conditions as written measure
    corpora: Mapping[str, documents.Corpus] = field(default_factory=dict)  # by document


def _budget(steps: int, batch_tokens: int) -> dict[str, int]:
    return {"tokens": steps * batch_tokens, "batch_tokens": batch_tokens}


_S2 = {"schedule": "cosine", "min_lr": 0.1, "warmup": 0.05, "dropout": 0.1, "weight_decay": 0.1}
_S4 = _S2 | {"momentum": 0.9, "ns_coefficients": "quintic", "spectra_every": 0}
_NANO = {"eval_every": 16, "eval_tokens": 8192, "spectra_every": 16}

SCALES = {
    "full": Scale(
        dense={"model": "88m", **_budget(123, 16_384)},
        baseline={"model": "88m", **_budget(103_760, 16_384)},
        search={"model": "16m", **_budget(600, 8192), "schedule": "constant", "spectra_every": 0},
        sizes={
            "11m": _S2 | {"model": "11m", **_budget(1500, 65_536)},
            "29m": _S2 | {"model": "29m", **_budget(1250, 49_152)},
            "50m": _S2 | {"model": "50m", **_budget(1000, 32_768)},
            "108m": _S2 | {"model": "108m", **_budget(750, 24_576)},
        },
        moe=_S4 | {"model": "moe-79m", **_budget(125, 49_152), "precision": "fp32"},
        moe_long=_budget(500, 49_152),
        moe_short=_budget(50, 49_152),
        rates={
            "lr-sensitivity muon": (0.001, 0.003, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05),
            "lr-sensitivity adamw": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
            "speedrun-lr muon": (0.006, 0.012, 0.024, 0.048, 0.096),
            "speedrun-lr adamw": (0.0005, 0.001, 0.002, 0.004, 0.008),
            "moe-lr-muon": (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.12, 0.15),
            "moe-lr-adam": (1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2),
        },
        fresh_seeds=documents.SEEDS,
        corpora=documents.CORPORA,
    ),
    "nano": Scale(
        dense=_NANO | {"model": "nano", **_budget(128, 2048)},
        baseline=_NANO | {"model": "nano", **_budget(256, 2048), "eval_every": 32, "spectra_every": 32},
        search=_NANO | {"model": "nano", **_budget(128, 2048), "schedule": "constant", "spectra_every": 0},
        sizes={
            name: _NANO | _S2 | {"model": "nano", **_budget(128, 2048), "spectra_every": 0} | shape
            for name, shape in {
                "64 wide": {"d_model": 64, "layers": 2, "heads": 2, "kv_heads": 2, "d_ff": 256},
                "96 wide": {"d_model": 96, "layers": 3, "heads": 3, "kv_heads": 3, "d_ff": 384},
                "128 wide": {"d_model": 128, "layers": 4, "heads": 4, "kv_heads": 4, "d_ff": 512},
                "192 wide": {"d_model": 192, "layers": 4, "heads": 6, "kv_heads": 6, "d_ff": 768},
            }.items()
        },
        moe=_NANO | _S4 | {"model": "moe-nano", **_budget(128, 2048)},
        moe_long=_budget(384, 2048) | {"eval_every": 48},
        moe_short=_budget(51, 2048),
        rates={
            "lr-sensitivity muon": (0.003, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2),
            "lr-sensitivity adamw": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
            "speedrun-lr muon": (0.01, 0.02, 0.04, 0.08, 0.16),
            "speedrun-lr adamw": (0.001, 0.002, 0.004, 0.008, 0.016),
            "moe-lr-muon": (0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.25),
            "moe-lr-adam": (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.04),
        },
        claim_seeds=(0, 1, 2, 3, 4, 5),
        fresh_seeds=(6, 7, 8, 9, 10, 11),
        written={"spectra_every": 0},
    ),
}


@dataclass(frozen=True)
class Suite:
    """One experiment: `varies` names the setting that it varies, `needs` the suites whose winners it uses.

    `extra_tests` counts the tests that claims make on its runs beyond its own pairs; every correction includes them.
    `claimed`: a document makes a claim about it.
    """

    name: str
    source: str
    question: str
    varies: str
    seeds: tuple[int, ...]
    needs: tuple[str, ...]
    extra_tests: int
    claimed: bool
    plan: Callable[[Scale, Winners], list[Condition]]

    def seeds_at(self, scale: Scale) -> tuple[int, ...]:
        """The scale's seeds: at full scale the documents' own, where a sweep has not used them up; at nano scale six
        for every suite on which a claim hangs."""
        if self.seeds in (FRESH_SEEDS, FINAL_SEEDS):
            return scale.fresh_seeds or self.seeds
        return scale.claim_seeds if scale.claim_seeds and self.claimed else self.seeds


SUITES: dict[str, Suite] = {}


Plan = Callable[[Scale, Winners], list[Condition]]


def suite(
    name: str,
    question: str,
    *,
    source: str,
    varies: str,
    seeds: tuple[int, ...] = SEEDS,
    needs: tuple[str, ...] = (),
    extra_tests: int = 0,
    claimed: bool = True,
) -> Callable[[Plan], Plan]:
    """Register a function as a suite."""

    def register(plan: Plan) -> Plan:
        SUITES[name] = Suite(name, source, question, varies, seeds, needs, extra_tests, claimed, plan)
        return plan

    return register


def at_rates(base: Fields, optimizer: str, rates: tuple[float, ...], theirs: float | None = None) -> list[Condition]:
    """A condition for each rate, tested against the document's best rate where that is in the grid."""
    names = {rate: f"{optimizer} lr {rate:g}" for rate in rates}
    against = {rate: None if rate == theirs else names.get(theirs) for rate in rates}
    return [Condition(names[rate], {**base, "optimizer": optimizer, "lr": rate}, against[rate]) for rate in rates]


def both(base: Fields, rate_of: Callable[[str], float], label: str = "") -> list[Condition]:
    """Muon tested against AdamW with the same settings, each at its own rate."""
    return [
        Condition(
            f"{optimizer}{label}",
            {**base, "optimizer": optimizer, "lr": rate_of(optimizer)},
            f"adamw{label}" if optimizer == "muon" else None,
        )
        for optimizer in OPTIMIZERS
    ]


def as_written(base: Fields, source: str, label: str = "", **measured: Any) -> list[Condition]:
    """Both optimizers with the settings of a document, so that its result can be seen beside the fair ones."""
    return [
        Condition(
            f"{optimizer}{label} {AS_WRITTEN}",
            {**base, "optimizer": optimizer, **documents.WRITTEN[source][optimizer], **measured},
            f"adamw{label} {AS_WRITTEN}" if optimizer == "muon" else None,
        )
        for optimizer in OPTIMIZERS
    ]


@suite(
    "speedrun-lr",
    "Which learning rate is best for each optimizer on the short run?",
    source="S0",
    varies="lr",
    seeds=SEEDS,
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
    seeds=FRESH_SEEDS,
    needs=("speedrun-lr",),
    extra_tests=7,
)
def speedrun_2m(scale: Scale, winners: Winners) -> list[Condition]:
    fair = both(scale.dense, lambda optimizer: winners("speedrun-lr", optimizer)["lr"])
    return fair + as_written(scale.dense, "S0", **scale.written)


@suite(
    "baseline",
    "Does the lead last when training continues?",
    source="S3",
    varies="optimizer",
    seeds=FRESH_SEEDS,
    needs=("speedrun-lr",),
    extra_tests=15,
)
def baseline(scale: Scale, winners: Winners) -> list[Condition]:
    fair = both(scale.baseline, lambda optimizer: winners("speedrun-lr", optimizer)["lr"])
    return fair + as_written(scale.baseline, "S3", **scale.written)


@suite(
    "lr-sensitivity",
    "How wide is the range of good learning rates?",
    source="S2",
    varies="lr",
    seeds=(0,),
    extra_tests=2,
)
def lr_sensitivity(scale: Scale, winners: Winners) -> list[Condition]:
    return [c for o in OPTIMIZERS for c in at_rates(scale.search, o, scale.rates[f"lr-sensitivity {o}"])]


@suite(
    "model-size",
    "Does the lead grow with the model?",
    source="S2",
    varies="params",
    needs=("lr-sensitivity",),
    extra_tests=7,
)
def model_size(scale: Scale, winners: Winners) -> list[Condition]:
    """The rates of lr-sensitivity, scaled to every size: AdamW's rate falls as 1 / width; Muon's stays, because its
    update is scaled by the matrix's shape. So no size trains at a rate tuned for another."""
    import model

    searched = model.SIZES[scale.search["model"]].d_model

    def at(optimizer: str, width: int) -> float:
        rate = winners("lr-sensitivity", optimizer)["lr"]
        return rate if optimizer == "muon" else float(f"{rate * searched / width:.4g}")

    conditions = []
    for name, fields in scale.sizes.items():
        width = fields.get("d_model") or model.SIZES[fields["model"]].d_model
        conditions += both(fields, lambda optimizer, width=width: at(optimizer, width), f" {name}")
    for name, fields in scale.sizes.items():
        conditions += as_written(fields, "S2", f" {name}")
    return conditions


@suite(
    "moe-lr-muon",
    "Which learning rate is best for Muon on the mixture of experts?",
    source="S4",
    varies="lr",
    seeds=(0,),
    extra_tests=4,
)
def moe_lr_muon(scale: Scale, winners: Winners) -> list[Condition]:
    return at_rates(scale.moe, "muon", scale.rates["moe-lr-muon"], theirs=0.07)


@suite(
    "moe-lr-muon-short",
    "Does Muon's range of good rates depend on the length of the run?",
    source="S4",
    varies="lr",
)
def moe_lr_muon_short(scale: Scale, winners: Winners) -> list[Condition]:
    return at_rates({**scale.moe, **scale.moe_short}, "muon", scale.rates["moe-lr-muon"])


@suite(
    "moe-lr-adam",
    "Which learning rate is best for AdamW on the mixture of experts?",
    source="S4",
    varies="lr",
    seeds=(0,),
)
def moe_lr_adam(scale: Scale, winners: Winners) -> list[Condition]:
    return at_rates(scale.moe, "adamw", scale.rates["moe-lr-adam"], theirs=0.001)


def moe_base(scale: Scale, winners: Winners, optimizer: str) -> Fields:
    """S4's settings at the optimizer's best rate."""
    rate = winners("moe-lr-muon" if optimizer == "muon" else "moe-lr-adam", optimizer)["lr"]
    return {**scale.moe, "optimizer": optimizer, "lr": rate}


def ablation(
    name: str,
    question: str,
    *,
    default: Any,
    labels: Mapping[Any, str] | None = None,
    extra_tests: int = 0,
    **varied: tuple[Any, ...],
) -> None:
    """A suite that varies one setting of Muon on the mixture of experts, at the best rate of Muon's sweep.

    Each value is tested against S4's best, `default`. `labels` names values that read badly as setting and number.
    """
    ((setting, values),) = varied.items()
    names = {v: v if isinstance(v, str) else f"{setting} {v:g}" for v in values} | (labels or {})

    @suite(name, question, source="S4", varies=setting, needs=("moe-lr-muon",), extra_tests=extra_tests)
    def plan(scale: Scale, winners: Winners) -> list[Condition]:
        base = moe_base(scale, winners, "muon")
        return [Condition(names[v], {**base, setting: v}, None if v == default else names[default]) for v in values]


ablation(
    "moe-momentum",
    "Which momentum should Muon have?",
    momentum=(0.85, 0.9, 0.92, 0.95, 0.97, 0.99),
    default=0.9,
    extra_tests=1,
)
ablation(
    "moe-weight-decay",
    "How much weight decay should Muon have?",
    weight_decay=(0.0, 0.05, 0.1, 0.2),
    default=0.2,
    extra_tests=1,
)
ablation("moe-ns-steps", "How many Newton-Schulz steps are enough?", ns_steps=(3, 5, 7, 10), default=5, extra_tests=2)
ablation(
    "moe-nesterov",
    "Does Nesterov momentum help Muon?",
    nesterov=(True, False),
    default=True,
    labels={True: "with Nesterov", False: "without Nesterov"},
)
ablation("moe-warmup", "How long should the rate warm up, in steps?", warmup=(0.0, 0.05, 0.1, 0.2), default=0.05)
ablation(
    "moe-schedule",
    "Which schedule is best for Muon?",
    schedule=("cosine", "linear", "step", "constant"),
    default="cosine",
)
ablation(
    "moe-clip",
    "Does clipping the gradient matter to Muon?",
    grad_clip=(0.5, 1.0, 2.0, 0.0),
    default=1.0,
    labels={0.0: "no clipping"},
)
ablation("moe-min-lr", "How far should the rate fall?", min_lr=(0.01, 0.1, 0.5), default=0.1)


@suite(
    "moe-ns-polynomial",
    "Which polynomial should Newton-Schulz iterate?",
    source="S4",
    varies="condition",
    claimed=False,
    needs=("moe-lr-muon",),
)
def moe_ns_polynomial(scale: Scale, winners: Winners) -> list[Condition]:
    base = moe_base(scale, winners, "muon")
    tried = (("quintic", 5), ("polar_express", 5), ("cubic", 5), ("cubic", 10))
    return [
        Condition(
            f"{name}, {steps} steps",
            {**base, "ns_coefficients": name, "ns_steps": steps},
            None if name == "quintic" else "quintic, 5 steps",
        )
        for name, steps in tried
    ]


@suite(
    "moe-aux-ratio",
    "How fast should embedding, gains and router learn, relative to Muon?",
    source="S4",
    varies="adamw_lr",
    needs=("moe-lr-muon",),
)
def moe_aux_ratio(scale: Scale, winners: Winners) -> list[Condition]:
    base = moe_base(scale, winners, "muon")
    ratios = {"1/20": 1 / 20, "1/10": 1 / 10, "1/5": 1 / 5, "1": 1.0}
    return [
        Condition(
            f"aux/Muon {words}",
            {**base, "adamw_lr": float(f"{ratio * base['lr']:.6g}")},
            None if words == "1/10" else "aux/Muon 1/10",
        )
        for words, ratio in ratios.items()
    ]


ADAM_CHOICES: dict[str, Fields] = {
    "cosine, warm-up 0.05, decay 0.1": {},
    "constant, no warm-up": {"schedule": "constant", "warmup": 0.0},
    "linear": {"schedule": "linear"},
    "no warm-up": {"warmup": 0.0},
    "warm-up 0.1": {"warmup": 0.1},
    "decay 0.05": {"weight_decay": 0.05},
    "decay 0.2": {"weight_decay": 0.2},
}


@suite(
    "moe-adam",
    "Which schedule, warm-up and decay are best for AdamW?",
    source="S4",
    varies="condition",
    needs=("moe-lr-adam",),
    extra_tests=2,
)
def moe_adam(scale: Scale, winners: Winners) -> list[Condition]:
    base, default = moe_base(scale, winners, "adamw"), next(iter(ADAM_CHOICES))
    return [Condition(c, {**base, **f}, None if c == default else default) for c, f in ADAM_CHOICES.items()]


@suite(
    "moe-long",
    "What do the experts learn in a longer run?",
    source="S4",
    varies="optimizer",
    seeds=FRESH_SEEDS,
    needs=("moe-lr-muon", "moe-lr-adam"),
    extra_tests=3,
)
def moe_long(scale: Scale, winners: Winners) -> list[Condition]:
    base = {**scale.moe, **scale.moe_long}
    return both(base, lambda optimizer: moe_base(scale, winners, optimizer)["lr"])


# The suites that vary one setting of Muon, in the order of the documents.
MUON_ABLATIONS = (
    "moe-momentum",
    "moe-weight-decay",
    "moe-ns-steps",
    "moe-nesterov",
    "moe-warmup",
    "moe-schedule",
    "moe-aux-ratio",
    "moe-clip",
    "moe-min-lr",
)


@suite(
    "moe-final",
    "Who wins on the mixture of experts, each optimizer at the best of its sweeps?",
    source="S4",
    varies="optimizer",
    seeds=FINAL_SEEDS,
    needs=("moe-lr-muon", "moe-lr-adam", *MUON_ABLATIONS, "moe-adam"),
    extra_tests=7,
)
def moe_final(scale: Scale, winners: Winners) -> list[Condition]:
    """Muon with the winner of each ablation against AdamW with the winners of its own sweeps. So weight decay and
    schedule can differ; the report lists that."""
    muon = dict(moe_base(scale, winners, "muon"))
    for name in MUON_ABLATIONS:
        muon[SUITES[name].varies] = winners(name, "muon")[SUITES[name].varies]
    adamw = {**moe_base(scale, winners, "adamw"), **winners("moe-adam", "adamw")}
    fair = [Condition("muon", muon, "adamw"), Condition("adamw", adamw)]
    return fair + as_written(scale.moe, "S4")


def with_needs(names: list[str]) -> list[list[str]]:
    """The suites and all that they need, in stages: a stage needs only suites of earlier stages."""
    wanted: set[str] = set()

    def visit(name: str) -> None:
        wanted.add(name)
        for needed in SUITES[name].needs:
            visit(needed)

    for name in names:
        visit(name)
    stages: list[list[str]] = []
    while left := [name for name in SUITES if name in wanted and not any(name in stage for stage in stages)]:
        ready = {name for stage in stages for name in stage}
        stages.append([name for name in left if set(SUITES[name].needs) <= ready])
    return stages
