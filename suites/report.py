"""Suites -> one page: the claims of the documents, then each suite with its tests, figures and fairness.

page = write_suite_report([Results.load(...), ...], later=[], scale="nano", out=Path("runs/experiments-nano/report"))
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from analysis import plots, plots_spectra
from analysis.pages import Page, Part, Picture, Table, Verse, html_page, markdown_page
from analysis.plots import optimizer_name
from analysis.stats import Contrast, p_words, summarize, unsteadiness
from engine import files
from engine.cli import BadInput, make_folder
from suites import plots as suite_plots
from suites.claims import CONFIRMED, NOT_CONFIRMED, Claim, Finding, judge_all
from suites.results import TOLERANCES, Outcome, Results

SCALE_WORDS = {"full": "at full size", "nano": "at nano scale, on models for two CPU cores"}


def number(value: float, form: str) -> str:
    return f"{value:{form}}" if math.isfinite(value) else "-"


def p_cell(value: float) -> str:
    return "-" if math.isnan(value) else p_words(value).removeprefix("p = ").removeprefix("p ")


def conditions_table(results: Results) -> Table:
    header = (
        "condition",
        "learning rate",
        "runs",
        "mean loss",
        "std. dev.",
        "95 % interval",
        "accuracy",
        "failed",
        "unsteadiness",
    )
    rows = []
    for outcome in results.outcomes:
        s = summarize(list(outcome.losses().values()))
        accuracy = outcome.values(lambda run: 100 * float(run.val["val_accuracy"][-1]))
        rough = outcome.values(unsteadiness)
        to_go = f" (+{outcome.to_go} to go)" if outcome.to_go else ""
        rows.append(
            (
                outcome.name,
                f"{outcome.condition.fields['lr']:g}",
                f"{s.n}{', single seed' if outcome.planned == 1 else ''}{to_go}",
                number(s.mean, ".4f"),
                number(s.deviation, ".4f"),
                f"{s.low:.4f} to {s.high:.4f}" if math.isfinite(s.low) else "-",
                f"{np.mean(list(accuracy.values())):.2f} %" if accuracy else "-",
                f"{outcome.failed} of {outcome.planned}",
                number(float(np.mean(list(rough.values()))) if rough else math.nan, ".3f"),
            )
        )
    return Table(header, rows)


def tests_table(tests: Sequence[Contrast]) -> Table:
    header = (
        "difference of final loss",
        "n",
        "nats",
        "corrected interval",
        "p paired",
        "p Welch",
        "p Holm",
        "Hedges' g",
    )
    rows = [
        (
            f"{test.a} - {test.b}",
            " and ".join(str(n) for n in dict.fromkeys(test.n)),
            number(test.difference, "+.4f"),
            f"{test.low:+.4f} to {test.high:+.4f}" if math.isfinite(test.low) else "no test",
            p_cell(test.p_paired),
            p_cell(test.p_welch),
            p_cell(test.p_holm),
            number(test.effect, "+.2f"),
        )
        for test in tests
    ]
    return Table(header, rows)


def findings(results: Results) -> list[str]:
    """The suite's question answered in sentences with the numbers in them."""
    if results.suite.varies == "lr":
        return [sentence for optimizer in results.optimizers() for sentence in rate_sentences(results, optimizer)]
    tests = results.tests()
    sentences = [test_sentence(test) for test in tests if test.excludes_zero]
    unclear = [test for test in tests if test.tested and not test.excludes_zero]
    for reference in dict.fromkeys(test.b for test in unclear):
        names = ", ".join(
            f"{test.a} ({test.difference:+.4f} nats, Holm {p_words(test.p_holm)})"
            for test in unclear
            if test.b == reference
        )
        sentences.append(f"Not told apart from {reference}: {names}.")
    for test in tests:
        if min(test.n) == 0:
            sentences.append(f"{test.a} - {test.b}: no finished run on one side.")
        elif not test.tested:
            sentences.append(f"{test.a} - {test.b}: {test.difference:+.4f} nats, single seed.")
    for optimizer in results.optimizers():
        best = results.best(optimizer)
        if best is not None and sum(o.optimizer == optimizer for o in results.outcomes) > 1:
            sentences.append(f"Least mean loss of {optimizer_name(optimizer)}: {best.name}, {best.loss:.4f}.")
    sentences += [reached_sentence(results, a, b) for a, b in results.crosses() if math.isfinite(b.loss)]
    return sentences


def test_sentence(test: Contrast) -> str:
    side = "lower" if test.difference < 0 else "higher"
    return (
        f"{test.a} ends {abs(test.difference):.4f} nats {side} than {test.b} (corrected interval {test.low:+.4f} to "
        f"{test.high:+.4f}, Holm {p_words(test.p_holm)}, g = {number(test.effect, '+.1f')})."
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
    edge = " It lies ON THE EDGE OF THE GRID: a better rate may lie outside." if results.on_edge(best) else ""
    rate = best.condition.fields["lr"]
    return [
        f"{optimizer_name(optimizer)}: best rate {rate:g} (loss {best.loss:.4f}{seeds}); {' and '.join(words)}.{edge}"
    ]


def reached_sentence(results: Results, a: Outcome, b: Outcome) -> str:
    found = results.reached(a, b)

    def said(side: str, outcome: Outcome) -> str:
        tokens, seconds = found[f"{side} tokens"], found[f"{side} train_seconds"]
        if tokens.median is None:
            budget = f"{outcome.runs[0].budget:,} tokens"
            return f"{outcome.name} does not get there in {tokens.never} of {tokens.n} runs of {budget}"
        never = f", {tokens.never} of {tokens.n} never" if tokens.never else ""
        within = "" if seconds.median is None else f" and {seconds.median:.1f} s"
        return f"{outcome.name} after {tokens.median:,.0f} tokens{within} (median{never})"

    return f"To {b.name}'s mean final loss of {b.loss:.4f}: {said('a', a)}; {said('b', b)}."


def figures(results: Results) -> list[tuple[Picture, Callable[[], Figure]]]:
    """The suite's figures, with how to read each."""
    finished = [run for outcome in results.outcomes for run in outcome.finished()]
    if not finished:
        return []
    found: list[tuple[Picture, Callable[[], Figure]]] = []

    def add(kind: str, title: str, how: str, draw: Callable[[], Figure]) -> None:
        stem = f"{results.name}_{kind}"
        found.append((Picture(stem, title, f"{results.name}: {title}", how), draw))

    crosses = results.crosses()
    if results.suite.varies == "lr":
        if plots.has_rates(finished):
            add(
                "rates",
                "Sensitivity to the learning rate",
                "The bars at the bottom of the first panel span the rates whose loss is at most 1 % (dark) and 5 % "
                "(light) above the best; between grid points the loss is taken as linear in the logarithm of the rate.",
                lambda: plots.learning_rate_sensitivity(results.runs()),
            )
        return found
    add(
        "bars",
        "Final loss of every condition",
        "Dots are runs, diamonds means, whiskers 95 % t-intervals, the dashed line the condition that the others are "
        "tested against. Bold names differ from it for sure: their corrected interval excludes zero.",
        lambda: suite_plots.condition_bars(results),
    )
    if results.suite.varies == "params":
        add(
            "sizes",
            "Scaling with model size",
            "Each optimizer at its own rate; mean over seeds with its 95 % interval.",
            lambda: plots.model_scaling(finished),
        )
    elif crosses:
        add(
            "curves",
            "Loss curves",
            "Mean over seeds; the band spans them. Left against tokens, right against time.",
            lambda: plots.loss_curves(finished),
        )
    if results.suite.varies != "params" and crosses and all(len(run.val["step"]) > 2 for run in finished):
        add(
            "time_to_loss",
            "How long to a loss",
            "Lower and further left is better. A thin line is a run; a thick one the median over runs, drawn while at "
            "least half of them reach that loss: runs that never do count as censored, not as missing.",
            lambda: suite_plots.time_to_loss(results, *crosses[-1]),
        )
    if results.suite.varies == "schedule":
        add(
            "schedules",
            "The schedules",
            "The rate that each update used; schedules count updates.",
            lambda: plots.learning_rate_schedules(finished),
        )
    if crosses and any(run.experts for run in finished):
        for outcome in crosses[-1]:
            add(
                f"experts_{outcome.optimizer}",
                f"Use of the experts under {optimizer_name(outcome.optimizer)}",
                "The share of tokens that each expert is given in the first seed's run; the line on the bar is an even "
                "share.",
                lambda outcome=outcome: plots.expert_utilization(outcome.finished()[0]),
            )
    watched = [run for run in finished if run.projections()]
    if crosses and watched:
        add(
            "alignment",
            "Alignment of updates and weights, with chance",
            "Output directions. The dotted line is the level of chance for this dimension; Muon's update has nearly "
            "equal singular values, so its top directions are nearly arbitrary.",
            lambda: plots_spectra.alignment_with_chance(watched),
        )
        add(
            "rank",
            "Effective rank over time",
            "Mean over layers and seeds, the band from the lowest to the highest layer; dotted, the value at "
            "initialisation, which depends on the shape alone.",
            lambda: plots_spectra.metric_over_time(watched, "effective_rank"),
        )
    return found


def suite_part(results: Results, known: Mapping[str, Results], pictures: Sequence[Picture]) -> Part:
    items: list[Table | Picture | Verse] = [
        Verse(f"{results.suite.question} ({results.suite.source})", findings(results) or ["No run has finished yet."]),
        conditions_table(results),
    ]
    if results.pairs():
        items.append(tests_table(results.tests()))
    if taken_up := results.settings_taken_up(known):
        items.append(Verse("Settings taken up from sweeps", taken_up))
    if fairness := results.fairness():
        items.append(Verse("Fairness", fairness))
    return Part(results.name, [*items, *pictures])


def claims_table(judged: Sequence[tuple[Claim, Finding]]) -> Table:
    header = ("document", "what it claimed", "its numbers", "we find", "our numbers", "suite")
    rows = [(c.source, c.says, c.theirs, f.verdict, f.numbers, c.suite) for c, f in judged]
    return Table(header, rows, whole=True)


NOTES = (
    "A verdict needs three finished seeds a side and an interval, corrected for all tests of its suite, without zero.",
    "Tests pair the runs of one seed, which share batches and initial weights; Welch's test stands beside. p values "
    "are corrected by Holm within a suite, intervals by Bonferroni so that all of a suite hold together.",
    "A learning rate's tolerance is the width in decades around the best rate within which the loss stays within 1 % "
    "or 5 % of the best, linear in the logarithm of the rate between grid points; 'at least': the grid ended first.",
    "Unsteadiness is the spread of the last tenth of the training losses about their line, in nats.",
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
    judged = [(claim, finding) for claim, finding in judge_all(known, scale) if claim.suite in shown]
    verdicts = [finding.verdict for _, finding in judged]
    confirmed, refuted = verdicts.count(CONFIRMED), verdicts.count(NOT_CONFIRMED)
    runs = {run.path: run for r in results for run in r.runs()}
    finished = sum(run.status == "finished" for run in runs.values())
    failed = {(r.name, o.name): o.failed for r in results for o in r.outcomes if o.failed}
    hours = sum(run.train_seconds for run in runs.values()) / 3600
    devices = sorted({str(run.config.get("device_name")) for run in runs.values()})
    commits = sorted({str(run.config.get("git_commit"))[:10] for run in runs.values()})
    to_go = sum(r.to_go for r in results)
    headline = (
        f"{len(judged)} claims put to the test {SCALE_WORDS[scale]}: {confirmed} confirmed, {refuted} not confirmed, "
        f"{len(judged) - confirmed - refuted} not testable here"
    )
    summary = Table(
        ("suite", "document", "question", "runs", "finding"),
        [
            (
                r.name,
                r.suite.source,
                r.suite.question,
                f"{r.finished()}/{r.planned}",
                (findings(r) or ["no run has finished yet"])[0],
            )
            for r in results
        ],
        whole=len(results) > 1,
    )
    warnings = [*later, *(f"{to_go} planned runs are to come." for _ in range(to_go > 0))]
    warnings += [f"{suite}, {condition}: {count} runs failed." for (suite, condition), count in failed.items()]
    parts = [Part("What the documents claimed, what we find", [claims_table(judged)])] if judged else []
    parts += [suite_part(r, known, pictures[r.name]) for r in results]
    made = [
        f"Runs: {finished} finished, {hours:.1f} hours of training in all on {', '.join(devices)}.",
        f"Commits: {', '.join(commits)}. Each run's config.json has its settings, versions and data fingerprint.",
        f"Again: python experiments.py run {results[0].name if len(results) == 1 else 'everything'} --scale {scale}",
    ]
    parts.append(Part("Provenance", [Verse("Where these numbers come from", made)]))
    return Page(
        title=f"muon-speedrun experiments, {scale}",
        headline=headline if judged else f"{results[0].name}: {results[0].suite.question}",
        lead=[*_verdict_lists(judged), f"Finished runs: {finished}, of {len(results)} suites."],
        tiles=[],
        summary=summary,
        notes=NOTES,
        warnings=warnings,
        parts=parts,
    )


def _verdict_lists(judged: Sequence[tuple[Claim, Finding]]) -> list[str]:
    """The claims that have a verdict, by it."""
    lines = []
    for verdict in (CONFIRMED, NOT_CONFIRMED):
        said = [
            f"{claim.says} ({claim.source}, {claim.suite})" for claim, finding in judged if finding.verdict == verdict
        ]
        if said:
            lines.append(f"{verdict.capitalize()}: {'; '.join(said)}.")
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
    drawn: dict[str, list[Picture]] = {}
    for r in results:
        drawn[r.name] = []
        for picture, draw in figures(r):
            plots.save(draw(), folder, picture.stem)
            drawn[r.name].append(picture)
    page = build_page(results, known, later, scale, drawn)
    for name, text in (("report.html", html_page(page, folder)), ("report.md", markdown_page(page))):
        files.write_whole(out / name, lambda file, text=text: file.write(text), mode="w")
    return out / "report.html"
