"""The experiments of the five documents, each a function from a scale to named conditions; suites/fair.py adds ours.

    conditions = SUITES["moe-momentum"].plan(SCALES["nano"], winners)

A condition holds all settings of train.py except seed, data and folder; its name tells what it changes. Both optimizers
of a suite share model, batches, initialisation, validation tokens and weight decay. S0 to S4 are the documents
(`Suite.source`). We do not repeat their errors: schedules count steps, each optimizer's rate comes from its own sweep,
and weight decay is the same for both (except in moe-final, where each has the winner of its sweep). Conditions "as
written" have a document's own settings.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from suites import documents
from suites.scales import Fields, Scale


class Winners(Protocol):
    """What the finished runs of other suites have shown; an arm is an optimizer, or what `Condition.arm` names."""

    def __call__(self, suite: str, arm: str) -> Fields:
        """The settings of the arm's best condition."""
        ...

    def seconds_per_token(self, suite: str, arm: str) -> float:
        """Training seconds, the median over the arm's runs."""
        ...


OPTIMIZERS = ("muon", "adamw")
AS_WRITTEN = "as written"  # ends the name of a condition with the settings of a document
OURS = "ours"  # the source of suites that repeat no document
MOST_GROWTH = 2  # rates beyond each optimizer's grid, while the best is on its edge


@dataclass(frozen=True)
class Condition:
    """Named settings, and the condition of the same suite against which they are tested. `arm` tells apart what shares
    an optimizer (default: the optimizer)."""

    name: str
    fields: Fields
    versus: str | None = None
    arm: str | None = None

    @property
    def side(self) -> str:
        return self.arm or str(self.fields["optimizer"])


@dataclass(frozen=True)
class Suite:
    """One experiment: `varies` names the setting that it varies, `needs` the suites whose winners it uses.

    Claims compare it with the runs of the suites `beside` it, which a report reads too where they are there.
    `extra_tests` counts the tests that claims make on its runs beyond its own pairs; every correction includes them.
    `claimed`: a claim of a document hangs on it. `confirms`: other seeds than its own chose its settings. `one_seed`:
    it spends its runs on settings instead of seeds.
    """

    name: str
    source: str
    question: str
    varies: str
    needs: tuple[str, ...]
    extra_tests: int
    claimed: bool
    confirms: bool
    beside: tuple[str, ...]
    plan: Callable[[Scale, Winners], list[Condition]]
    one_seed: bool = False

    @property
    def of_a_document(self) -> bool:
        """Whether `everything` includes it."""
        return self.source in documents.WRITTEN

    def seeds_at(self, scale: Scale) -> tuple[int, ...]:
        if self.one_seed:
            return scale.sweep_seeds[:1]
        return scale.fresh_seeds if self.confirms else scale.claim_seeds if self.claimed else scale.sweep_seeds


SUITES: dict[str, Suite] = {}


Plan = Callable[[Scale, Winners], list[Condition]]


def suite(
    name: str,
    question: str,
    *,
    source: str,
    varies: str,
    needs: tuple[str, ...] = (),
    extra_tests: int = 0,
    claimed: bool = True,
    confirms: bool = False,
    beside: tuple[str, ...] = (),
    one_seed: bool = False,
) -> Callable[[Plan], Plan]:
    """Register a function as a suite."""

    def register(plan: Plan) -> Plan:
        rest = (needs, extra_tests, claimed, confirms, beside, plan, one_seed)
        SUITES[name] = Suite(name, source, question, varies, *rest)
        return plan

    return register


def at_rates(base: Fields, optimizer: str, rates: tuple[float, ...], theirs: float | None = None) -> list[Condition]:
    """A condition for each rate, tested against the document's best rate where that is in the grid."""
    names = {rate: f"{optimizer} lr {rate:g}" for rate in rates}
    against = {rate: None if rate == theirs else names.get(theirs) for rate in rates}
    return [Condition(names[rate], {**base, "optimizer": optimizer, "lr": rate}, against[rate]) for rate in rates]


def grown(conditions: list[Condition], optimizer: str, edge: float) -> list[Condition]:
    """The conditions of a sweep with one rate more for an optimizer, beyond the edge of its grid, as far from it as its
    neighbour is (in proportion); in the order of the rates."""
    own = sorted((c for c in conditions if c.fields["optimizer"] == optimizer), key=lambda c: c.fields["lr"])
    at_edge, neighbour = (own[0], own[1]) if edge == own[0].fields["lr"] else (own[-1], own[-2])
    rate = float(f"{edge * edge / neighbour.fields['lr']:.2g}")
    against = next((c.versus for c in own if c.versus), None)
    more = Condition(f"{optimizer} lr {rate:g}", {**at_edge.fields, "lr": rate}, against)
    place = conditions.index(at_edge) + (at_edge is own[-1])
    return [*conditions[:place], more, *conditions[place:]]


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
    confirms=True,
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
    extra_tests=8,
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
        conditions += as_written(fields, "S2", f" {name}", **scale.written)
    return conditions


@suite(
    "moe-lr-muon",
    "Which learning rate is best for Muon on the mixture of experts?",
    source="S4",
    varies="lr",
    extra_tests=4,
    beside=("moe-lr-adam", "moe-lr-muon-short"),
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
ablation(
    "moe-muon-on",
    "Which matrices should Muon train?",
    muon_on=("blocks", "q,k,v,o", "up,down", "blocks,embedding,router"),
    default="blocks",
    labels={
        "blocks": "Muon on the blocks",
        "q,k,v,o": "Muon on attention alone",
        "up,down": "Muon on experts alone",
        "blocks,embedding,router": "Muon on every matrix",
    },
)
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
