"""Suites -> pages: the claims of the documents, the advice, and a page for each suite.

page = write_suite_report([Results.load(...), ...], later=[], scale="nano", out=Path("runs/experiments-nano/report"))

One suite makes one page. Several make report.html with the claims, advice.html, and <suite>.html for each; all share
the pictures in plots/, which no page holds itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from analysis import plots, plots_conditions
from analysis.pages import Chapter, Page, Picture, Section, Table, counted, number, write_pages
from analysis.plots import Drawing, drawing
from analysis.questions import answers
from analysis.runs import Run, optimizer_name
from analysis.stats import Contrast, p_words
from engine import files
from engine.cli import BadInput, make_folder
from suites import documents, fair_page, power_table
from suites.advice import HOLDS, NOT, OPEN, Advice, advice, effects, recipes
from suites.arms import ARMS
from suites.claims import Claim, judge_all
from suites.fair import TRIALS
from suites.fair_ways import unequal_words
from suites.figures import figures, routed, shared_name, watched
from suites.judging import DECIDED, NOT_TESTABLE, UNDECIDED, Finding
from suites.results import TOLERANCES, Outcome, Results
from suites.tables import conditions_table, experts_table, sizes_table, tests_table

SCALE_WORDS = {"full": "at full size", "nano": "at nano scale, on models for two CPU cores"}
ADVICE = "advice"  # the name of its page and of its figure


def findings(results: Results, known: Mapping[str, Results]) -> list[str]:
    """The suite's question answered in sentences with the numbers in them."""
    if results.name in fair_page.FINDINGS:
        return fair_page.FINDINGS[results.name](results, known)
    if results.suite.varies == "lr":
        return [sentence for arm in results.arms() for sentence in rate_sentences(results, arm)]
    tests = results.tests()
    sentences = [test_sentence(test) for test in tests if test.excludes_zero]
    unclear = [test for test in tests if test.tested and not test.excludes_zero]
    for reference in dict.fromkeys(test.name_b for test in unclear):
        names = ", ".join(
            f"{test.name_a} ({test.difference:+.4f} nats, Holm {p_words(test.p_holm)})"
            for test in unclear
            if test.name_b == reference
        )
        sentences.append(f"Not shown to differ from {reference}, as the corrected interval holds 0: {names}.")
    for test in tests:
        if min(test.n) == 0:
            sentences.append(f"{test.name_a} - {test.name_b}: no finished run on one side.")
        elif not test.tested:
            lone = test.name_a if test.n[0] < 2 else test.name_b
            reason = f"{lone} has a single seed" if min(test.n) < 2 else "no variation between seeds"
            sentences.append(f"{test.name_a} - {test.name_b}: {test.difference:+.4f} nats, {reason}.")
    for arm in results.arms():
        best = results.best(arm)
        if best is not None and len(results.of_arm(arm)) > 1:
            sentences.append(f"Lowest mean loss of {optimizer_name(arm)}: {best.name}, {best.loss:.4f}.")
    sentences += [reached_sentence(results, a, b) for a, b in results.crosses() if math.isfinite(b.loss)]
    return sentences


def test_sentence(test: Contrast) -> str:
    side = "lower" if test.difference < 0 else "higher"
    return (
        f"{test.name_a} ends {abs(test.difference):.4f} nats {side} than {test.name_b} ({test.test}, "
        f"corrected interval {test.low:+.4f} to {test.high:+.4f}, Holm {p_words(test.p_holm)}, "
        f"g = {number(test.effect, '+.1f')})."
    )


def rate_sentences(results: Results, arm: str) -> list[str]:
    best, words = results.best(arm), []
    if best is None:
        return [f"{optimizer_name(arm)}: no rate has a final loss."]
    for share in TOLERANCES:
        tolerance = results.tolerance(arm, share)
        bound = "at least " if tolerance.open_low or tolerance.open_high else ""
        words.append(f"within {100 * share:g} % over {bound}{tolerance.decades:.2f} decades")
    seeds = ", single seed" if len(best.losses()) == 1 else ""
    edge = " It is ON THE EDGE OF THE GRID: a better rate may be outside." if results.on_edge(best) else ""
    rate = best.condition.fields["lr"]
    return [f"{optimizer_name(arm)}: best rate {rate:g} (loss {best.loss:.4f}{seeds}); {' and '.join(words)}.{edge}"]


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


def claims_table(judged: Sequence[tuple[Claim, Finding]]) -> Table:
    header = ("source", "claim", "its words and figures", "finding", "our numbers", "test", "suite")
    rows = [
        (c.source, c.statement, "; ".join(c.quotes) or "-", f.verdict, f.numbers, f.test, c.suite) for c, f in judged
    ]
    return Table(header, rows, whole=True)


def suite_chapters(results: Results, known: Mapping[str, Results], pictures: Sequence[Picture]) -> list[Chapter]:
    """Everything about one suite: answer, tables, figures, spectra in sentences, fairness."""
    if results.name in fair_page.FINDINGS:
        return fair_page.chapters(results, known, pictures)
    title = f"{results.suite.question} ({results.suite.source})"
    numbers: list[Table | Section] = [
        Section(title, findings(results, known) or ["No run has finished yet."]),
        conditions_table(results),
    ]
    tests = results.tests()
    if tests and (results.suite.varies != "lr" or any(test.tested for test in tests)):
        numbers.append(tests_table(results))
    if results.suite.varies == "params" and (table := sizes_table(results)):
        numbers += [Section("Both optimizers side by side", []), table]
    if routed(results) and (table := experts_table(results)):
        numbers += [Section("Balance of the experts at the end, every seed", []), table]
    chapters = [Chapter(results.name, numbers), Chapter("Figures", list(pictures))]
    if runs := watched(results):
        title = f"Findings in the spectra{': ' * bool(shared_name(results))}{shared_name(results)}"
        chapters.append(Chapter(title, [Section(*reply) for reply in answers(runs)]))
    conditions: list[Table | Section] = []
    from_sweeps = results.settings_from_sweeps(known)
    if TRIALS in results.suite.needs and TRIALS in known and (edges := fair_page.on_edges(known[TRIALS])):
        from_sweeps.append(f"ON THE EDGE of the range of {TRIALS}, so a wider one may do better: {', '.join(edges)}.")
    if from_sweeps:
        conditions.append(Section("Settings taken from sweeps", from_sweeps))
    tuned = (lambda o: ARMS[o.optimizer].space) if TRIALS in results.suite.needs else (lambda o: ())
    if fairness := results.fairness(tuned):
        conditions.append(Section("Fairness", fairness))
    if rows := documents.DEVIATIONS.get(results.suite.source):
        conditions.append(Section("What the document says, and what runs here", []))
        conditions.append(Table(("what", f"{results.suite.source} says", "its code ran", "here"), list(rows)))
    chapters.append(Chapter("Conditions", conditions))
    return [chapter for chapter in chapters if chapter.items]


def advice_page(rows: Sequence[Advice], recipes: Sequence[str], scale: str, pictures: Sequence[Picture]) -> Page:
    """What to use at this scale, and where the documents' advice does not hold."""
    counts = {words: sum(row.holds == words for row in rows) for words in (HOLDS, NOT, OPEN)}
    table = Table.of(
        [
            {
                "setting": row.setting,
                "use": row.use,
                "evidence": row.evidence,
                "n": str(row.n),
                "the document": row.document,
                "its advice": f"{row.holds}{': ' * bool(row.reason)}{row.reason}",
                "suite": row.suite,
            }
            for row in rows
        ],
        whole=True,
    )
    failing = [f"{row.setting} ({row.document}: {row.reason})" for row in rows if row.holds == NOT]
    lead = [f"Does not hold here: {'; '.join(failing)}."] if failing else []
    return Page(
        title=f"muon-speedrun experiments, {scale}: advice",
        headline=f"What to use {SCALE_WORDS[scale]}: of {sum(counts.values())} pieces of advice in the documents and "
        f"their code {counts[HOLDS]} hold, {counts[NOT]} do not, {counts[OPEN]} are open",
        lead=[*lead, *recipes],
        tiles=[],
        summary=table,
        notes=ADVICE_NOTES,
        warnings=[],
        chapters=[Chapter("Every setting", list(pictures))] if pictures else [],
    )


PNG_DPI = 150  # 120 figures in a record: two thirds of the bytes at 200

NOTES = (
    "A verdict needs three seeds a side and an interval, corrected for all tests of its suite. Confirmed: the whole "
    "interval is where the claim's sentence puts the number, which is about a direction or a limit; the document's "
    "own figure stands beside it and is not what is confirmed. Refuted: none of it is. Equivalent: the interval holds "
    "zero, and two settings differ by less than 1 % of the loss, shown by two one-sided tests, as a 90 % interval "
    "inside that margin shows. Otherwise a claim is "
    "undecided, and the row tells how many seeds would decide if the effect is as large as it looks.",
    "Where a claim calls one of several settings the best, each other one is compared with it: confirmed if all are "
    "worse, refuted if one is better, equivalent if some are as good and the others worse. 'No better' is confirmed "
    "where one is better by less than 1 % of the loss, if at all. Divergence is counted, not tested.",
    "'Could show' is the smallest effect that the test finds with a probability of 80 % at this n and spread; for "
    "claims of equality, the narrowest margin that equal sides would hold.",
    "Runs that share a seed are paired: they share batches and initial weights. We report the paired t-test, and "
    "Welch's for reference and where seeds differ. Within a suite, p values of conditions are corrected by Holm, "
    "those of claims and all intervals by Bonferroni, so that they hold together.",
    "A learning rate's tolerance is the width in decades around the best rate where the loss is within 1 % or 5 % of "
    "the best, linear in the logarithm of the rate between grid points; 'at least': the grid ended first.",
    "Unsteadiness is the spread of the last tenth of the training losses around their linear trend, in nats.",
)


ADVICE_NOTES = (
    "'Use' is the condition with the lowest mean loss, or the range of rates within 1 % of the best loss. Conditions "
    "named behind it are as good within 1 %, shown by two one-sided tests: choose the cheapest of them.",
    "A document's advice holds if its choice has the lowest mean loss or is as good within 1 %; it does not hold if "
    "another ends lower and the interval, corrected for all tests of the suite, excludes zero; else it is open. A rate "
    "holds if it is shown to cost less than 1 % over the best rate of each seed, linear in the logarithm between the "
    "rates tried; it does not hold if it is shown to cost more.",
    "The best of several conditions looks better than it is: the choice favours luck. moe-final trains the choices on "
    "fresh seeds. A rate's interval is over seeds, each with the vertex of a parabola through its best rates.",
    "These are short runs of small models. What they say about larger ones is for the suites at full scale.",
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
    alone = len(results) == 1
    fair = alone and results[0].name in fair_page.FINDINGS
    told = list(known.values()) if fair else results  # the page of the fight shows its trials too
    runs = list({run.path: run for r in told for run in r.runs()}.values())
    headline = f"{counted(len(judged), 'claim')} tested {SCALE_WORDS[scale]}: " + ", ".join(
        f"{verdicts.count(verdict)} {verdict}" for verdict in (*DECIDED, UNDECIDED, NOT_TESTABLE)
    )
    warnings = [*later, *missing_words(results)]
    chapters = [Chapter("Claims and findings", [claims_table(judged)])] if judged else []
    if alone:
        warnings += busy_words(results[0])
        warnings += unequal_words(results[0]) if fair else []
        chapters += suite_chapters(results[0], known, pictures[results[0].name])
    suite = results[0].name if alone else results[0].suite.group
    flags = f" {fair_page.flags(results[0], known)}" if fair else ""
    made = [*origin_words(runs), f"To repeat: python experiments.py run {suite} --scale {scale}{flags}"]
    chapters.append(Chapter("Provenance", [Section("Origin of these numbers", made)]))
    return Page(
        title=f"muon-speedrun experiments, {scale}",
        headline=headline if judged else f"{results[0].name}: {results[0].suite.question}",
        lead=[
            *_verdict_lists(judged),
            f"Finished runs: {finished_of(runs)}, in {counted(len(told), 'suite')}; a run may belong to several "
            "conditions.",
            *size_words(runs),
        ],
        tiles=[],
        summary=summary_table(results, known),
        notes=(*fair_page.NOTES, NOTES[-1]) if fair else NOTES,
        warnings=warnings,
        chapters=chapters,
    )


def size_words(runs: Sequence[Run]) -> list[str]:
    """How large the models and runs are that a page's sentences are about."""

    def spread(key: str) -> str:
        values = sorted({run.config[key] for run in runs})
        return " to ".join(f"{value:,}" for value in dict.fromkeys((values[0], values[-1])))

    keys = ("params", "tokens", "steps", "vocab_size", "eval_tokens")
    if not runs or any(run.config.get(key) is None for run in runs for key in keys):
        return []
    return [
        f"Every sentence is about these runs alone: models of {spread('params')} parameters, {spread('tokens')} "
        f"training tokens in {spread('steps')} steps, a vocabulary of {spread('vocab_size')}, validation on "
        f"{spread('eval_tokens')} tokens, the same for every seed."
    ]


def summary_table(results: Sequence[Results], known: Mapping[str, Results]) -> Table:
    """A row for each suite, with its first finding."""
    rows = [
        {
            "suite": r.name,
            "source": r.suite.source,
            "question": r.suite.question,
            "runs": f"{r.finished()}/{r.planned}",
            "finding": (findings(r, known) or ["no run has finished yet"])[0],
        }
        for r in results
    ]
    return Table.of(rows, whole=len(results) > 1)


def missing_words(results: Sequence[Results]) -> list[str]:
    """A sentence on the runs to go, and one for each condition with failed runs."""
    to_go = sum(r.to_go for r in results)
    failed = {(r.name, o.name): o.lost if r.suite.one_seed else o.failed for r in results for o in r.outcomes}
    lines = [f"{counted(to_go, 'planned run')} to go."] if to_go else []
    return lines + [f"{suite}, {name}: {counted(n, 'run')} failed." for (suite, name), n in failed.items() if n]


def finished_of(runs: Sequence[Run]) -> int:
    return sum(run.status == "finished" for run in runs)


def origin_words(runs: Sequence[Run]) -> list[str]:
    """How many runs, their time, devices and commits."""
    hours = sum(run.train_seconds for run in runs) / 3600
    devices = sorted({str(run.config.get("device_name")) for run in runs})
    commits = sorted({str(run.config.get("git_commit"))[:10] for run in runs})
    return [
        f"Runs: {finished_of(runs)} finished, {hours:.1f} hours of training in all on {', '.join(devices)}.",
        f"Commits: {', '.join(commits)}. Each run's config.json has its settings, versions and data fingerprint.",
    ]


def busy_words(results: Results) -> list[str]:
    """The sentence on times that do not count, if there are any."""
    busy = [outcome for outcome in results.outcomes if outcome.busy]
    if not busy:
        return []
    worst = max(busy, key=lambda outcome: outcome.slowdown)
    return [
        f"Compare losses, not times: a step of {worst.name} took {worst.slowdown:.1f} times as long with one seed as "
        "with another, as next to other work."
    ]


def links(results: Sequence[Results]) -> list[tuple[str, str]]:
    """The pages of a report on several suites."""
    return [("Claims", "report"), ("Advice", ADVICE), *((r.name, r.name) for r in results)]


def suite_page(
    results: Results,
    known: Mapping[str, Results],
    judged: Sequence[tuple[Claim, Finding]],
    scale: str,
    pictures: Sequence[Picture],
) -> Page:
    """One suite of several."""
    chapters = suite_chapters(results, known, pictures)
    table, *rest = chapters[0].items[1:]
    lead = list(chapters[0].items[0].sentences)
    own = [pair for pair in judged if pair[0].suite == results.name]
    claims = [Chapter("Claims and findings", [claims_table(own)])] if own else []
    tests = [Chapter("Tests", rest)] if rest else []
    return Page(
        title=f"muon-speedrun experiments, {scale}: {results.name} ({results.suite.source})",
        headline=results.suite.question,
        lead=lead,
        tiles=[],
        summary=table,
        notes=NOTES if own else NOTES[2:],
        warnings=[
            *([f"{counted(results.to_go, 'planned run')} to go."] if results.to_go else []),
            *busy_words(results),
        ],
        chapters=[*claims, *tests, *chapters[1:]],
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
    """Write report.html, report.md, findings.json, power.json and plots/ to `out`, for several suites also the page of
    advice and one for each; returns the path of report.html. BadInput where there is nothing to report."""
    results = [r for r in results if r.finished()]
    if not results:
        raise BadInput(later[0] if later else "no run of this suite has finished yet: python experiments.py run")
    folder = out / "plots"
    make_folder(folder, exist_ok=True)
    for old in (*folder.glob("*.png"), *folder.glob("*.svg")):
        old.unlink()
    drawn = {r.name: plots.save_all(drawings(r, known), folder, ("png",), PNG_DPI) for r in results}
    if len(results) > 1:
        judged, everyone = judge_all(known), links(results)
        pages = {r.name: suite_page(r, known, judged, scale, drawn[r.name]) for r in results}
        if rows := advice(known):
            pictures = plots.save_all(_advice_figures(known), folder, ("png",), PNG_DPI)
            pages[ADVICE] = advice_page(rows, recipes(known), scale, pictures)
        else:
            everyone = [link for link in everyone if link[1] != ADVICE]
        for name, page in pages.items():
            write_pages(replace(page, links=everyone), out, name=name, linked=True)
    power_table.write(known, out / power_table.POWER)
    files.write_json(out / files.FINDINGS, {r.name: findings(r, known) for r in results})
    front = build_page(results, known, later, scale, drawn)
    return write_pages(replace(front, links=everyone) if len(results) > 1 else front, out, linked=True)


def drawings(results: Results, known: Mapping[str, Results]) -> list[Drawing]:
    fair = results.name in fair_page.FINDINGS
    return fair_page.drawings(results, known) if fair else figures(results)


def _advice_figures(known: Mapping[str, Results]) -> list[Drawing]:
    found = effects(known)
    return [drawing(plots_conditions.effects, found, stem=ADVICE)] if found else []
