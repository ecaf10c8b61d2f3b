"""The claims of S0 to S3, on dense models, each with its words or figures; quotes are verbatim.

A claim of the author's stored runs, which no document makes, says so.
"""

from suites.judging import Unit
from suites.measures import (
    POINTS,
    Claim,
    about,
    accuracy,
    accuracy_at,
    at_largest,
    higher,
    largest_breaks_down,
    lead_grows,
    lower,
    small_overhead,
    smoother,
    step_time,
    still_above,
    timed,
    unclear,
    until,
    versus,
)
from suites.rate_measures import (
    wider,
)
from suites.spectral_measures import (
    ENTROPY,
    above_chance,
    collapses,
    concentrated,
    conditioning_grows,
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

DENSE_CLAIMS: tuple[Claim, ...] = (
    *about(
        "speedrun-2m",
        "S0",
        Claim("Muon ends the 2M-token run lower", ("6.0748", "6.9147", "-0.84"), lower()),
        Claim("Muon predicts more tokens rightly", ("16.29%", "10.10%"), versus(accuracy, 1, POINTS), tests=1),
        Claim("AdamW is faster per step", ("~1m 54s", "~1m 01s", "faster per step"), step_time(1), tests=1),
        Claim(
            "Muon converges faster early: it reaches AdamW's loss of 30 % of the run in fewer tokens",
            ("significantly faster convergence rate in the early stages of training",),
            until("tokens", 0.3),
            tests=1,
        ),
        Claim(
            "AdamW needs more than twice the tokens for Muon's loss",
            ("a validation loss that AdamW likely wouldn't reach for several more million tokens",),
            still_above("baseline"),
            tests=1,
        ),
        Claim(
            "Sample efficiency makes up for the overhead: Muon reaches AdamW's loss in less time",
            ("more than makes up for the overhead",),
            timed(until("train_seconds", 1.0)),
            tests=1,
        ),
        Claim(
            "Most of AdamW's energy is in a few singular values: half of it in a tenth of them",
            ("most information is concentrated in a few singular values",),
            concentrated,
            tests=1,
        ),
        Claim(
            "AdamW's collapse is rapid",
            ("rapid collapse",),
            unclear("the document does not say how soon; the suite's page shows entropy over time"),
        ),
        Claim("Muon keeps spectral norms near one", ("near the unit circle",), norm_near_one, tests=1),
        Claim("AdamW's spectral norms blow up past Muon's", ("allows them to blow up",), norm_ratio(), tests=1),
        Claim(
            "AdamW's rank collapses by entropy, below its start and below Muon's",
            ("rank collapse", "preserves the diversity of the subspaces"),
            collapses,
            tests=1,
        ),
        Claim(
            "Muon's updates explore better",
            ('Muon\'s orthogonal updates are more "efficient" at exploring the manifold without causing degradation.',),
            unclear(
                "the document does not say what it counts as exploring; alignment with the weights has a row of S1"
            ),
        ),
    ),
    *about(
        "baseline",
        "S1",
        Claim("AdamW's spectral norms are a lot bigger: at least twice", ("a lot bigger",), norm_ratio(2), tests=1),
        Claim(
            "Muon preserves rank, by spectral entropy",
            ("maintaining high spectral entropy",),
            spectral("spectral_entropy", 1, ENTROPY),
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
        Claim(
            "Under Muon no direction dominates the updates, by their effective rank",
            ("prevents any single direction from dominating the weight updates",),
            spectral("update_effective_rank", 1, Unit(" directions", ".2f")),
            tests=1,
        ),
    ),
    *about(
        "baseline",
        "S3",
        Claim(
            "Muon's validation accuracy is consistent across seeds",
            ("39.76%", "39.83%"),
            steady(accuracy, "accuracy"),
            1,
        ),
        Claim(
            "Muon's validation loss varies little between seeds",
            ("3.3154", "3.3098", "high overall stability"),
            steady(lambda run: run.final_loss, "loss"),
            tests=1,
        ),
        Claim(
            "Muon's runs have identical spectral signatures",
            ("identical spectral structural signatures",),
            same_signature,
            tests=1,
        ),
        Claim(
            "Muon's updates of K align most in a band of layers, with every seed",
            ("high-alignment band in layers 12-16 for Key (K) projections is a robust feature across seeds",),
            key_band,
            tests=1,
        ),
        Claim(
            "Muon's entropy and rank stay flat over time",
            ("Entropy and Rank remain flat across time",),
            flat(entropy="entropy", effective_rank="effective rank"),
            tests=2,
        ),
        Claim(
            "Muon maintains the weights' conditioning, whatever the seed",
            ("maintain weight conditioning regardless of initialization",),
            unclear("the document gives no measure of conditioning; entropy and rank have a row"),
        ),
        Claim(
            "Muon's effects are deterministic with respect to architecture",
            ("Muon's effects are deterministic with respect to architecture",),
            unclear("the document does not say which effects; those of the seed have rows"),
        ),
        Claim("Muon's rank tiers are preserved", ("MLP > Q/O > K/V",), tiers, tests=2),
    ),
    # Of suites that retest papers: no document ran Muon without orthogonalisation, though three name it as the cause.
    *about(
        "muon-momentum",
        "S2",
        Claim(
            "Orthogonalisation is what helps: without it the momentum ends higher",
            ("**Gradient orthogonalization** = game changer",),
            higher("momentum, not orthogonalised", "Muon"),
        ),
    ),
    *about(
        "muon-momentum",
        "S4",
        Claim(
            "Orthogonalisation is Muon's advantage: without it the momentum ends higher",
            ("The fundamental advantage of Muon lies in its gradient orthogonalization",),
            higher("momentum, not orthogonalised", "Muon"),
        ),
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
        Claim(
            "AdamW is ahead at the smallest size",
            ("AdamW dominates small models", "79.4%", "78.4%", "-1.3%"),
            accuracy_at(0, -1),
            tests=1,
        ),
        Claim("Muon is ahead at the second size", ("95.0%", "96.3%", "+1.4%"), accuracy_at(1, 1), tests=1),
        Claim("Muon is ahead at the third size", ("91.7%", "96.1%", "+4.8%"), accuracy_at(2, 1), tests=1),
        Claim("Muon is ahead at the largest size", ("28.4%", "94.6%", "+233%"), accuracy_at(3, 1), tests=1),
        Claim(
            "The lead in loss grows with the model",
            ("Muon wins at scale", "+1.4%", "+4.8%", "+233%"),
            lead_grows,
            tests=1,
        ),
        Claim(
            "AdamW breaks down at the largest size: it loses half of its accuracy",
            ("fails catastrophically at scale", "AdamW crashes at 108M parameters"),
            largest_breaks_down,
            tests=1,
        ),
        Claim(
            "Muon's step takes at most 5 % longer",
            ("Only 4-5% compute overhead", "4% overhead"),
            small_overhead(0.05, at_largest),
            tests=1,
        ),
        Claim(
            "Gradients are worse conditioned as models grow: AdamW's have less stable rank for their size",
            ("**Gradient conditioning** becomes critical as models grow",),
            conditioning_grows,
            tests=1,
        ),
        Claim("Muon converges more smoothly at the largest size", ("Muon's smooth convergence",), smoother, tests=1),
        Claim(
            "The gain is worth the overhead: Muon reaches AdamW's loss in less time at the largest size",
            ("no-brainer",),
            timed(until("train_seconds", 1.0, at_largest)),
            tests=1,
        ),
        Claim(
            "Newton-Schulz prevents destructive interference",
            ("Newton-Schulz iteration prevents destructive interference",),
            unclear("the document does not say what interferes, nor how it would show"),
        ),
    ),
)
