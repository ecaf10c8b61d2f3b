"""The experiments that retest claims of papers and records on Muon (suites/paper_claims.py has the claims).

    SUITES["muon-parts"].plan(scale, winners)

`retests` names all of these suites together. AdamW and Muon train with the settings that won the trials of the fair
fight, on fresh seeds, but `retest-lr` sweeps the rate of every arm again around it.
"""

import math
from collections.abc import Callable

from suites.arms import three_digits
from suites.fair import TRIALS
from suites.paper_claims import BATCH, CONTROL, EXACTNESS, FIVE_STEPS, HEADS, NORMUON, PARTS, RARE, RATIO, TRACK_3
from suites.scales import Fields, Scale
from suites.suite import OPTIMIZERS, Condition, Plan, Winners, suite, width_of

LARGE_BATCH = 4  # times the batch of the short run
SHAPE = ("model", "d_model", "layers", "heads", "kv_heads", "d_ff")


def retest(
    name: str,
    question: str,
    source: str,
    *,
    varies: str,
    extra_tests: int = 0,
    needs: tuple[str, ...] = (TRIALS, "retest-lr"),
) -> Callable[[Plan], Plan]:
    """Register a suite that tests the claim of a paper."""
    return suite(name, question, source=source, varies=varies, needs=needs, extra_tests=extra_tests, confirms=True)


def sweep(name: str, question: str, source: str) -> Callable[[Plan], Plan]:
    """Register the sweep of rates that a retest needs."""
    return suite(name, question, source=source, varies="lr", needs=(TRIALS,), claimed=False)


def tuned(scale: Scale, winners: Winners, optimizer: str = "muon") -> Fields:
    """The short run with the settings of the optimizer's best trial, without spectra."""
    best, budget = winners(TRIALS, optimizer), scale.fight.budget(1)
    settings = {key: value for key, value in best.items() if key not in budget}
    return {**settings, **scale.dense, "spectra_every": 0, "optimizer": optimizer, "lr": best["lr"]}


def against_adamw(adamw: Fields, muon: Fields, label: str = "") -> list[Condition]:
    return [Condition(f"muon{label}", muon, f"adamw{label}"), Condition(f"adamw{label}", adamw)]


# Each arm of a retest: what it changes of its optimizer's best trial. Without orthogonalisation the momentum is scaled
# to the norm that Muon's update has. Of eight heads of q, k and v each, two are neither all nor one.
EIGHT_HEADS: Fields = {"heads": 8, "kv_heads": 8}
ARMS: dict[str, Fields] = {
    "AdamW": {},
    "Muon": {},
    CONTROL: {"optimizer": "adamw"},
    "NorMuon": {"normalize_rows": True},
    "quintic, 5 steps": {"ns_coefficients": "quintic"},
    "cubic, 5 steps": {"ns_coefficients": "cubic"},
    "exact, by SVD": {"ns_method": "svd"},
    "Muon without momentum": {"momentum": 0.0},
    "momentum, not orthogonalised": {"ns_method": "none"},
    "all heads together": EIGHT_HEADS,
    "groups of two heads": {**EIGHT_HEADS, "heads_per_matrix": 2},
    "single heads": {**EIGHT_HEADS, "heads_per_matrix": 1},
}


def arm_at(scale: Scale, winners: Winners, arm: str, factor: float = 1.0) -> Fields:
    """An arm at `factor` times the rate of the best trial: AdamW's for CONTROL too."""
    fields = {**tuned(scale, winners, "adamw" if arm == "AdamW" else "muon"), **ARMS[arm]}
    rate = winners(TRIALS, fields["optimizer"])["lr"]
    return {**fields, "lr": three_digits(rate * factor)}


@sweep("retest-lr", "Which rate suits each arm of the retests?", "several papers")
def retest_lr(scale: Scale, winners: Winners) -> list[Condition]:
    arms = {arm: [arm_at(scale, winners, arm, factor) for factor in (1 / 2, 1, 2)] for arm in ARMS}
    return [Condition(f"{arm} lr {fields['lr']:g}", fields, arm=arm) for arm, tried in arms.items() for fields in tried]


def swept(scale: Scale, winners: Winners, arm: str) -> Fields:
    """An arm at its best rate."""
    return {**arm_at(scale, winners, arm), "lr": winners("retest-lr", arm)["lr"]}


@retest("muon-parts", "Which projections gain by Muon?", PARTS, varies="muon_on", extra_tests=2)
def muon_parts(scale: Scale, winners: Winners) -> list[Condition]:
    """AdamW has Muon's decay, warm-up, betas and rate of the rest here, and what Muon leaves AdamW's rate of blocks."""
    adamw, muon = swept(scale, winners, CONTROL), swept(scale, winners, "Muon")
    left = {"left_lr": adamw["lr"]}
    return [
        Condition(CONTROL, adamw),
        Condition("Muon on every projection", muon, CONTROL),
        Condition("Muon on v, o, up, down", {**muon, **left, "muon_on": "v,o,up,down"}, "Muon on every projection"),
        Condition("Muon on q, k", {**muon, **left, "muon_on": "q,k"}, CONTROL),
    ]


@retest("muon-exactness", "Does it matter how exact the polar factor is?", EXACTNESS, varies="ns_coefficients")
def muon_exactness(scale: Scale, winners: Winners) -> list[Condition]:
    """The cubic is the classical one, which leaves small singular values small."""
    others = "quintic, 5 steps", "cubic, 5 steps", "exact, by SVD"
    return [
        Condition(FIVE_STEPS, swept(scale, winners, "Muon")),
        *(Condition(arm, swept(scale, winners, arm), FIVE_STEPS) for arm in others),
    ]


@retest("muon-heads", "Should Muon take heads together, in groups, or one by one?", HEADS, varies="heads_per_matrix")
def muon_heads(scale: Scale, winners: Winners) -> list[Condition]:
    groups = "groups of two heads"
    return [
        Condition(arm, swept(scale, winners, arm), None if arm == groups else groups)
        for arm in ("all heads together", groups, "single heads")
    ]


@retest("muon-rows", "Does NorMuon's normalisation of rows help?", NORMUON, varies="normalize_rows")
def muon_rows(scale: Scale, winners: Winners) -> list[Condition]:
    muon, rows = (swept(scale, winners, arm) for arm in ("Muon", "NorMuon"))
    return [Condition("Muon", muon), Condition("NorMuon", rows, "Muon")]


@retest(
    "muon-momentum",
    "How much of Muon is momentum, how much orthogonalisation?",
    TRACK_3,
    varies="momentum",
    extra_tests=1,
)
def muon_momentum(scale: Scale, winners: Winners) -> list[Condition]:
    versus = {"AdamW": None, "Muon": "AdamW", "Muon without momentum": "AdamW", "momentum, not orthogonalised": "Muon"}
    return [Condition(arm, swept(scale, winners, arm), other) for arm, other in versus.items()]


@retest(
    "tokens-per-parameter",
    "Does the lead shrink with tokens per parameter?",
    RATIO,
    varies="tokens",
    extra_tests=2,
    needs=(TRIALS,),
)
def tokens_per_parameter(scale: Scale, winners: Winners) -> list[Condition]:
    """The smallest size of model-size, with the settings of the trials at every length. AdamW's rate rises as
    1 / width; Muon's update is scaled by the shape."""
    smallest, conditions = next(iter(scale.sizes.values())), []
    shape = {key: smallest[key] for key in SHAPE if key in smallest}
    adamw, muon = ({**tuned(scale, winners, optimizer), **shape} for optimizer in ("adamw", "muon"))
    adamw["lr"] = three_digits(adamw["lr"] * width_of(scale.dense) / width_of(smallest))
    for ratio, budget in scale.lengths.items():
        more = {**budget, "eval_every": max(1, budget["tokens"] // budget["batch_tokens"] // 16)}
        conditions += against_adamw({**adamw, **more}, {**muon, **more}, f", {ratio} a parameter")
    return conditions


def large_batch(scale: Scale, fields: Fields) -> Fields:
    """The same tokens in batches that are LARGE_BATCH times as large."""
    batch = LARGE_BATCH * scale.dense["batch_tokens"]
    return {**fields, "batch_tokens": batch, "eval_every": max(1, fields["tokens"] // batch // 8)}


@sweep("batch-size-lr", "Which rate suits each optimizer at a large batch?", BATCH)
def batch_size_lr(scale: Scale, winners: Winners) -> list[Condition]:
    """The best rate of the small batch, times the root of the batch, and in proportion to it."""
    return [
        Condition(f"{optimizer} lr {rate:g}", {**large_batch(scale, fields), "lr": rate})
        for optimizer in OPTIMIZERS
        for fields in (tuned(scale, winners, optimizer),)
        for rate in (three_digits(fields["lr"] * factor) for factor in (1, math.sqrt(LARGE_BATCH), LARGE_BATCH))
    ]


@retest(
    "batch-size",
    "Does Muon keep its lead at large batches?",
    BATCH,
    varies="batch_tokens",
    extra_tests=1,
    needs=(TRIALS, "retest-lr", "batch-size-lr"),
)
def batch_size(scale: Scale, winners: Winners) -> list[Condition]:
    """The same tokens in each batch size; for the large one both rates are swept again, the other settings stay."""
    small = [swept(scale, winners, arm) for arm in ("AdamW", "Muon")]
    large = [
        {**large_batch(scale, fields), "lr": winners("batch-size-lr", fields["optimizer"])["lr"]} for fields in small
    ]
    return [
        condition
        for pair in (small, large)
        for condition in against_adamw(*pair, f", batches of {pair[0]['batch_tokens']:,}")
    ]


@retest("rare-tokens", "Is Muon's lead won on rare tokens?", RARE, varies="optimizer", extra_tests=2)
def rare_tokens(scale: Scale, winners: Winners) -> list[Condition]:
    adamw, muon = ({**swept(scale, winners, arm), **scale.baseline, "spectra_every": 0} for arm in ("AdamW", "Muon"))
    return against_adamw(adamw, muon)
