"""Suites -> one page: the claims of the documents, then each suite with its tests, figures and fairness.

page = write_suite_report([Results.load(...), ...], later=[], scale="nano", out=Path("runs/experiments-nano/report"))
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from analysis import plots, plots_settings, plots_spectra
from analysis.pages import Chapter, Page, Picture, Section, Table, counted, number, write_pages
from analysis.plots import Drawing, drawing
from analysis.runs import optimizer_name
from analysis.stats import Contrast, p_words, t_interval, unsteadiness
from engine.cli import BadInput, make_folder
from suites import documents
from suites import plots as suite_plots
from suites.claims import Claim, judge_all
from suites.judging import DECIDED, NOT_TESTABLE, UNDECIDED, Finding
from suites.results import TOLERANCES, Outcome, Results

SCALE_WORDS = {"full": "at full size", "nano": "at nano scale, on models for two CPU cores"}


def p_cell(value: float) -> str:
    return "-" if math.isnan(value) else p_words(value).removeprefix("p = ").removeprefix("p ")


def conditions_table(results: Results) -> Table:
    rows = []
    for outcome in results.outcomes:
        losses = list(outcome.losses().values())
        mean, low, high = t_interval(losses)
        accuracy = outcome.values(lambda run: 100 * float(run.val["val_accuracy"][-1]))
        rough = outcome.values(unsteadiness)
        to_go = f" (+{outcome.to_go} to go)" if outcome.to_go else ""
        row = {
            "condition": outcome.name,
            "learning rate": f"{outcome.condition.fields['lr']:g}",
            "runs": f"{len(losses)}{', single seed' if outcome.planned == 1 else ''}{to_go}",
            "mean loss": number(mean, ".4f"),
            "std. dev.": f"{np.std(losses, ddof=1):.4f}" if len(losses) > 1 else "-",
            "95 % interval": f"{low:.4f} to {high:.4f}" if math.isfinite(low) else "-",
            "accuracy": f"{np.mean(list(accuracy.values())):.2f} %" if accuracy else "-",
            "failed": f"{outcome.failed} of {outcome.planned}",
            "unsteadiness": number(float(np.mean(list(rough.values()))) if rough else math.nan, ".3f"),
        }
        rows.append(row)
    return Table.of(rows)


def tests_table(tests: Sequence[Contrast]) -> Table:
    rows = [
        {
            "difference of final loss": f"{test.name_a} - {test.name_b}",
            "n": " and ".join(str(n) for n in dict.fromkeys(test.n)),
            "nats": number(test.difference, "+.4f"),
            "corrected interval": f"{test.low:+.4f} to {test.high:+.4f}" if math.isfinite(test.low) else "no test",
            "p paired": p_cell(test.p_value if test.paired else math.nan),
            "p Welch": p_cell(test.p_welch),
            "p Holm": p_cell(test.p_holm),
            "Hedges' g": number(test.effect, "+.2f"),
        }
        for test in tests
    ]
    return Table.of(rows)


def findings(results: Results) -> list[str]:
    """The suite's question answered in sentences with the numbers in them."""
    if results.suite.varies == "lr":
        return [sentence for optimizer in results.optimizers() for sentence in rate_sentences(results, optimizer)]
    tests = results.tests()
    sentences = [test_sentence(test) for test in tests if test.excludes_zero]
    unclear = [test for test in tests if test.tested and not test.excludes_zero]
    for reference in dict.fromkeys(test.name_b for test in unclear):
        names = ", ".join(
            f"{test.name_a} ({test.difference:+.4f} nats, Holm {p_words(test.p_holm)})"
            for test in unclear
            if test.name_b == reference
        )
        sentences.append(f"Not significantly different from {reference}: {names}.")
    for test in tests:
        if min(test.n) == 0:
            sentences.append(f"{test.name_a} - {test.name_b}: no finished run on one side.")
        elif not test.tested:
            lone = test.name_a if test.n[0] < 2 else test.name_b
            reason = f"{lone} has a single seed" if min(test.n) < 2 else "no variation between seeds"
            sentences.append(f"{test.name_a} - {test.name_b}: {test.difference:+.4f} nats, {reason}.")
    for optimizer in results.optimizers():
        best = results.best(optimizer)
        if best is not None and sum(o.optimizer == optimizer for o in results.outcomes) > 1:
            sentences.append(f"Lowest mean loss of {optimizer_name(optimizer)}: {best.name}, {best.loss:.4f}.")
    sentences += [reached_sentence(results, a, b) for a, b in results.crosses() if math.isfinite(b.loss)]
    return sentences


def test_sentence(test: Contrast) -> str:
    side = "lower" if test.difference < 0 else "higher"
    return (
        f"{test.name_a} ends {abs(test.difference):.4f} nats {side} than {test.name_b} ({test.test}, "
        f"corrected interval {test.low:+.4f} to {test.high:+.4f}, Holm {p_words(test.p_holm)}, "
        f"g = {number(test.effect, '+.1f')})."
    )


def rate_sentences(results: Results, optimizer: str) -> list[str]:
    best, words = results.best(optimizer), []
    if best is None:
        return [f"{optimizer_name(optimizer)}: no rate has a final loss."]
    for share in TOLERANCES:
        tolerance = results.tolerance(optimizer, share)
        bound = "at least " if tolerance.open_low or tolerance.open_high else ""
        words.append(f"within {100 * share:g} % over {bound}{tolerance.decades:.2f} decades")
    seeds = ", single seed" if len(best.losses()) == 1 else ""
    edge = " It is ON THE EDGE OF THE GRID: a better rate may be outside." if results.on_edge(best) else ""
    rate = best.condition.fields["lr"]
    return [
        f"{optimizer_name(optimizer)}: best rate {rate:g} (loss {best.loss:.4f}{seeds}); {' and '.join(words)}.{edge}"
    ]


def reached_sentence(results: Results, a: Outcome, b: Outcome) -> str:
    found = results.reached(a, b)

    def time_of(side: str, outcome: Outcome) -> str:
        tokens, seconds = found[f"{side} tokens"], found[f"{side} train_seconds"]
        if tokens.median is None:
            budget = f"{outcome.runs[0].budget:,} tokens"
            return f"{outcome.name} does not reach it in {tokens.never} of {tokens.n} runs of {budget}"
        never = f", {tokens.never} of {tokens.n} never" if tokens.never else ""
        within = "" if seconds.median is None else f" and {seconds.median:.1f} s"
        return f"{outcome.name} after {tokens.median:,.0f} tokens{within} (median{never})"

    return f"Time to {b.name}'s mean final loss of {b.loss:.4f}: {time_of('a', a)}; {time_of('b', b)}."


def figures(results: Results) -> list[Drawing]:
    """The suite's figures, as far as there are runs for them."""
    finished = [run for outcome in results.outcomes for run in outcome.finished()]
    if not finished:
        return []
    fair = [run for outcome in results.outcomes if not outcome.as_written for run in outcome.finished()]

    def of_suite(kind: str, plot: Callable[..., Figure], *arguments: Any, about: str = "") -> Drawing:
        return drawing(plot, *arguments, stem=f"{results.name}_{kind}", about=about)

    if results.suite.varies == "lr":
        plot = plots_settings.learning_rate_sensitivity
        return [of_suite("rates", plot, results.runs())] if plots_settings.has_rates(finished) else []
    crosses, by_size = results.crosses(), results.suite.varies == "params"
    found = [of_suite("bars", suite_plots.condition_bars, results)]
    if by_size:
        found.append(of_suite("sizes", plots_settings.model_scaling, fair))
    elif crosses:
        found.append(of_suite("curves", plots.loss_curves, finished))
        if all(len(run.val["step"]) > 2 for run in finished):
            found.append(of_suite("time_to_loss", suite_plots.time_to_loss, results, *crosses[-1]))
    if results.suite.varies == "schedule":
        found.append(of_suite("schedules", plots.learning_rate_schedules, finished))
    if crosses and any(run.experts for run in finished):
        for outcome in crosses[-1]:
            about = f"{optimizer_name(outcome.optimizer)}, first seed"
            kind = f"experts_{outcome.optimizer}"
            found.append(of_suite(kind, plots.expert_utilization, outcome.finished()[0], about=about))
    watched = [run for run in fair if run.projections()]
    if crosses and watched:
        found.append(of_suite("alignment", plots_spectra.alignment_with_chance, watched))
        found.append(of_suite("rank", plots_spectra.metric_over_time, watched))
    return found


def suite_chapter(results: Results, known: Mapping[str, Results], pictures: Sequence[Picture]) -> Chapter:
    items: list[Table | Picture | Section] = [
        Section(
            f"{results.suite.question} ({results.suite.source})", findings(results) or ["No run has finished yet."]
        ),
        conditions_table(results),
    ]
    tests = results.tests()
    if tests and (results.suite.varies != "lr" or any(test.tested for test in tests)):
        items.append(tests_table(tests))
    if from_sweeps := results.settings_from_sweeps(known):
        items.append(Section("Settings taken from sweeps", from_sweeps))
    if fairness := results.fairness():
        items.append(Section("Fairness", fairness))
    if rows := documents.DEVIATIONS.get(results.suite.source):
        items.append(Table(("what", f"{results.suite.source} says", "its code ran", "here"), list(rows)))
    return Chapter(results.name, [*items, *pictures])


def claims_table(judged: Sequence[tuple[Claim, Finding]]) -> Table:
    header = ("document", "claim", "its words and figures", "finding", "our numbers", "test", "suite")
    rows = [
        (c.source, c.statement, "; ".join(c.quotes) or "-", f.verdict, f.numbers, f.test, c.suite) for c, f in judged
    ]
    return Table(header, rows, whole=True)


NOTES = (
    "A verdict needs three seeds a side and an interval, corrected for all tests of its suite. Confirmed: the whole "
    "interval is where the claim puts the number. Refuted: none of it is. Equivalent: two settings differ by less than "
    "1 % of the loss, shown by two one-sided tests. Otherwise a claim is undecided, and the row tells how many seeds "
    "would decide if the effect is as large as it looks.",
    "'Could show' is the smallest effect that the test finds with a probability of 80 % at this n and spread; for "
    "claims of equality, the narrowest margin that equal sides would hold.",
    "Runs that share a seed are paired: they share batches and initial weights. We report the paired t-test, and "
    "Welch's for reference and where seeds differ. p values are corrected by Holm within a suite, intervals by "
    "Bonferroni so that all of a suite hold together.",
    "A learning rate's tolerance is the width in decades around the best rate where the loss is within 1 % or 5 % of "
    "the best, linear in the logarithm of the rate between grid points; 'at least': the grid ended first.",
    "Unsteadiness is the spread of the last tenth of the training losses around their linear trend, in nats.",
)


def build_page(
    results: Sequence[Results],
    known: Mapping[str, Results],
    later: Sequence[str],
    scale: str,
    pictures: Mapping[str, Sequence[Picture]],
) -> Page:
    """`results` are shown; `known` are these and what they take settings from."""
    shown = {r.name for r in results}
    judged = [(claim, finding) for claim, finding in judge_all(known) if claim.suite in shown]
    verdicts = [finding.verdict for _, finding in judged]
    runs = {run.path: run for r in results for run in r.runs()}
    finished = sum(run.status == "finished" for run in runs.values())
    failed = {(r.name, o.name): o.failed for r in results for o in r.outcomes if o.failed}
    hours = sum(run.train_seconds for run in runs.values()) / 3600
    devices = sorted({str(run.config.get("device_name")) for run in runs.values()})
    commits = sorted({str(run.config.get("git_commit"))[:10] for run in runs.values()})
    to_go = sum(r.to_go for r in results)
    headline = f"{counted(len(judged), 'claim')} tested {SCALE_WORDS[scale]}: " + ", ".join(
        f"{verdicts.count(verdict)} {verdict}" for verdict in (*DECIDED, UNDECIDED, NOT_TESTABLE)
    )
    summary = Table.of(
        [
            {
                "suite": r.name,
                "document": r.suite.source,
                "question": r.suite.question,
                "runs": f"{r.finished()}/{r.planned}",
                "finding": (findings(r) or ["no run has finished yet"])[0],
            }
            for r in results
        ],
        whole=len(results) > 1,
    )
    warnings = [*later, *([f"{counted(to_go, 'planned run')} to go."] if to_go else [])]
    warnings += [
        f"{suite}, {condition}: {counted(count, 'run')} failed." for (suite, condition), count in failed.items()
    ]
    chapters = [Chapter("Claims of the documents and our findings", [claims_table(judged)])] if judged else []
    chapters += [suite_chapter(r, known, pictures[r.name]) for r in results]
    suite = results[0].name if len(results) == 1 else "everything"
    made = [
        f"Runs: {finished} finished, {hours:.1f} hours of training in all on {', '.join(devices)}.",
        f"Commits: {', '.join(commits)}. Each run's config.json has its settings, versions and data fingerprint.",
        f"To repeat: python experiments.py run {suite} --scale {scale}",
    ]
    chapters.append(Chapter("Provenance", [Section("Origin of these numbers", made)]))
    return Page(
        title=f"muon-speedrun experiments, {scale}",
        headline=headline if judged else f"{results[0].name}: {results[0].suite.question}",
        lead=[*_verdict_lists(judged), f"Finished runs: {finished}, in {counted(len(results), 'suite')}."],
        tiles=[],
        summary=summary,
        notes=NOTES,
        warnings=warnings,
        chapters=chapters,
    )


def _verdict_lists(judged: Sequence[tuple[Claim, Finding]]) -> list[str]:
    """The claims with a verdict: confirmed, refuted, equivalent."""
    lines = []
    for verdict in DECIDED:
        claims = [
            f"{claim.statement} ({claim.source}, {claim.suite})"
            for claim, finding in judged
            if finding.verdict == verdict
        ]
        if claims:
            lines.append(f"{verdict.capitalize()}: {'; '.join(claims)}.")
    return lines


def write_suite_report(
    results: Sequence[Results], known: Mapping[str, Results], later: Sequence[str], scale: str, out: Path
) -> Path:
    """report.html, report.md and plots/ in `out`; BadInput where there is nothing to report."""
    results = [r for r in results if r.finished()]
    if not results:
        raise BadInput(later[0] if later else "no run of this suite has finished yet: python experiments.py run")
    folder = out / "plots"
    make_folder(folder, exist_ok=True)
    drawn = {r.name: plots.save_all(figures(r), folder) for r in results}
    return write_pages(build_page(results, known, later, scale, drawn), out)
