"""The claims of the five documents, each with its words or figures, and what the runs say about it; suites/papers.py
adds those of papers.

    for claim, finding in judge_all(results_by_suite): print(claim.statement, finding.verdict, finding.numbers)

S0 to S4 are the documents; quotes are verbatim. A claim of the author's stored runs, which no document makes, says so.
"""

from collections.abc import Mapping

from suites.judging import Context, Evidence, Finding, Lacking, Unit, judge
from suites.measures import (
    LOG_RATIO,
    NATS,
    PERCENT,
    POINTS,
    Claim,
    about,
    accuracy,
    accuracy_at,
    as_good,
    best,
    deviation_in,
    gains_after,
    higher,
    largest_breaks_down,
    lead_grows,
    log_ratio_at,
    lower,
    no_better,
    none_diverges,
    opposite,
    rate_ratio,
    step_time,
    step_time_at_largest,
    timed,
    trend,
    until,
    versus,
    wider,
    wider_when_longer,
)
from suites.papers import PAPER_CLAIMS
from suites.results import Results
from suites.spectral_measures import (
    above_chance,
    alike_experts,
    conditioning_grows,
    experts_balanced,
    flat,
    key_band,
    mean_tail,
    norm_near_one,
    norm_ratio,
    rank_and_loss,
    same_signature,
    spectral,
    steady,
    tiers,
)

STORED_RUNS = "the author's stored runs"  # of the documents' code, where a document has no such figure
RATES = ("lr-sensitivity", "lr-sensitivity")
MOE_RATES = ("moe-lr-muon", "moe-lr-adam")
ADAM_DEFAULT, CONSTANT = "cosine, warm-up 0.05, decay 0.1", "constant, no warm-up"

DOCUMENT_CLAIMS: tuple[Claim, ...] = (
    *about(
        "speedrun-2m",
        "S0",
        Claim("Muon ends the 2M-token run lower", ("6.0748", "6.9147", "-0.84"), lower()),
        Claim("Muon predicts more tokens rightly", ("16.29%", "10.10%"), versus(accuracy, 1, POINTS), tests=1),
        Claim("AdamW is faster per step", ("~1m 54s", "~1m 01s", "faster per step"), step_time(1), tests=1),
        Claim(
            "Muon converges faster: it reaches AdamW's loss in fewer tokens",
            ("significantly faster convergence rate",),
            until("tokens", 1.0),
            tests=1,
        ),
        Claim(
            "Sample efficiency makes up for the overhead: Muon reaches AdamW's loss in less time",
            ("more than makes up for the overhead",),
            timed(until("train_seconds", 1.0)),
            tests=1,
        ),
        Claim("Muon keeps spectral norms near one", ("near the unit circle",), norm_near_one, tests=1),
        Claim("AdamW's spectral norms blow up past Muon's", ("allows them to blow up",), norm_ratio(-1), tests=1),
        Claim(
            "AdamW's rank collapses by entropy, Muon's does not",
            ("rank collapse", "preserves the diversity of the subspaces"),
            spectral("spectral_entropy", 1, Unit("", ".4f")),
            tests=1,
        ),
    ),
    *about(
        "baseline",
        "S1",
        Claim("AdamW's spectral norms are a lot bigger", ("a lot bigger",), norm_ratio(-1), tests=1),
        Claim(
            "Muon preserves rank, by spectral entropy",
            ("maintaining high spectral entropy",),
            spectral("spectral_entropy", 1, Unit("", ".4f")),
            tests=1,
        ),
        Claim(
            "More dimensions contribute under Muon, by effective rank",
            ("allows all available dimensions to contribute",),
            spectral("effective_rank", 1, Unit(" directions", ".2f")),
            tests=1,
        ),
        Claim(
            "Rank collapse is bad: a run with less entropy ends higher",
            ("Rank collapse is generally **bad**",),
            rank_and_loss,
            tests=1,
        ),
        Claim(
            "AdamW's updates align more with the weights",
            ("Higher alignment (typical in AdamW)",),
            versus(above_chance, -1, Unit(" above chance")),
            tests=1,
        ),
        Claim(
            "Muon's spectrum is flatter, by stable rank",
            ("remarkably flat spectrum",),
            spectral("stable_rank", 1, Unit(" directions", ".2f")),
            tests=1,
        ),
        Claim(
            "AdamW's spectrum is heavier in the tail, by Hill's index",
            ("heavy-tailed",),
            versus(mean_tail, -1, Unit("", ".4f")),
            tests=1,
        ),
    ),
    *about(
        "baseline",
        "S3",
        Claim("Validation accuracy is consistent across seeds", ("39.76%", "39.83%"), steady(accuracy, "accuracy"), 1),
        Claim(
            "Validation loss varies little between seeds",
            ("3.3154", "3.3098", "high overall stability"),
            steady(lambda run: run.final_loss, "loss"),
            tests=1,
        ),
        Claim(
            "Runs have identical spectral signatures",
            ("identical spectral structural signatures",),
            same_signature,
            tests=1,
        ),
        Claim(
            "Updates of K align most in a band of layers",
            ("high-alignment band in layers 12-16 for Key (K) projections",),
            key_band,
            tests=1,
        ),
        Claim("Entropy stays flat over time", ("Entropy and Rank remain flat",), flat("entropy", "entropy"), tests=1),
        Claim("Rank stays flat over time", ("remain flat across time",), flat("effective_rank", "effective rank"), 1),
        Claim("The rank tiers are preserved", ("MLP > Q/O > K/V",), tiers, tests=2),
    ),
    *about("baseline", STORED_RUNS, Claim("Muon leads after the long run too", (), lower())),
    *about(
        "lr-sensitivity",
        "S2",
        Claim(
            "Muon tolerates a broader range of rates",
            ("broader stability across learning rates", "tolerates broader hyperparameter ranges"),
            wider(0.05, *RATES),
            tests=1,
        ),
        Claim("AdamW has a sharp peak, Muon has not", ("sharp peaks",), wider(0.01, *RATES), tests=1),
    ),
    *about(
        "model-size",
        "S2",
        Claim("AdamW is ahead at the smallest size", ("79.4%", "78.4%", "-1.3%"), accuracy_at(0, -1), tests=1),
        Claim("Muon is ahead at the second size", ("95.0%", "96.3%", "+1.4%"), accuracy_at(1, 1), tests=1),
        Claim("Muon is ahead at the third size", ("91.7%", "96.1%", "+4.8%"), accuracy_at(2, 1), tests=1),
        Claim("Muon is ahead at the largest size", ("28.4%", "94.6%", "+233%"), accuracy_at(3, 1), tests=1),
        Claim("The lead grows with the model", ("Muon wins at scale", "+1.4%", "+4.8%", "+233%"), lead_grows, tests=1),
        Claim(
            "AdamW breaks down at the largest size",
            ("fails catastrophically at scale", "AdamW crashes at 108M parameters"),
            largest_breaks_down,
            tests=1,
        ),
        Claim(
            "Muon's step takes longer",
            ("4-5% compute overhead",),
            step_time_at_largest,
            tests=1,
        ),
        Claim(
            "The conditioning of gradients matters more as models grow",
            ("becomes critical as models grow",),
            conditioning_grows,
            tests=1,
        ),
    ),
    *about(
        "moe-lr-muon",
        "S4",
        Claim("Muon's best rate is 0.07", ("Optimal LR: **0.07** (loss: 5.7239)", "5.1867"), best("muon lr 0.07")),
        Claim(
            "Muon's range of good rates is wider",
            ("~30×", "4.5× range", "2.86× range"),
            wider(0.05, *MOE_RATES),
            tests=1,
        ),
        Claim("Muon's best rate is 70 times AdamW's", ("70× higher",), rate_ratio("moe-lr-adam", 70.0), tests=1),
        Claim(
            "The range widens in longer runs",
            ("Wider tolerance range at 500 steps",),
            wider_when_longer("moe-lr-muon-short"),
            tests=1,
        ),
        Claim(
            "AdamW's losses deviate less inside its own workable range",
            ("Average 5.6% deviation across 0.02-0.09", "Average 3.3% deviation across 0.0007-0.002"),
            deviation_in((0.02, 0.09), (0.0007, 0.002), "moe-lr-adam"),
            tests=1,
        ),
        Claim("No run diverges", ("without divergence",), none_diverges("S4")),
    ),
    *about(
        "moe-lr-adam",
        "S4",
        Claim("AdamW's best rate is 0.001", ("Optimal LR: **0.001** (loss: 6.7262)",), best("adamw lr 0.001")),
    ),
    *about(
        "moe-momentum",
        "S4",
        Claim("Momentum 0.9 is best", ("Momentum=0.9 optimal", "5.1867"), best("momentum 0.9")),
        Claim(
            "Higher momentum is worse",
            ("Performance degrades with higher momentum", "2.4%"),
            trend("momentum", 1, least=0.9),
            tests=1,
        ),
    ),
    *about(
        "moe-weight-decay",
        "S4",
        Claim("Weight decay 0.2 is best", ("WD=0.2 achieves best result", "5.158"), best("weight_decay 0.2")),
        Claim(
            "More weight decay is better",
            ("Higher weight decay improves performance",),
            trend("weight_decay", -1),
            tests=1,
        ),
    ),
    *about(
        "moe-ns-steps",
        "S4",
        Claim(
            "Three Newton-Schulz steps are as good as five", ("5.1913", "5.1867"), as_good("ns_steps 3", "ns_steps 5")
        ),
        Claim("Ten steps are no better than five", ("5.1893", "5.1867"), as_good("ns_steps 10", "ns_steps 5")),
        Claim(
            "Three steps are faster",
            ("15% faster", "40% computational savings", "~4% overhead"),
            step_time(-1, "ns_steps 3", "ns_steps 5"),
            tests=1,
        ),
        Claim("Ten steps are slower", ("10% slower",), step_time(1, "ns_steps 10", "ns_steps 5"), tests=1),
    ),
    *about(
        "moe-muon-on",
        "S4",
        Claim(
            "Muon for the matrices and AdamW for the rest is the best split",
            ("This is the configuration found to be optimal",),
            best("Muon on the blocks"),
        ),
    ),
    *about(
        "moe-muon-on",
        "S0",
        Claim(
            "Muon on every matrix is as good",
            ("for all 2D parameter updates",),
            as_good("Muon on every matrix", "Muon on the blocks"),
        ),
    ),
    *about(
        "moe-nesterov",
        "S4",
        Claim(
            "Nesterov momentum matters little",
            ("minimal benefit (0.35%)", "Not a critical hyperparameter"),
            as_good("without Nesterov", "with Nesterov"),
        ),
    ),
    *about(
        "moe-warmup",
        "S4",
        Claim("A warm-up of 5 % is best", ("Optimal warmup: 5%",), best("warmup 0.05")),
        Claim("Muon needs a warm-up", ("5.5834", "7.6% improvement"), higher("warmup 0", "warmup 0.05")),
        Claim("A warm-up of 20 % hurts", ("5.3842", "Too much warmup (20%)"), higher("warmup 0.2", "warmup 0.05")),
    ),
    *about(
        "moe-schedule",
        "S4",
        Claim("Cosine is best for Muon", ("Cosine decay works best",), best("cosine")),
        Claim("A constant rate is worse for Muon", ("5.2518", "2.4% worse"), higher("constant", "cosine")),
    ),
    *about(
        "moe-aux-ratio",
        "S4",
        Claim("A tenth of Muon's rate suits the rest", ("0.007 (10× lower)",), best("aux/Muon 1/10")),
    ),
    *about(
        "moe-clip",
        "S4",
        Claim(
            "Training needs clipping at 1",
            ("Max norm 1.0 (prevents divergence)",),
            higher("no clipping", "grad_clip 1"),
        ),
    ),
    *about("moe-min-lr", "S4", Claim("A last rate of a tenth is best", ("Min LR Ratio: 0.1",), best("min_lr 0.1"))),
    *about(
        "moe-adam",
        "S4",
        Claim("AdamW is better constant, without warm-up", ("5.5477", "5.7521"), lower(CONSTANT, ADAM_DEFAULT)),
        Claim("AdamW is better without warm-up", ("5.5887", "5.7521"), lower("no warm-up", ADAM_DEFAULT)),
        Claim(
            "Other weight decays do not help AdamW",
            ("Weight decay variations don't help",),
            no_better(ADAM_DEFAULT, "decay 0.05", "decay 0.2"),
        ),
        Claim("Linear decay is worse for AdamW", ("5.8106", "5.7521"), higher("linear", ADAM_DEFAULT)),
        Claim(
            "A constant rate suits AdamW and not Muon",
            ("Opposite behavior to Muon", "2.4% worse", "3.6% worse"),
            opposite("moe-schedule", ("constant", "cosine"), (CONSTANT, "no warm-up")),
            tests=1,
        ),
        Claim(
            "A start without warm-up suits AdamW and not Muon",
            ("requires warmup while Adam performs better without it", "7.5% worse", "2.9% worse"),
            opposite("moe-warmup", ("warmup 0", "warmup 0.05"), ("no warm-up", ADAM_DEFAULT)),
            tests=1,
        ),
    ),
    *about(
        "moe-long",
        "S4",
        Claim("The lead lasts", ("The advantage persists through convergence",), lower()),
        Claim(
            "Both optimizers keep the experts balanced",
            ("Both optimizers maintain balanced expert utilization",),
            experts_balanced,
            tests=2,
        ),
        Claim(
            "The experts are used alike under both", ("No significant differences observed",), alike_experts, tests=1
        ),
    ),
    *about(
        "moe-final",
        "S4",
        Claim("The best Muon beats the best AdamW", ("5.158", "5.548", "7.0% better"), lower()),
        Claim(
            "Muon is ahead after a fifth of the run",
            ("At 100 steps: Muon ~6.5, Adam ~7.2 (10% gap)",),
            versus(log_ratio_at(0.2), -1, PERCENT, method=LOG_RATIO),
            tests=1,
        ),
        Claim(
            "Muon is ahead after two fifths of the run",
            ("5.724", "6.726", "14.9% better"),
            versus(log_ratio_at(0.4), -1, PERCENT, method=LOG_RATIO),
            tests=1,
        ),
        Claim(
            "The lead is largest early",
            ("most pronounced in early training",),
            versus(lambda run: log_ratio_at(0.4)(run) - log_ratio_at(1.0)(run), -1, PERCENT, method=LOG_RATIO),
            tests=1,
        ),
        Claim(
            "AdamW plateaus late while Muon improves",
            ("Adam plateaus with constant LR",),
            versus(gains_after(0.6), 1, NATS, method="difference of differences"),
            tests=1,
        ),
        Claim(
            "Muon reaches an early loss sooner",
            ("2.8× faster", "~50 steps", "~150 steps"),
            until("tokens", 0.3),
            tests=1,
        ),
        Claim(
            "Muon reaches an early loss in less time",
            ("11.7 seconds", "32.4 seconds", "Overall wall-clock advantage in practice"),
            timed(until("train_seconds", 0.3)),
            tests=1,
        ),
        Claim("Muon's step takes longer", ("0.234 sec/step", "0.216 sec/step", "8.3%"), step_time(1), tests=1),
    ),
)

CLAIMS = DOCUMENT_CLAIMS + PAPER_CLAIMS


def judge_all(results: Mapping[str, Results]) -> list[tuple[Claim, Finding]]:
    """Every claim whose suite is among `results`, with its finding."""
    return [(claim, _finding(claim, results)) for claim in CLAIMS if claim.suite in results]


def _finding(claim: Claim, results: Mapping[str, Results]) -> Finding:
    own = results[claim.suite]
    try:
        found = claim.measure(Context(own, results))
    except Lacking as lacking:
        return lacking.finding
    if isinstance(found, Finding):
        return found
    return judge([found] if isinstance(found, Evidence) else found, own.family_size)
