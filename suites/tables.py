"""The tables of a suite's page: its conditions, the tests between them, sizes side by side, the experts' balance.

    conditions_table(results); tests_table(results)

Losses in nats; relative differences in per cent of the other side; a step's time is a run's median, averaged over runs.
"""

import math
from collections.abc import Callable

import numpy as np

from analysis.pages import Table, number
from analysis.plots import expert_shares
from analysis.runs import Run, bits_per_nat, optimizer_name
from analysis.stats import balance, hedges_g, p_words, t_interval, unsteadiness
from suites.results import Outcome, Results


def p_cell(value: float) -> str:
    return "-" if math.isnan(value) else p_words(value).removeprefix("p = ").removeprefix("p ")


def accuracy(run: Run) -> float:
    return 100 * float(run.val["val_accuracy"][-1])


def mean_of(outcome: Outcome, value_of: Callable[[Run], float]) -> float:
    values = list(outcome.values(value_of).values())
    return float(np.mean(values)) if values else math.nan


def last_train_loss(run: Run) -> float:
    return float(run.train["train_loss"][-1]) if run.train else math.nan


def best_loss(run: Run) -> float:
    """Of the validations after the first step."""
    losses = run.val["val_loss"][1:]
    return float(np.nanmin(losses)) if np.isfinite(losses).any() else math.nan


def conditions_table(results: Results) -> Table:
    rows, bits = [], bits_per_nat(results.runs())
    for outcome in results.outcomes:
        losses = list(outcome.losses().values())
        mean, low, high = t_interval(losses)
        to_go = f" (+{outcome.to_go} to go)" if outcome.to_go else ""
        row = {
            "condition": outcome.name,
            "learning rate": f"{outcome.condition.fields['lr']:g}",
            "runs": f"{len(losses)}{', single seed' if outcome.planned == 1 else ''}{to_go}",
            "train loss": number(mean_of(outcome, last_train_loss), ".4f"),
            "best val. loss": number(mean_of(outcome, best_loss), ".4f"),
            "final val. loss": number(mean, ".4f"),
            "95 % interval": f"{low:.4f} to {high:.4f}" if math.isfinite(low) else "-",
            "bits/byte": number(mean * bits, ".4f"),
            "std. dev.": f"{np.std(losses, ddof=1):.4f}" if len(losses) > 1 else "-",
            "accuracy": number(mean_of(outcome, accuracy), ".2f", " %"),
            "unsteadiness": number(mean_of(outcome, unsteadiness), ".3f"),
            "ms/step": number(mean_of(outcome, lambda run: run.step_ms), ",.1f"),
            "s/run": number(mean_of(outcome, lambda run: run.train_seconds), ",.1f"),
            "failed": f"{outcome.failed} of {outcome.planned}",
        }
        rows.append(row)
    return Table.of(rows)


def tests_table(results: Results) -> Table:
    """Every pair of the suite: final losses, and accuracies and step times as differences without a test."""
    rows, bits = [], bits_per_nat(results.runs())
    for test, (a, b) in zip(results.tests(), results.pairs(), strict=True):
        level = mean_of(b, lambda run: run.final_loss)
        row = {
            "difference of final loss": f"{test.name_a} - {test.name_b}",
            "n": " and ".join(str(n) for n in dict.fromkeys(test.n)),
            "nats": number(test.difference, "+.4f"),
            "bits/byte": number(test.difference * bits, "+.4f"),
            "relative": number(100 * test.difference / level, "+.2f", " %"),
            "corrected interval": f"{test.low:+.4f} to {test.high:+.4f}" if math.isfinite(test.low) else "no test",
            "p paired": p_cell(test.p_value if test.paired else math.nan),
            "p Welch": p_cell(test.p_welch),
            "p Holm": p_cell(test.p_holm),
            "Hedges' g": number(test.effect, "+.2f"),
            "accuracy": number(mean_of(a, accuracy) - mean_of(b, accuracy), "+.2f", " points"),
            "time per step": number(_slower(a, b), "+.1f", " %"),
        }
        rows.append(row)
    return Table.of(rows)


def _slower(a: Outcome, b: Outcome) -> float:
    """How much longer a's step takes than b's, in per cent; NaN where a busy machine made them."""
    mine, other = (mean_of(outcome, lambda run: run.step_ms) for outcome in (a, b))
    return 100 * (mine / other - 1) if a.steady and b.steady else math.nan


def sizes_table(results: Results) -> Table | None:
    """S2's table: both optimizers side by side at each size, fair and as written; None where no size has both."""
    rows, bits = [], bits_per_nat(results.runs())
    for a, b in results.pairs():
        if a.optimizer == b.optimizer or not (a.finished() and b.finished()):
            continue
        accuracies, losses = ([mean_of(o, value_of) for o in (a, b)] for value_of in (accuracy, lambda r: r.final_loss))
        rows.append(
            {
                "size": a.name.removeprefix(f"{a.optimizer} "),
                "parameters": f"{a.finished()[0].config['params']:,}",
                "tokens": f"{a.finished()[0].budget:,}",
                **{
                    f"{optimizer_name(o.optimizer)} accuracy": number(value, ".2f", " %")
                    for o, value in zip((b, a), reversed(accuracies), strict=True)
                },
                "improvement": number(100 * (accuracies[0] / accuracies[1] - 1), "+.1f", " %"),
                **{
                    f"{optimizer_name(o.optimizer)} loss": number(value, ".4f")
                    for o, value in zip((b, a), reversed(losses), strict=True)
                },
                **{
                    f"{optimizer_name(o.optimizer)} bits/byte": number(value * bits, ".4f")
                    for o, value in zip((b, a), reversed(losses), strict=True)
                },
                "relative loss": number(100 * (losses[0] / losses[1] - 1), "+.2f", " %"),
                "Hedges' g": number(hedges_g(list(a.losses().values()), list(b.losses().values())), "+.2f"),
                "seeds": f"{len(a.losses())} and {len(b.losses())}",
            }
        )
    return Table.of(rows) if rows else None


def experts_table(results: Results) -> Table | None:
    """The balance at the end of every run with experts, layer by layer; None where there is none."""
    rows = []
    for outcome in results.outcomes:
        for run in outcome.finished():
            layers = sorted({line["layer"] for line in run.experts})
            last = [balance(expert_shares(run, layer)[1][:, -1]) for layer in layers]
            if last:
                row = {
                    "condition": outcome.name,
                    "seed": str(run.config["seed"]),
                    "evenness by layer": ", ".join(f"{one.evenness:.3f}" for one in last),
                    "max / mean by layer": ", ".join(f"{one.max_over_mean:.2f}" for one in last),
                    "dead experts": str(sum(one.dead for one in last)),
                    "final val. loss": number(run.final_loss, ".4f"),
                }
                rows.append(row)
    return Table.of(rows) if rows else None
