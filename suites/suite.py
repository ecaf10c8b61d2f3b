"""What a suite is: an experiment as a function from a scale to named conditions, and what such functions are made of.

    @suite("speedrun-2m", "Who wins?", source="S0", varies="optimizer", needs=("speedrun-lr",))
    def speedrun_2m(scale, winners): return both(scale.dense, lambda o: winners("speedrun-lr", o)["lr"])

A condition holds all settings of train.py except seed, data and folder; its name tells what it changes. Both optimizers
of a suite share model, batches, initialisation, validation tokens and weight decay. Conditions "as written" have a
document's own settings.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from model import SIZES
from suites import documents
from suites.arms import Axis
from suites.scales import Fields, Scale


class Winners(Protocol):
    """What finished runs have shown of an arm."""

    def __call__(self, suite: str, arm: str) -> Fields:
        """The settings of the arm's best condition."""
        ...

    def seconds_per_token(self, suite: str, conditions: Sequence["Condition"]) -> Mapping[str, float]:
        """Training seconds of the arm of each condition, the median over its runs; empty before all are over."""
        ...


OPTIMIZERS = ("muon", "adamw")
AS_WRITTEN = "as written"  # ends the name of a condition with the settings of a document
OURS = "ours"  # the source of suites that repeat nobody's
EVERYTHING, RETESTS = GROUPS = ("everything", "retests")
MOST_GROWTH = 2  # rates beyond each optimizer's grid, while the best is on its edge


@dataclass(frozen=True)
class Condition:
    """Named settings, and the condition of the same suite against which they are tested. The arm is the optimizer,
    unless a name tells apart arms that share it; `space` has the range of each setting that was tuned for it."""

    name: str
    fields: Fields
    versus: str | None = None
    arm: str = ""
    space: Mapping[str, Axis] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arm", self.arm or str(self.fields["optimizer"]))  # frozen


Plan = Callable[[Scale, Winners], list[Condition]]


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
    plan: Plan
    one_seed: bool = False

    @property
    def group(self) -> str:
        """The word that names it together with others: `everything` repeats the documents, `retests` tests papers."""
        return EVERYTHING if self.source in documents.WRITTEN else "" if self.source == OURS else RETESTS

    def seeds_at(self, scale: Scale) -> tuple[int, ...]:
        if self.one_seed:
            return scale.sweep_seeds[:1]
        fresh = scale.documents_seeds if self.source in documents.WRITTEN else scale.fresh_seeds
        return fresh if self.confirms else scale.claim_seeds if self.claimed else scale.sweep_seeds


SUITES: dict[str, Suite] = {}  # all of them once suites/catalog.py is imported


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
        SUITES[name] = Suite(
            name=name,
            source=source,
            question=question,
            varies=varies,
            needs=needs,
            extra_tests=extra_tests,
            claimed=claimed,
            confirms=confirms,
            beside=beside,
            plan=plan,
            one_seed=one_seed,
        )
        return plan

    return register


def at_rates(base: Fields, optimizer: str, rates: tuple[float, ...], theirs: float | None = None) -> list[Condition]:
    """A condition for each rate, tested against the document's best rate where that is in the grid."""
    names = {rate: f"{optimizer} lr {rate:g}" for rate in rates}
    against = {rate: None if rate == theirs else names.get(theirs) for rate in rates}
    return [Condition(names[rate], {**base, "optimizer": optimizer, "lr": rate}, against[rate]) for rate in rates]


def grown(conditions: list[Condition], arm: str, edge: float) -> list[Condition]:
    """The conditions of a sweep with one rate more for an arm, beyond the edge of its grid, as far from it as its
    neighbour is (in proportion); in the order of the rates."""
    own = sorted((c for c in conditions if c.arm == arm), key=lambda c: c.fields["lr"])
    at_edge, neighbour = (own[0], own[1]) if edge == own[0].fields["lr"] else (own[-1], own[-2])
    rate = float(f"{edge * edge / neighbour.fields['lr']:.2g}")
    against = next((c.versus for c in own if c.versus), None)
    more = Condition(f"{arm} lr {rate:g}", {**at_edge.fields, "lr": rate}, against, arm)
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


def width_scaled(scale: Scale, winners: Winners, size: Fields) -> Callable[[str], float]:
    """The rates of lr-sensitivity for a model of another size: AdamW's rate falls as 1 / width; Muon's stays, because
    its update is scaled by the matrix's shape. So no size trains at a rate tuned for another."""
    searched, width = width_of(scale.search), width_of(size)

    def rate(optimizer: str) -> float:
        found = winners("lr-sensitivity", optimizer)["lr"]
        return found if optimizer == "muon" else float(f"{found * searched / width:.4g}")

    return rate


def width_of(fields: Fields) -> int:
    return fields.get("d_model") or SIZES[fields["model"]].d_model
