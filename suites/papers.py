"""The experiments that retest claims of papers and records on Muon (suites/paper_claims.py has the claims).

    SUITES["muon-parts"].plan(scale, winners)

`retests` names all of these suites together. They train the short dense run at the learning rates of its sweep, on
fresh seeds.
"""

import math
from collections.abc import Callable

from suites.paper_claims import BATCH, EXACTNESS, HEADS, NORMUON, PARTS, RARE, RATIO, TRACK_3
from suites.scales import Fields, Scale
from suites.suite import Condition, Plan, Winners, both, suite, width_scaled

BATCHES = (0.5, 1, 2, 4)  # times the batch of the short run


def retest(
    name: str, question: str, source: str, *, varies: str, extra_tests: int = 0, needs: str = "speedrun-lr"
) -> Callable[[Plan], Plan]:
    """Register a suite that tests the claim of a paper."""
    return suite(name, question, source=source, varies=varies, needs=(needs,), extra_tests=extra_tests, confirms=True)


def tuned(scale: Scale, winners: Winners, optimizer: str = "muon") -> Fields:
    """The short run at the optimizer's best rate, without spectra."""
    return {**scale.dense, "spectra_every": 0, "optimizer": optimizer, "lr": winners("speedrun-lr", optimizer)["lr"]}


@retest("muon-parts", "Which projections gain by Muon?", PARTS, varies="muon_on")
def muon_parts(scale: Scale, winners: Winners) -> list[Condition]:
    """AdamW trains all else at one rate, the best of its sweep of the block matrices."""
    adamw = tuned(scale, winners, "adamw")
    adamw |= {"adamw_lr": adamw["lr"]}
    muon = tuned(scale, winners) | {"adamw_lr": adamw["lr"]}
    return [
        Condition("AdamW", adamw),
        Condition("Muon on every projection", muon, "AdamW"),
        Condition("Muon on v, o, up, down", {**muon, "muon_on": "v,o,up,down"}, "Muon on every projection"),
        Condition("Muon on q, k", {**muon, "muon_on": "q,k"}, "AdamW"),
    ]


@retest("muon-exactness", "Does it matter how exact the polar factor is?", EXACTNESS, varies="ns_coefficients")
def muon_exactness(scale: Scale, winners: Winners) -> list[Condition]:
    base, five = tuned(scale, winners), "Polar Express, 5 steps"
    tried = {
        five: {},
        "quintic, 5 steps": {"ns_coefficients": "quintic"},
        "cubic, 5 steps": {"ns_coefficients": "cubic"},
        "exact, by SVD": {"ns_method": "svd"},
    }
    return [Condition(name, {**base, **fields}, None if name == five else five) for name, fields in tried.items()]


@retest("muon-heads", "Should Muon take heads together, in groups, or one by one?", HEADS, varies="heads_per_matrix")
def muon_heads(scale: Scale, winners: Winners) -> list[Condition]:
    base = tuned(scale, winners)
    return [
        Condition("all heads together", base, "groups of two heads"),
        Condition("groups of two heads", {**base, "heads_per_matrix": 2}),
        Condition("single heads", {**base, "heads_per_matrix": 1}, "groups of two heads"),
    ]


@retest("muon-rows", "Does NorMuon's normalisation of rows help?", NORMUON, varies="normalize_rows")
def muon_rows(scale: Scale, winners: Winners) -> list[Condition]:
    base = tuned(scale, winners)
    return [Condition("Muon", base), Condition("NorMuon", {**base, "normalize_rows": True}, "Muon")]


@retest("muon-momentum", "How much of Muon is momentum, how much orthogonalisation?", TRACK_3, varies="momentum")
def muon_momentum(scale: Scale, winners: Winners) -> list[Condition]:
    """Without orthogonalisation the momentum is scaled to the norm that Muon's update has."""
    base, adamw = tuned(scale, winners), tuned(scale, winners, "adamw")
    return [
        Condition("AdamW", adamw),
        Condition("Muon", base, "AdamW"),
        Condition("Muon without momentum", {**base, "momentum": 0.0}, "AdamW"),
        Condition("momentum, not orthogonalised", {**base, "ns_method": "none"}, "Muon"),
    ]


@retest(
    "tokens-per-parameter",
    "Does the lead shrink with tokens per parameter?",
    RATIO,
    varies="tokens",
    extra_tests=1,
    needs="lr-sensitivity",
)
def tokens_per_parameter(scale: Scale, winners: Winners) -> list[Condition]:
    """The smallest size of model-size, at the rates of that suite."""
    smallest, conditions = next(iter(scale.sizes.values())), []
    for ratio, budget in scale.lengths.items():
        steps = budget["tokens"] // budget["batch_tokens"]
        base = {**smallest, **budget, "eval_every": max(1, steps // 16), "spectra_every": 0}
        conditions += both(base, width_scaled(scale, winners, smallest), f", {ratio} a parameter")
    return conditions


@retest("batch-size", "Does Muon keep its lead at large batches?", BATCH, varies="batch_tokens", extra_tests=1)
def batch_size(scale: Scale, winners: Winners) -> list[Condition]:
    """The same tokens in each batch size; rates follow its root, for both optimizers alike."""
    conditions = []
    for times in BATCHES:
        batch = int(times * scale.dense["batch_tokens"])
        base = {**scale.dense, "batch_tokens": batch, "spectra_every": 0}
        base["eval_every"] = max(1, base["tokens"] // batch // 8)

        def rate(optimizer: str, times: float = times) -> float:
            return float(f"{winners('speedrun-lr', optimizer)['lr'] * math.sqrt(times):.4g}")

        conditions += both(base, rate, f", batches of {batch:,}")
    return conditions


@retest("rare-tokens", "Is Muon's lead won on rare tokens?", RARE, varies="optimizer", extra_tests=1)
def rare_tokens(scale: Scale, winners: Winners) -> list[Condition]:
    base = {**scale.baseline, "spectra_every": 0}
    return both(base, lambda optimizer: winners("speedrun-lr", optimizer)["lr"])
