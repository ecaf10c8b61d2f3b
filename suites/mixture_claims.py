"""The claims of S4, on a mixture of experts, each with its words or figures; quotes are verbatim."""

from suites.measures import (
    LOG_RATIO,
    NATS,
    PERCENT,
    POINTS,
    Claim,
    about,
    accuracy,
    as_good,
    best,
    best_of,
    between,
    gains_after,
    higher,
    log_memory,
    log_ratio_at,
    lower,
    muon_and_adamw,
    named,
    no_better,
    none_diverges,
    opposite,
    prevents_divergence,
    small_overhead,
    step_time,
    timed,
    trend,
    unclear,
    until,
    versus,
)
from suites.rate_measures import (
    best_between,
    deviation_in,
    outside,
    range_ratio,
    rate_ratio,
    wider,
    wider_when_longer,
)
from suites.spectral_measures import (
    alike_experts,
    evener,
    experts_balanced,
)

SHORT_RATES = ("moe-lr-muon-short", "moe-lr-adam-short")
AS_IT_WROTE = ("muon as written", "adamw as written")  # of its schedules: cosine for Muon, constant for AdamW
ADAM_DEFAULT, CONSTANT = "cosine, warm-up 0.05, decay 0.1", "constant, no warm-up"

MIXTURE_CLAIMS: tuple[Claim, ...] = (
    *about(
        "moe-lr-muon",
        "S4",
        Claim(
            "Muon's best rate is 0.07",
            ("LR=0.07 confirmed as optimal at longer training", "5.1867"),
            best("muon lr 0.07"),
        ),
        Claim("Muon's best rate is 70 times AdamW's", ("70× higher",), rate_ratio("moe-lr-adam", 70.0), tests=1),
        Claim(
            "The range widens in longer runs",
            ("Wider tolerance range at 500 steps",),
            wider_when_longer("moe-lr-muon-short"),
            tests=1,
        ),
        Claim(
            "Rates from 0.01 to 0.1 are all reasonable, and 0.005 is decent",
            ("0.01-0.1 all reasonable", "Even 0.005 achieves decent results"),
            unclear("the document does not say which loss is reasonable or decent"),
        ),
        Claim(
            "Muon forgives poor choices and needs fewer trials",
            ("More forgiving to suboptimal choices", "Fewer iterations required to find good settings"),
            unclear("the document counts no trials; the fair fight does, on a dense model"),
        ),
        Claim(
            "No run of this document's suites diverges, under either optimizer",
            ("All experiments completed successfully without divergence",),
            none_diverges("S4"),
        ),
    ),
    # 200 steps of the document, the only length for which it has losses of AdamW at several rates.
    *about(
        "moe-lr-muon-short",
        "S4",
        Claim("Muon's best rate is 0.07", ("Optimal LR: **0.07** (loss: 5.7239)",), best("muon lr 0.07")),
        Claim(
            "Muon's best rate is between 0.05 and 0.09",
            ("Sweet spot: 0.05-0.09 range",),
            best_between(0.05, 0.09),
            tests=1,
        ),
        Claim(
            "Muon's loss degrades outside 0.03 to 0.1",
            ("Performance degrades sharply below 0.03 and above 0.1",),
            outside(0.03, 0.1, "muon lr 0.07"),
        ),
        Claim(
            "Muon's range of good rates is wider",
            ("dramatically wider workable range", "4.5× range", "2.86× range"),
            wider(0.05, *SHORT_RATES),
            tests=1,
        ),
        Claim(
            "Muon's range is 30 times as wide",
            ("Muon tolerates ~30× wider",),
            range_ratio("moe-lr-adam-short", 30),
            tests=1,
        ),
        Claim(
            "AdamW's losses deviate less inside its own workable range",
            ("Average 5.6% deviation across 0.02-0.09", "Average 3.3% deviation across 0.0007-0.002"),
            deviation_in((0.02, 0.09), (0.0007, 0.002), "moe-lr-adam-short"),
            tests=1,
        ),
    ),
    *about(
        "moe-lr-adam-short",
        "S4",
        Claim("AdamW's best rate is 0.001", ("Optimal LR: **0.001** (loss: 6.7262)",), best("adamw lr 0.001")),
        Claim(
            "AdamW's loss degrades outside 0.0007 to 0.002",
            ("Narrow sweet spot: 0.0007-0.002", "Performance degrades rapidly outside this range"),
            outside(0.0007, 0.002, "adamw lr 0.001"),
        ),
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
        Claim(
            "More weight decay lets the experts specialise",
            ("Higher regularization helps with MoE expert specialization",),
            unclear("the document does not say how it measures specialisation"),
        ),
    ),
    *about(
        "moe-ns-steps",
        "S4",
        Claim(
            "Three Newton-Schulz steps are as good as five", ("5.1913", "5.1867"), as_good("ns_steps 3", "ns_steps 5")
        ),
        Claim("Ten steps are no better than five", ("5.1893", "5.1867"), no_better("ns_steps 5", "ns_steps 10")),
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
            "Muon for all 2D parameters, as it advises, is as good as for the blocks",
            ("for all 2D parameter updates",),
            no_better("Muon on every matrix", "Muon on the blocks"),
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
        Claim(
            "Linear and step decay are between the two",
            ("Linear and step decay are intermediate",),
            between(("linear", "step"), "cosine", "constant"),
            tests=2,
        ),
    ),
    *about(
        "moe-aux-ratio",
        "S4",
        Claim(
            "Its choice for the rest, a tenth of Muon's rate, is as good as the best tried",
            ("0.007 (10× lower)",),
            no_better("aux/Muon 1/10", "aux/Muon 1/20", "aux/Muon 1/5", "aux/Muon 1"),
        ),
    ),
    *about(
        "moe-clip",
        "S4",
        Claim(
            "Clipping at 1 prevents divergence",
            ("Max norm 1.0 (prevents divergence)",),
            prevents_divergence("no clipping", "grad_clip 1"),
        ),
    ),
    *about(
        "moe-min-lr",
        "S4",
        Claim(
            "Its choice of the last rate, a tenth of the peak, is as good as the best tried",
            ("Min LR Ratio: 0.1",),
            no_better("min_lr 0.1", "min_lr 0.01", "min_lr 0.5"),
        ),
    ),
    *about(
        "moe-balance",
        "S4",
        Claim(
            "The load-balancing loss prevents collapse: without it shares are less even",
            ("load balancing loss effectively prevents collapse",),
            evener(("muon", "adamw"), ", no balancing"),
            tests=2,
        ),
    ),
    *about(
        "moe-adam",
        "S4",
        Claim("AdamW is better constant, without warm-up", ("5.5477", "5.7521"), lower(CONSTANT, ADAM_DEFAULT)),
        Claim("AdamW is better without warm-up", ("5.5887", "5.7521"), lower("no warm-up", ADAM_DEFAULT)),
        Claim(
            "AdamW is better with a warm-up of 10 % than of 5 %",
            ("5.7280", "5.7521"),
            lower("warm-up 0.1", ADAM_DEFAULT),
        ),
        Claim(
            "Other weight decays do not help AdamW",
            ("Weight decay variations don't help",),
            no_better(ADAM_DEFAULT, "decay 0.05", "decay 0.2"),
        ),
        Claim("Linear decay is worse for AdamW", ("5.8106", "5.7521"), higher("linear", ADAM_DEFAULT)),
        Claim(
            "A constant rate is the best of AdamW's schedules",
            ("**Constant LR is best for Adam!** (5.55 vs 5.75 with cosine)",),
            best_of(CONSTANT, ADAM_DEFAULT, "no warm-up", "linear"),
            tests=1,  # the first is a pair of the suite, the second is in the next row
        ),
        Claim(
            "A constant rate suits AdamW and not Muon",
            ("Opposite behavior to Muon", "2.4% worse", "3.6% worse"),
            opposite("moe-schedule", ("constant", "cosine"), (CONSTANT, "no warm-up")),
            tests=3,
        ),
        Claim(
            "A start without warm-up suits AdamW and not Muon",
            ("requires warmup while Adam performs better without it", "7.5% worse", "2.9% worse"),
            opposite("moe-warmup", ("warmup 0", "warmup 0.05"), ("no warm-up", ADAM_DEFAULT)),
            tests=2,
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
            "Both optimizers keep the routing stable",
            ("Demonstrates both optimizers maintain stable routing",),
            unclear("which experts a token goes to is not logged, only how many tokens each gets"),
        ),
        Claim(
            "The experts are used alike under both", ("No significant differences observed",), alike_experts, tests=1
        ),
    ),
    *about(
        "moe-final",
        "S4",
        Claim("Muon predicts more tokens rightly", ("0.2489", "0.2212"), versus(accuracy, 1, POINTS), tests=1),
        Claim(
            "AdamW is preferred where compute is scarce",
            ("Computational budget is extremely tight",),
            unclear("the document names no budget; the fair fight compares equal times, on a dense model"),
        ),
        Claim(
            "Trends are alike in shorter and longer runs",
            ("Trends at 200 vs 500 steps are consistent",),
            unclear("the document does not say which trends; rows on rates and on the lead compare lengths"),
        ),
        Claim("The best Muon beats the best AdamW", ("5.158", "5.548", "7.0% better"), lower()),
        Claim(
            "Muon is ahead after a fifth of the run",
            (
                "At 100 steps: Muon ~6.5, Adam ~7.2 (10% gap)",
                "consistent improvements are observed across multiple checkpoint evaluations",
            ),
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
            "The gap widens between a fifth and two fifths of the run",
            ("Gap widens slightly",),
            versus(lambda run: log_ratio_at(0.4)(run) - log_ratio_at(0.2)(run), -1, PERCENT, method=LOG_RATIO),
            tests=1,
        ),
        Claim(
            "The lead is larger after two fifths of the run than at its end",
            ("most pronounced in early training",),
            versus(lambda run: log_ratio_at(0.4)(run) - log_ratio_at(1.0)(run), -1, PERCENT, method=LOG_RATIO),
            tests=1,
        ),
        Claim(
            "AdamW plateaus late at a constant rate while Muon improves (as written)",
            ("Adam plateaus with constant LR",),
            named(
                "fall of the loss after 60 % of the run",
                versus(gains_after(0.6), 1, NATS, *AS_IT_WROTE, method="difference of differences"),
            ),
            tests=1,
        ),
        Claim(
            "Muon reaches an early loss sooner (5.8; here AdamW's after 30 % of its run)",
            ("To reach 5.8 validation loss", "~50 steps", "~150 steps"),
            until("tokens", 0.3),
            tests=1,
        ),
        Claim(
            "Muon reaches that loss in less time",
            ("2.8× faster", "11.7 seconds", "32.4 seconds", "Overall wall-clock advantage in practice"),
            timed(until("train_seconds", 0.3)),
            tests=1,
        ),
        Claim(
            "Muon's step takes at most 10 % longer",
            ("slightly higher per-step cost", "0.234 sec/step", "0.216 sec/step", "8.3%"),
            small_overhead(0.1, muon_and_adamw),
            tests=1,
        ),
        Claim(
            "Muon's memory is at most 10 % more",
            ("Memory overhead is modest",),
            small_overhead(0.1, muon_and_adamw, log_memory, "memory"),
            tests=1,
        ),
    ),
)
