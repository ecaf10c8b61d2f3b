"""The experiments that retest claims of papers and records on Muon (suites/paper_claims.py has the claims).

    SUITES["muon-parts"].plan(scale, winners)

`retests` names all of these suites together. AdamW and Muon train with the settings that won the trials of the fair
fight, on fresh seeds; where a variant asks for another rate, a sweep of its own finds it.
"""

import math
from collections.abc import Callable

from suites.arms import three_digits
from suites.fair import TRIALS
from suites.paper_claims import BATCH, EXACTNESS, FIVE_STEPS, HEADS, NORMUON, PARTS, RARE, RATIO, TRACK_3
from suites.scales import Fields, Scale
from suites.suite import OPTIMIZERS, Condition, Plan, Winners, suite, width_of

LARGE_BATCH = 4  # times the batch of the short run
SHAPE = ("model", "d_model", "layers", "heads", "kv_heads", "d_ff")


def retest(
    name: str, question: str, source: str, *, varies: str, extra_tests: int = 0, needs: tuple[str, ...] = (TRIALS,)
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


@retest("muon-parts", "Which projections gain by Muon?", PARTS, varies="muon_on", extra_tests=2)
def muon_parts(scale: Scale, winners: Winners) -> list[Condition]:
    """What Muon leaves trains at AdamW's rate of the blocks and with its betas, which all conditions share; decay and
    warm-up are Muon's."""
    adamw = tuned(scale, winners, "adamw")
    betas = {key: adamw[key] for key in ("beta1", "beta2") if key in adamw}
    muon, left = {**tuned(scale, winners), **betas}, {"left_lr": adamw["lr"]}
    return [
        Condition("AdamW", adamw),
        Condition("Muon on every projection", muon, "AdamW"),
        Condition("Muon on v, o, up, down", {**muon, **left, "muon_on": "v,o,up,down"}, "Muon on every projection"),
        Condition("Muon on q, k", {**muon, **left, "muon_on": "q,k"}, "AdamW"),
    ]


@retest("muon-exactness", "Does it matter how exact the polar factor is?", EXACTNESS, varies="ns_coefficients")
def muon_exactness(scale: Scale, winners: Winners) -> list[Condition]:
    base = tuned(scale, winners)
    tried = {
        FIVE_STEPS: {},
        "quintic, 5 steps": {"ns_coefficients": "quintic"},
        "cubic, 5 steps": {"ns_coefficients": "cubic"},
        "exact, by SVD": {"ns_method": "svd"},
    }
    return [
        Condition(name, {**base, **fields}, None if name == FIVE_STEPS else FIVE_STEPS)
        for name, fields in tried.items()
    ]


@retest("muon-heads", "Should Muon take heads together, in groups, or one by one?", HEADS, varies="heads_per_matrix")
def muon_heads(scale: Scale, winners: Winners) -> list[Condition]:
    """With eight heads of q, k and v each, so that groups of two are neither whole nor single."""
    base = {**tuned(scale, winners), "heads": 8, "kv_heads": 8}
    return [
        Condition("all heads together", base, "groups of two heads"),
        Condition("groups of two heads", {**base, "heads_per_matrix": 2}),
        Condition("single heads", {**base, "heads_per_matrix": 1}, "groups of two heads"),
    ]


@retest("muon-rows", "Does NorMuon's normalisation of rows help?", NORMUON, varies="normalize_rows")
def muon_rows(scale: Scale, winners: Winners) -> list[Condition]:
    base = tuned(scale, winners)
    return [Condition("Muon", base), Condition("NorMuon", {**base, "normalize_rows": True}, "Muon")]


# Muon without one of its halves. Without orthogonalisation the momentum is scaled to the norm that Muon's update has.
HALVES: dict[str, Fields] = {
    "Muon without momentum": {"momentum": 0.0},
    "momentum, not orthogonalised": {"ns_method": "none"},
}


@sweep("muon-momentum-lr", "Which rate suits each half of Muon?", TRACK_3)
def muon_momentum_lr(scale: Scale, winners: Winners) -> list[Condition]:
    base = tuned(scale, winners)
    rates = [three_digits(base["lr"] * factor) for factor in (1 / 4, 1 / 2, 1, 2)]
    return [
        Condition(f"{half} lr {rate:g}", {**base, **fields, "lr": rate}, arm=half)
        for half, fields in HALVES.items()
        for rate in rates
    ]


@retest(
    "muon-momentum",
    "How much of Muon is momentum, how much orthogonalisation?",
    TRACK_3,
    varies="momentum",
    extra_tests=1,
    needs=(TRIALS, "muon-momentum-lr"),
)
def muon_momentum(scale: Scale, winners: Winners) -> list[Condition]:
    base = tuned(scale, winners)
    without, scaled = (
        {**base, **fields, "lr": winners("muon-momentum-lr", half)["lr"]} for half, fields in HALVES.items()
    )
    return [
        Condition("AdamW", tuned(scale, winners, "adamw")),
        Condition("Muon", base, "AdamW"),
        Condition("Muon without momentum", without, "AdamW"),
        Condition("momentum, not orthogonalised", scaled, "Muon"),
    ]


@retest(
    "tokens-per-parameter", "Does the lead shrink with tokens per parameter?", RATIO, varies="tokens", extra_tests=2
)
def tokens_per_parameter(scale: Scale, winners: Winners) -> list[Condition]:
    """The smallest size of model-size. AdamW's rate rises as 1 / width; Muon's update is scaled by the shape."""
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
    needs=(TRIALS, "batch-size-lr"),
)
def batch_size(scale: Scale, winners: Winners) -> list[Condition]:
    """The same tokens in each batch size; for the large one both rates are swept again, the other settings stay."""
    small = [tuned(scale, winners, optimizer) for optimizer in ("adamw", "muon")]
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
    adamw, muon = (
        {**tuned(scale, winners, optimizer), **scale.baseline, "spectra_every": 0} for optimizer in ("adamw", "muon")
    )
    return against_adamw(adamw, muon)
