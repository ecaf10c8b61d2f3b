"""All suites: those of the five documents, those that retest papers (suites/papers.py), and ours (suites/fair.py).

conditions = SUITES["moe-momentum"].plan(SCALES["nano"], winners)
"""

from suites import dense, fair, mixture, papers  # noqa: F401  each registers its suites
from suites.suite import SUITES


def with_needs(names: list[str]) -> list[list[str]]:
    """The suites and all that they need, in stages: a stage needs only suites of earlier stages."""
    wanted: set[str] = set()

    def visit(name: str) -> None:
        wanted.add(name)
        for needed in SUITES[name].needs:
            visit(needed)

    for name in names:
        visit(name)
    stages: list[list[str]] = []
    while left := [name for name in SUITES if name in wanted and not any(name in stage for stage in stages)]:
        ready = {name for stage in stages for name in stage}
        stages.append([name for name in left if set(SUITES[name].needs) <= ready])
    return stages
