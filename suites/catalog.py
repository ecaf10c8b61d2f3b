"""The experiments of the five documents, each a function from a scale to named conditions.

    conditions = SUITES["moe-momentum"].plan(SCALES["nano"], winners)

A condition is settings of train.py that say all but seed, data and folder. Both optimizers of a suite share model,
batches, initialisation, validation tokens and weight decay; what a condition changes is in its name. S0 to S4 are
the documents (`Suite.source`); their faults are not repeated: schedules count updates, each optimizer has a rate of its
own sweep, and weight decay is the same for both (moe-final takes each one's from its sweep).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Fields = Mapping[str, Any]  # of settings.Settings
Winners = Callable[[str, str], Fields]  # (suite, optimizer) -> the settings of its best condition

OPTIMIZERS = ("muon", "adamw")
SEEDS = (0, 1, 2)
FRESH_SEEDS = (1, 2, 3)  # where the learning rate was chosen on seed 0
FINAL_SEEDS = (3, 4, 5)  # where more was chosen, on seeds 0 to 2


@dataclass(frozen=True)
class Condition:
    """Named settings, and the condition of the same suite that they are tested against."""

    name: str
    fields: Fields
    versus: str | None = None


@dataclass(frozen=True)
class Scale:
    """How large the runs are: settings shared by the suites of each kind, and their grids."""

    dense: Fields  # S0's model and budget
    baseline: Fields  # S3's longer one
    search: Fields  # S2's learning-rate search
    sizes: Mapping[str, Fields]  # S2's four models
    moe: Fields  # S4's
    moe_long: Fields
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # by suite and optimizer


def _updates(count: int, batch_tokens: int) -> dict[str, int]:
    return {"tokens": count * batch_tokens, "batch_tokens": batch_tokens}


_S2 = {"schedule": "cosine", "min_lr": 0.1, "warmup": 0.05, "dropout": 0.1, "weight_decay": 0.1}
_S4 = _S2 | {"momentum": 0.9, "ns_coefficients": "quintic", "spectra_every": 0}
_NANO = {"eval_every": 8, "eval_tokens": 8192}

SCALES = {
    "full": Scale(
        dense={"model": "88m", **_updates(123, 16_384)},
        baseline={"model": "88m", **_updates(103_760, 16_384)},
        search={"model": "16m", **_updates(600, 8192), "schedule": "constant", "spectra_every": 0},
        sizes={
            "11m": _S2 | {"model": "11m", **_updates(1500, 65_536)},
            "29m": _S2 | {"model": "29m", **_updates(1250, 49_152)},
            "50m": _S2 | {"model": "50m", **_updates(1000, 32_768)},
            "108m": _S2 | {"model": "108m", **_updates(750, 24_576)},
        },
        moe=_S4 | {"model": "moe-79m", **_updates(125, 49_152)},
        moe_long=_updates(500, 49_152),
        rates={
            "lr-sensitivity muon": (0.001, 0.003, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05),
            "lr-sensitivity adamw": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
            "speedrun-lr muon": (0.006, 0.012, 0.024, 0.048, 0.096),
            "speedrun-lr adamw": (0.0005, 0.001, 0.002, 0.004, 0.008),
            "moe-lr-muon": (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.15),
            "moe-lr-adam": (1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2),
        },
    ),
    "nano": Scale(
        dense=_NANO | {"model": "nano", **_updates(64, 2048)},
        baseline=_NANO | {"model": "nano", **_updates(192, 2048), "eval_every": 24},
        search=_NANO | {"model": "nano", **_updates(64, 2048), "schedule": "constant", "spectra_every": 0},
        sizes={
            name: _NANO | _S2 | {"model": "nano", **_updates(64, 2048), "spectra_every": 0} | shape
            for name, shape in {
                "64 wide": {"d_model": 64, "layers": 2, "heads": 2, "kv_heads": 2, "d_ff": 256},
                "96 wide": {"d_model": 96, "layers": 3, "heads": 3, "kv_heads": 3, "d_ff": 384},
                "128 wide": {"d_model": 128, "layers": 4, "heads": 4, "kv_heads": 4, "d_ff": 512},
                "192 wide": {"d_model": 192, "layers": 4, "heads": 6, "kv_heads": 6, "d_ff": 768},
            }.items()
        },
        moe=_NANO | _S4 | {"model": "moe-nano", **_updates(64, 2048)},
        moe_long=_updates(128, 2048) | {"eval_every": 16},
        rates={
            "lr-sensitivity muon": (0.003, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2),
            "lr-sensitivity adamw": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
            "speedrun-lr muon": (0.01, 0.02, 0.04, 0.08, 0.16),
            "speedrun-lr adamw": (0.001, 0.002, 0.004, 0.008, 0.016),
            "moe-lr-muon": (0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.25),
            "moe-lr-adam": (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.04),
        },
    ),
}


@dataclass(frozen=True)
class Suite:
    """One experiment; `varies` names the setting on its axis, `needs` the suites whose winners it takes up;
    `extra_tests` are made on its runs by claims beyond the tests of its own pairs, and corrected for everywhere."""

    name: str
    source: str
    question: str
    varies: str
    seeds: tuple[int, ...]
    needs: tuple[str, ...]
    extra_tests: int
    plan: Callable[[Scale, Winners], list[Condition]]


SUITES: dict[str, Suite] = {}


def suite(
    name: str,
    source: str,
    question: str,
    varies: str,
    seeds: tuple[int, ...] = SEEDS,
    needs: tuple[str, ...] = (),
    extra_tests: int = 0,
) -> Callable[[Callable[[Scale, Winners], list[Condition]]], Callable[[Scale, Winners], list[Condition]]]:
    """Register a function as a suite."""

    def register(plan: Callable[[Scale, Winners], list[Condition]]) -> Callable[[Scale, Winners], list[Condition]]:
        SUITES[name] = Suite(name, source, question, varies, seeds, needs, extra_tests, plan)
        return plan

    return register


def at_rates(base: Fields, optimizer: str, rates: tuple[float, ...]) -> list[Condition]:
    return [Condition(f"{optimizer} lr {rate:g}", {**base, "optimizer": optimizer, "lr": rate}) for rate in rates]


def both(base: Fields, rate_of: Callable[[str], float], label: str = "") -> list[Condition]:
    """Muon tested against AdamW on the same settings, each at its own rate."""
    return [
        Condition(
            f"{optimizer}{label}",
            {**base, "optimizer": optimizer, "lr": rate_of(optimizer)},
            f"adamw{label}" if optimizer == "muon" else None,
        )
        for optimizer in OPTIMIZERS
    ]


@suite("speedrun-lr", "S0", "Which learning rate is best for each optimizer on the short run?", "lr", seeds=(0,))
def speedrun_lr(scale: Scale, winners: Winners) -> list[Condition]:
    base = {**scale.dense, "spectra_every": 0}
    return [c for o in OPTIMIZERS for c in at_rates(base, o, scale.rates[f"speedrun-lr {o}"])]


@suite(
    *("speedrun-2m", "S0", "Who wins the short run, both tuned?", "optimizer", FRESH_SEEDS),
    needs=("speedrun-lr",),
    extra_tests=4,
)
def speedrun_2m(scale: Scale, winners: Winners) -> list[Condition]:
    return both(scale.dense, lambda optimizer: winners("speedrun-lr", optimizer)["lr"])


@suite(
    *("baseline", "S3", "Does the lead last when training goes on?", "optimizer", FRESH_SEEDS),
    needs=("speedrun-lr",),
    extra_tests=2,
)
def baseline(scale: Scale, winners: Winners) -> list[Condition]:
    return both(scale.baseline, lambda optimizer: winners("speedrun-lr", optimizer)["lr"])


@suite("lr-sensitivity", "S2", "How wide is the range of good learning rates?", "lr", seeds=(0,))
def lr_sensitivity(scale: Scale, winners: Winners) -> list[Condition]:
    return [c for o in OPTIMIZERS for c in at_rates(scale.search, o, scale.rates[f"lr-sensitivity {o}"])]


@suite(*("model-size", "S2", "Does the lead grow with the model?", "params"), needs=("lr-sensitivity",), extra_tests=3)
def model_size(scale: Scale, winners: Winners) -> list[Condition]:
    """The rates of lr-sensitivity at every size: Muon's update is scaled by shape already, AdamW's rate falls as
    1 / width, so that no size is trained at a rate tuned for another."""
    import model

    searched = model.SIZES[scale.search["model"]].d_model

    def at(optimizer: str, width: int) -> float:
        rate = winners("lr-sensitivity", optimizer)["lr"]
        return rate if optimizer == "muon" else float(f"{rate * searched / width:.4g}")

    conditions = []
    for name, fields in scale.sizes.items():
        width = fields.get("d_model") or model.SIZES[fields["model"]].d_model
        conditions += both(fields, lambda optimizer, width=width: at(optimizer, width), f" {name}")
    return conditions


@suite(
    *("moe-lr-muon", "S4", "Which learning rate is best for Muon on the mixture of experts?", "lr"),
    seeds=(0,),
    extra_tests=2,
)
def moe_lr_muon(scale: Scale, winners: Winners) -> list[Condition]:
    return at_rates(scale.moe, "muon", scale.rates["moe-lr-muon"])


@suite(
    *("moe-lr-adam", "S4", "Which learning rate is best for AdamW on the mixture of experts?", "lr"),
    seeds=(0,),
    extra_tests=1,
)
def moe_lr_adam(scale: Scale, winners: Winners) -> list[Condition]:
    return at_rates(scale.moe, "adamw", scale.rates["moe-lr-adam"])


def moe_base(scale: Scale, winners: Winners, optimizer: str) -> Fields:
    """S4's settings at the optimizer's best rate."""
    rate = winners("moe-lr-muon" if optimizer == "muon" else "moe-lr-adam", optimizer)["lr"]
    return {**scale.moe, "optimizer": optimizer, "lr": rate}


def ablation(name: str, varies: str, question: str, choices: Mapping[str, Fields], default: str) -> None:
    """A suite that changes one thing of Muon's settings on the mixture of experts; each is tested against S4's choice,
    at the best rate of Muon's sweep and the default rate of the rest."""

    @suite(name, "S4", question, varies, needs=("moe-lr-muon",))
    def plan(scale: Scale, winners: Winners) -> list[Condition]:
        base = moe_base(scale, winners, "muon")
        return [Condition(c, {**base, **f}, None if c == default else default) for c, f in choices.items()]


def _each(key: str, values: tuple[Any, ...]) -> dict[str, Fields]:
    return {f"{key} {value:g}" if isinstance(value, float | int) else str(value): {key: value} for value in values}


ablation(
    *("moe-momentum", "momentum", "Which momentum should Muon have?"),
    _each("momentum", (0.85, 0.9, 0.92, 0.95, 0.97, 0.99)),
    "momentum 0.9",
)
ablation(
    *("moe-weight-decay", "weight_decay", "How much weight decay should Muon have?"),
    _each("weight_decay", (0.0, 0.05, 0.1, 0.2)),
    "weight_decay 0.1",
)
ablation(
    *("moe-ns-steps", "ns_steps", "How many Newton-Schulz steps are enough?"),
    _each("ns_steps", (3, 5, 7, 10)),
    "ns_steps 5",
)
ablation(
    *("moe-nesterov", "nesterov", "Does Nesterov momentum help Muon?"),
    {"with Nesterov": {"nesterov": True}, "without Nesterov": {"nesterov": False}},
    "with Nesterov",
)
ablation(
    *("moe-warmup", "warmup", "How long should the rate warm up, in updates?"),
    _each("warmup", (0.0, 0.05, 0.1, 0.2)),
    "warmup 0.05",
)
ablation(
    *("moe-schedule", "schedule", "Which schedule is best for Muon?"),
    _each("schedule", ("cosine", "linear", "step", "constant")),
    "cosine",
)
ablation(
    *("moe-clip", "grad_clip", "Does clipping the gradient matter to Muon?"),
    _each("grad_clip", (0.5, 1.0, 2.0)) | {"no clipping": {"grad_clip": 0.0}},
    "grad_clip 1",
)
ablation(
    *("moe-min-lr", "min_lr", "How far should the rate fall?"),
    _each("min_lr", (0.01, 0.1, 0.5)),
    "min_lr 0.1",
)


@suite(
    *("moe-aux-ratio", "S4", "How fast should embedding, gains and router learn beside Muon?", "adamw_lr"),
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


@suite("moe-adam", "S4", "Which schedule, warm-up and decay are best for AdamW?", "condition", needs=("moe-lr-adam",))
def moe_adam(scale: Scale, winners: Winners) -> list[Condition]:
    base, default = moe_base(scale, winners, "adamw"), next(iter(ADAM_CHOICES))
    return [Condition(c, {**base, **f}, None if c == default else default) for c, f in ADAM_CHOICES.items()]


@suite(
    *("moe-long", "S4", "What do the experts learn in a longer run?", "optimizer", FRESH_SEEDS),
    needs=("moe-lr-muon", "moe-lr-adam"),
)
def moe_long(scale: Scale, winners: Winners) -> list[Condition]:
    base = {**scale.moe, **scale.moe_long}
    return both(base, lambda optimizer: moe_base(scale, winners, optimizer)["lr"])


MUON_ABLATIONS = (
    *("moe-momentum", "moe-weight-decay", "moe-ns-steps", "moe-nesterov", "moe-warmup", "moe-schedule"),
    *("moe-aux-ratio", "moe-clip", "moe-min-lr"),
)


@suite(
    *("moe-final", "S4", "Who wins on the mixture of experts, each optimizer at the best of its sweeps?", "optimizer"),
    FINAL_SEEDS,
    needs=("moe-lr-muon", "moe-lr-adam", *MUON_ABLATIONS, "moe-adam"),
)
def moe_final(scale: Scale, winners: Winners) -> list[Condition]:
    """Each ablation gives the value of the setting that it varied; the two keep their own weight decay and schedule, as
    chosen by their own sweeps, which the report lists as a difference."""
    muon = dict(moe_base(scale, winners, "muon"))
    for name in MUON_ABLATIONS:
        muon[SUITES[name].varies] = winners(name, "muon")[SUITES[name].varies]
    adamw = {**moe_base(scale, winners, "adamw"), **winners("moe-adam", "adamw")}
    return [Condition("muon", muon, "adamw"), Condition("adamw", adamw)]


def with_needs(names: list[str]) -> list[list[str]]:
    """The suites and all they need, in stages: a stage needs only what stands in earlier ones."""
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
