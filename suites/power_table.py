"""What each claim's runs can show, before they are trained: from the spread over seeds seen so far.

    write(judged_results, out / POWER); for line in table(planner): print(line)

A report writes power.json: for each claim the smallest effect that its test finds with a probability of 80 %, by number
of seeds. A plan reads it from its own folder, or at nano scale from the published runs.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis.stats import REGRESSION, SIGNIFICANT, WELCH
from engine import files
from suites.claims import CLAIMS, Claim
from suites.judging import FEWEST_SEEDS, NOT_TESTABLE, Context, Evidence, Finding, Lacking, Spread
from suites.planner import Planner
from suites.results import Results

POWER = "power.json"
NOT_SEEN = "no spread seen yet"
PUBLISHED = files.ROOT / "runs" / "records" / "nano-suites" / POWER
SEEDS = range(FEWEST_SEEDS, 13)


def with_seeds(evidence: Evidence, n: int) -> Evidence:
    """The same spread between seeds with another number of them."""
    test = evidence.test
    if isinstance(test, Spread):
        return replace(evidence, test=replace(test, freedom=n - 1.0, n=(n, n)))
    before, after, freedom = min(test.n), n, n - 1.0
    if test.test == WELCH:
        freedom = 2.0 * (n - 1)
    elif test.test == REGRESSION:  # counts the runs of both optimizers, each with a mean of its own
        after, freedom = 2 * n, 2.0 * n - 3
    error = test.error * math.sqrt(before / after)
    return replace(evidence, test=replace(test, error=error, freedom=freedom, n=(after, after)))


def claim_power(claim: Claim, results: Mapping[str, Results]) -> dict[str, Any]:
    """What was seen, with how many seeds, and what each number of seeds could show; for a claim of several parts the
    part that is hardest to show."""
    own = results[claim.suite]
    try:
        found = claim.measure(Context(own, results))
    except Lacking as lacking:
        return {"reason": NOT_SEEN, "because": lacking.finding.numbers}
    if isinstance(found, Finding):
        reason = (
            "needs a GPU" if "GPU" in found.numbers else "not tested" if found.verdict == NOT_TESTABLE else NOT_SEEN
        )
        return {"reason": reason, "because": found.numbers}
    parts = [found] if isinstance(found, Evidence) else list(found)
    parts = [p for p in parts if min(p.test.n) > 1 and (isinstance(p.test, Spread) or p.test.error > 0)]
    if not parts:
        return {"reason": NOT_SEEN}
    hardest = max(parts, key=lambda part: part.could_show(SIGNIFICANT / own.family_size))
    alpha = SIGNIFICANT / own.family_size
    could = {}
    for n in SEEDS:
        value = with_seeds(hardest, n).could_show(alpha)
        if math.isfinite(value):
            could[str(n)] = hardest.show(value) if hardest.expected else f"equal to {hardest.show(value)}"
    return {"seen": hardest.show(hardest.test.difference + hardest.against), "n": min(hardest.test.n), "could": could}


def key(claim: Claim) -> str:
    return f"{claim.suite}: {claim.statement}"


def write(results: Mapping[str, Results], path: Path) -> None:
    """power.json of every claim whose suite is among `results`; where there is none, the file stays as it is."""
    contents = {key(claim): claim_power(claim, results) for claim in CLAIMS if claim.suite in results}
    if contents:
        files.write_json(path, contents)


def _shown(folder: Path) -> Path:
    return folder.relative_to(files.ROOT) if folder.is_relative_to(files.ROOT) else folder


def table(planner: Planner) -> list[str]:
    """Lines for the claims of the chosen suites: n, what was seen, and what n could show."""
    own = planner.chosen.folder / "report" / POWER
    source = own if own.exists() else PUBLISHED if planner.chosen.scale == "nano" and PUBLISHED.exists() else None
    if source is None:
        return ["no spread between seeds was seen yet, so nothing is known about what the claims' runs can show"]
    known = json.loads(source.read_text(encoding="utf-8"))
    chosen = planner.chosen.suites()
    lines = [
        f"What the seeds can show with a probability of 80 %, from the spread in {_shown(source.parent)}",
        f"{'suite':18} {'n':>2}  {'could show':22} {'seen':22} claim",
    ]
    for claim in CLAIMS:
        if claim.suite in chosen:
            n = len(planner.seeds(claim.suite))
            entry = known.get(key(claim), {"reason": "new"})
            could = entry.get("could", {}).get(str(n))
            if n < FEWEST_SEEDS:
                could = "no verdict below 3"
            seen = f"{entry['seen']} (n = {entry['n']})" if "seen" in entry else ""
            lines.append(f"{claim.suite:18} {n:2}  {could or entry.get('reason', '-'):22} {seen:22} {claim.statement}")
    return lines
