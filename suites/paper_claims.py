"""The claims of papers and records on Muon, each under its own source, which is named, not quoted.

"track 3" is that of github.com/KellerJordan/modded-nanogpt.
"""

import numpy as np

from analysis.runs import Run
from suites.judging import Lacking, Unit
from suites.measures import NATS, Claim, about, as_good, higher, lead_lasts, lead_shrinks, lower, versus
from suites.rate_measures import wider
from suites.spectral_measures import spectral

PARTS, EXACTNESS, HEADS, NORMUON = "arXiv 2509.26030", "arXiv 2606.00371", "arXiv 2605.08933", "arXiv 2510.05491"
STABLE_RANK, RATIO, BATCH, RARE = "arXiv 2606.08388", "arXiv 2509.02046", "arXiv 2505.02222", "arXiv 2603.26554"
TRACK_3 = "track 3"


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
