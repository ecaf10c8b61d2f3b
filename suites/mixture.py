"""The experiments of S4 on a mixture of experts: sweeps of the rate, an ablation per setting, and who wins.

Weight decay is the same for both optimizers, except in moe-final, where each has the winner of its sweep.
"""

from collections.abc import Mapping
from typing import Any

from suites.scales import Fields, Scale
from suites.suite import OPTIMIZERS, SUITES, Condition, Winners, as_written, at_rates, both, suite


@suite(
    "moe-lr-muon",
    "Which learning rate is best for Muon on the mixture of experts?",
    source="S4",
    varies="lr",
    extra_tests=2,
    beside=("moe-lr-adam", "moe-lr-muon-short"),
)
def moe_lr_muon(scale: Scale, winners: Winners) -> list[Condition]:
    return at_rates(scale.moe, "muon", scale.rates["moe-lr-muon"], theirs=0.07)


@suite(
    "moe-lr-muon-short",
    "Does Muon's range of good rates depend on the length of the run?",
    source="S4",
    varies="lr",
    extra_tests=4,
    beside=("moe-lr-adam-short",),
)
def moe_lr_muon_short(scale: Scale, winners: Winners) -> list[Condition]:
    return at_rates({**scale.moe, **scale.moe_short}, "muon", scale.rates["moe-lr-muon"], theirs=0.07)


@suite(
    "moe-lr-adam",
    "Which learning rate is best for AdamW on the mixture of experts?",
    source="S4",
    varies="lr",
)
def moe_lr_adam(scale: Scale, winners: Winners) -> list[Condition]:
    return at_rates(scale.moe, "adamw", scale.rates["moe-lr-adam"], theirs=0.001)


@suite(
    "moe-lr-adam-short",
    "Which learning rate is best for AdamW in the shorter runs, the only ones of which S4 gives its losses?",
    source="S4",
    varies="lr",
)
def moe_lr_adam_short(scale: Scale, winners: Winners) -> list[Condition]:
    return at_rates({**scale.moe, **scale.moe_short}, "adamw", scale.rates["moe-lr-adam"], theirs=0.001)


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
    claimed: bool = True,
    **varied: tuple[Any, ...],
) -> None:
    """A suite that varies one setting of Muon on the mixture of experts, at the best rate of Muon's sweep.

    Each value is tested against S4's best, `default`. `labels` names values that read badly as setting and number.
    """
    ((setting, values),) = varied.items()
    names = {v: v if isinstance(v, str) else f"{setting} {v:g}" for v in values} | (labels or {})
    more = {"extra_tests": extra_tests, "claimed": claimed}

    @suite(name, question, source="S4", varies=setting, needs=("moe-lr-muon",), **more)
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
ablation(
    "moe-ns-steps",
    "How many Newton-Schulz steps are enough?",
    ns_steps=(3, 5, 7, 10, "3:0.5,5"),
    default=5,
    labels={"3:0.5,5": "ns_steps 3, then 5"},
    extra_tests=2,
)
ablation(
    "moe-ns-order",
    "Should momentum average gradients, or orthogonalised gradients?",
    ns_before_momentum=(False, True),
    default=False,
    labels={False: "Newton-Schulz after momentum", True: "Newton-Schulz before momentum"},
    claimed=False,
)


@suite(
    "moe-muon-on",
    "Which matrices should Muon train?",
    source="S4",
    varies="muon_on",
    needs=("moe-lr-muon", "moe-lr-adam"),
)
def moe_muon_on(scale: Scale, winners: Winners) -> list[Condition]:
    """What is left of the blocks trains at AdamW's best rate for them, not at that of the embedding."""
    base, left = moe_base(scale, winners, "muon"), {"left_lr": moe_base(scale, winners, "adamw")["lr"]}
    all_blocks = "Muon on the blocks"
    return [
        Condition(all_blocks, {**base, "muon_on": "blocks"}),
        Condition("Muon on attention alone", {**base, **left, "muon_on": "q,k,v,o"}, all_blocks),
        Condition("Muon on experts alone", {**base, **left, "muon_on": "up,down"}, all_blocks),
        Condition("Muon on every matrix", {**base, "muon_on": "blocks,embedding,router"}, all_blocks),
    ]


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
    extra_tests=2,
)
ablation(
    "moe-clip",
    "Does clipping the gradient matter to Muon?",
    grad_clip=(0.5, 1.0, 2.0, 0.0),
    default=1.0,
    labels={0.0: "no clipping"},
)


@suite(
    "moe-balance",
    "Does the load-balancing loss keep the experts balanced?",
    source="S4",
    varies="balance",
    needs=("moe-lr-muon", "moe-lr-adam"),
    extra_tests=2,
)
def moe_balance(scale: Scale, winners: Winners) -> list[Condition]:
    conditions = []
    for optimizer in OPTIMIZERS:
        base = moe_base(scale, winners, optimizer)
        conditions.append(Condition(optimizer, base))
        conditions.append(Condition(f"{optimizer}, no balancing", {**base, "balance": 0.0}, optimizer))
    return conditions


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
    extra_tests=6,
    beside=("moe-schedule", "moe-warmup"),
)
def moe_adam(scale: Scale, winners: Winners) -> list[Condition]:
    base, default = moe_base(scale, winners, "adamw"), next(iter(ADAM_CHOICES))
    return [Condition(c, {**base, **f}, None if c == default else default) for c, f in ADAM_CHOICES.items()]


@suite(
    "moe-long",
    "What do the experts learn in a longer run?",
    source="S4",
    varies="optimizer",
    confirms=True,
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
    confirms=True,
    needs=("moe-lr-muon", "moe-lr-adam", *MUON_ABLATIONS, "moe-adam"),
    extra_tests=10,
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
