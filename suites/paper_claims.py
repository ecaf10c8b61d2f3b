"""The claims of papers and records on Muon, each under its own source, which is named, not quoted.

"track 3" is that of github.com/KellerJordan/modded-nanogpt.
"""

import math
from collections.abc import Mapping

import numpy as np

from analysis.plots_tokens import last_by_decile
from analysis.runs import Run
from analysis.stats import slope
from suites.judging import Context, Evidence, Lacking, Unit
from suites.measures import (
    LOG_RATIO,
    NATS,
    TIMES,
    Claim,
    Measure,
    about,
    higher,
    lead_lasts,
    lower,
    no_better,
    of_loss,
    per_seed,
    sizes,
    spent_until,
    versus,
)
from suites.rate_measures import wider
from suites.spectral_measures import spectral

PARTS, EXACTNESS, HEADS, NORMUON = "arXiv 2509.26030", "arXiv 2606.00371", "arXiv 2605.08933", "arXiv 2510.05491"
STABLE_RANK, RATIO, BATCH, RARE = "arXiv 2606.08388", "arXiv 2509.02046", "arXiv 2505.02222", "arXiv 2603.26554"
TRACK_3 = "track 3"
CONTROL = "AdamW, else as Muon"  # on the blocks: decay, warm-up and what trains the rest are Muon's
NEARLY_ALL, LITTLE = 0.75, 0.25  # shares of Muon's gain over AdamW
RARE_DECILES = 3  # of token frequency: the rarest, and as many of the most frequent ones


def keeps(part: str, share: float, expected: int) -> Measure:
    """Muon on every projection ends lower than AdamW, all else alike, and Muon on a part of them makes at least
    (`expected` -1) or at most (1) a share of that gain: its loss minus that of such a share, seed by seed."""

    def measure(c: Context) -> list[Evidence]:
        outcomes = [c.outcome(name) for name in (CONTROL, "Muon on every projection", part)]
        adamw, whole, some = (outcome.losses() for outcome in outcomes)
        seeds = adamw.keys() & whole.keys() & some.keys()
        above = {seed: some[seed] - (1 - share) * adamw[seed] - share * whole[seed] for seed in seeds}
        gains = [sum(adamw[seed] - losses[seed] for seed in seeds) for losses in (some, whole)]
        remark = f" (it makes {100 * gains[0] / gains[1]:.0f} % of the gain)" if gains[1] > 0 else ""
        what = f"{part} minus (AdamW minus {share:g} of the gain)"
        return [
            of_loss(c, outcomes[1], outcomes[0], -1),
            per_seed(what, above, expected, NATS, method="linear contrast", remark=remark),
        ]

    return measure


def speed_up_shrinks(c: Context) -> list[Evidence]:
    """Muon reaches AdamW's final loss in fewer tokens where runs are shortest, and in a larger share of them along the
    tokens. Muon's schedule is not over then, which we take to hide about the same share at each length."""
    shares: dict[float, Mapping[int, float]] = {}  # by tokens per parameter
    never = 0
    for muon, adamw in sizes(c):
        config = c.ready(muon).runs[0].config
        ratios, late = spent_until("tokens", 1.0, muon, c.ready(adamw))
        shares[config["tokens"] / config["params"]], never = ratios, never + late
    if len(shares) < 2:
        raise Lacking("a trend needs two lengths")
    few, many = min(shares), max(shares)
    rise = {seed: math.log10(many / few) * value for seed, value in slope(shares).items()}
    what = "Muon's tokens to AdamW's final loss over AdamW's"
    trend = f"{what}, {many:.3g} a parameter over {few:.3g} along the line through all"
    return [
        per_seed(f"{what}, {few:.3g} a parameter", shares[few], -1, TIMES, method=LOG_RATIO),
        per_seed(trend, rise, 1, TIMES, method="trend", remark=f", never in {never} runs" if never else ""),
    ]


def rare_loss(run: Run) -> float:
    """The last validation's loss, averaged over the rarest deciles of tokens."""
    return _mean_of(_last_deciles(run)[-RARE_DECILES:])


def rare_minus_frequent(run: Run) -> float:
    """The last validation's loss on the rarest deciles of tokens minus that on the most frequent ones."""
    return rare_loss(run) - _mean_of(_last_deciles(run)[:RARE_DECILES])


def _last_deciles(run: Run) -> np.ndarray:
    if "val_loss_by_decile" not in run.val:
        raise Lacking("the runs have not logged their losses by decile")
    return last_by_decile(run)


def _mean_of(deciles: np.ndarray) -> float:
    if not np.isfinite(deciles).all():
        raise Lacking("a decile of token frequency has no tokens")
    return float(np.mean(deciles))


FIVE_STEPS = "Polar Express, 5 steps"
AT_MOST = "by less than 1 % of the loss, if at all"

PAPER_CLAIMS: tuple[Claim, ...] = (
    *about(
        "muon-parts",
        PARTS,
        Claim(
            "Muon on V, O and the feed-forward layers alone makes nearly all of the gain: three quarters or more",
            (),
            keeps("Muon on v, o, up, down", NEARLY_ALL, -1),
            tests=1,
        ),
        Claim(
            "Muon on Q and K alone makes little of the gain: a quarter or less",
            (),
            keeps("Muon on q, k", LITTLE, 1),
            tests=1,
        ),
    ),
    *about(
        "muon-exactness",
        EXACTNESS,
        Claim(
            f"An exact polar factor beats Polar Express {AT_MOST}",
            (),
            no_better(FIVE_STEPS, "exact, by SVD"),
        ),
        Claim(
            f"Polar Express beats five steps of the quintic, which is less exact, {AT_MOST}",
            (),
            no_better("quintic, 5 steps", FIVE_STEPS),
        ),
    ),
    *about(
        "muon-heads",
        HEADS,
        Claim("Groups of heads beat all heads together", (), higher("all heads together", "groups of two heads")),
        Claim("Groups of heads beat single heads", (), higher("single heads", "groups of two heads")),
    ),
    *about("muon-rows", NORMUON, Claim("NorMuon beats Muon", (), lower("NorMuon", "Muon"))),
    *about("muon-rows", TRACK_3, Claim(f"NorMuon beats a tuned Muon {AT_MOST}", (), no_better("Muon", "NorMuon"))),
    *about(
        "muon-momentum",
        TRACK_3,
        Claim(
            "Without momentum Muon is worse than AdamW",
            (),
            higher("Muon without momentum", "AdamW"),
        ),
        Claim(
            "Momentum is most of it, as we read its run without: that costs more than to leave out orthogonalisation",
            (),
            higher("Muon without momentum", "momentum, not orthogonalised"),
            tests=1,
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
        Claim("Muon's speed-up shrinks with tokens per parameter", (), speed_up_shrinks, tests=2),
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
            "Muon ends lower on rare tokens, the last three tenths by frequency",
            (),
            versus(rare_loss, -1, NATS),
            tests=1,
        ),
        Claim(
            "Muon's lead is larger on rare tokens than on the three tenths that are most frequent",
            (),
            versus(rare_minus_frequent, -1, NATS, method="difference of differences"),
            tests=1,
        ),
    ),
)
