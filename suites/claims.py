"""Every claim of the documents and of papers, and what the runs say about it.

    for claim, finding in judge_all(results_by_suite): print(claim.statement, finding.verdict, finding.numbers)

S0 to S4 are the documents.
"""

from collections.abc import Mapping

from suites.dense_claims import DENSE_CLAIMS
from suites.judging import Context, Evidence, Finding, Lacking, judge
from suites.measures import Claim
from suites.mixture_claims import MIXTURE_CLAIMS
from suites.paper_claims import PAPER_CLAIMS
from suites.results import Results

DOCUMENT_CLAIMS = DENSE_CLAIMS + MIXTURE_CLAIMS
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
