"""Claims of papers and records on Muon, each retested by a suite, and what the runs say about it.

    SUITES["muon-parts"].plan(scale, winners); PAPER_CLAIMS[0].measure

`retests` names all of these suites together. They train the short dense run at the learning rates of its sweep, on
fresh seeds. Their sources are named, not quoted; "track 3" is that of github.com/KellerJordan/modded-nanogpt.
"""

import math
from collections.abc import Callable

import numpy as np

from analysis.runs import Run
from suites.judging import Lacking, Unit
from suites.measures import (
    NATS,
    Claim,
    about,
    as_good,
    higher,
    lead_lasts,
    lead_shrinks,
    lower,
    versus,
)
from suites.rate_measures import wider
from suites.scales import Fields, Scale
from suites.spectral_measures import spectral
from suites.suite import Condition, Plan, Winners, both, suite, width_scaled

PARTS, EXACTNESS, HEADS, NORMUON = "arXiv 2509.26030", "arXiv 2606.00371", "arXiv 2605.08933", "arXiv 2510.05491"
STABLE_RANK, RATIO, BATCH, RARE = "arXiv 2606.08388", "arXiv 2509.02046", "arXiv 2505.02222", "arXiv 2603.26554"
TRACK_3 = "track 3"
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


def rare_minus_frequent(run: Run) -> float:
    """The last validation's loss on the rarest decile of tokens minus that on the most frequent one."""
    losses = run.val.get("val_loss_by_decile")
    if losses is None or not np.isfinite(losses[-1][[0, -1]]).all():
        raise Lacking("the runs have not logged their losses by decile")
    return float(losses[-1][-1] - losses[-1][0])


PAPER_CLAIMS: tuple[Claim, ...] = (
    *about(
        "muon-parts",
        PARTS,
        Claim(
            "Muon on V, O and the feed-forward layers alone is as good as on all",
            (),
            as_good("Muon on v, o, up, down", "Muon on every projection"),
        ),
        Claim("Muon on Q and K alone gains little over AdamW", (), as_good("Muon on q, k", "AdamW")),
    ),
    *about(
        "muon-exactness",
        EXACTNESS,
        Claim("An exact polar factor is no better", (), as_good("exact, by SVD", "Polar Express, 5 steps")),
        Claim("Five steps of the cubic are as good", (), as_good("cubic, 5 steps", "Polar Express, 5 steps")),
    ),
    *about(
        "muon-heads",
        HEADS,
        Claim("Groups of heads beat all heads together", (), higher("all heads together", "groups of two heads")),
        Claim("Groups of heads beat single heads", (), higher("single heads", "groups of two heads")),
    ),
    *about("muon-rows", NORMUON, Claim("NorMuon beats Muon", (), lower("NorMuon", "Muon"))),
    *about("muon-rows", TRACK_3, Claim("NorMuon is no better than a tuned Muon", (), as_good("NorMuon", "Muon"))),
    *about(
        "muon-momentum",
        TRACK_3,
        Claim(
            "Momentum is most of it: without it Muon is worse than AdamW",
            (),
            higher("Muon without momentum", "AdamW"),
        ),
    ),
    # The next two repeat tests that documents' claims make, on the same runs: no test more.
    *about(
        "baseline",
        STABLE_RANK,
        Claim("Muon preserves stable rank", (), spectral("stable_rank", 1, Unit(" directions", ".2f"))),
    ),
    *about(
        "lr-sensitivity",
        STABLE_RANK,
        Claim("Muon has the broader plateau of rates", (), wider(0.05, "lr-sensitivity", "lr-sensitivity")),
    ),
    *about(
        "tokens-per-parameter",
        RATIO,
        Claim("The lead shrinks with tokens per parameter", (), lead_shrinks("tokens", "tokens"), tests=1),
    ),
    *about(
        "batch-size",
        BATCH,
        Claim("Muon keeps its lead at large batches", (), lead_lasts("batch_tokens", "batch size"), tests=1),
    ),
    *about(
        "rare-tokens",
        RARE,
        Claim(
            "Muon's lead is larger on rare tokens than on frequent ones",
            (),
            versus(rare_minus_frequent, -1, NATS, method="difference of differences"),
            tests=1,
        ),
    ),
)
