"""Warns while a run trains when a weight matrix's spectral norm passes a level that prior work advises to watch.

    watch = NormWatch(folder.out.say); watch(lines_of_one_event)    # one line per event and level, each matrix once

Importing it does not import torch.
"""

from collections.abc import Callable, Sequence
from typing import Any

NORM_WARNING, NORM_ALARM = 4.0, 5.0  # "if spectral norms start to exceed 4.0-5.0 ..." (S0, recommendation 2)
ADVICE = {
    "muon": "prior work advises to adjust --lr or --momentum: try a lower --lr first",
    "adamw": "prior work gives such advice for Muon only: try a lower --lr or a larger --weight-decay",
}
ELSE = "prior work gives such advice for Muon only: try a lower --lr"  # for an optimizer of a file
MOST_NAMED = 6  # projections in one line


class NormWatch:
    """Tells `say` which matrices have passed a level for the first time. A matrix counts once for each level, and the
    matrices of one event share a line, so a run of any size prints a few lines."""

    def __init__(self, say: Callable[[str], None], optimizer: str = "muon") -> None:
        self.say, self.optimizer = say, optimizer
        self.passed: dict[float, set[tuple]] = {NORM_WARNING: set(), NORM_ALARM: set()}

    def __call__(self, lines: Sequence[dict[str, Any]]) -> None:
        """`lines` of one event, as manifold_stats.jsonl holds them."""
        norms = {(line["proj"], line["layer"], line.get("expert")): line["spectral_norm"] or 0.0 for line in lines}
        new = {}
        for level, known in self.passed.items():
            new[level] = {matrix for matrix, norm in norms.items() if norm > level} - known
            known |= new[level]
        first = not (self.passed[NORM_WARNING] - new[NORM_WARNING])
        new[NORM_WARNING] -= new[NORM_ALARM]  # the higher level says it
        for level, matrices in new.items():
            if matrices:
                top = max(matrices, key=norms.get)
                words = f"largest {norms[top]:.2f}, {_name(top)}"
                advice = f"; {ADVICE.get(self.optimizer, ELSE)}" if first else ""
                self.say(
                    f"step {lines[0]['step']}: spectral norm above {level:g} in {_listed(matrices)} ({words}){advice}"
                )
                first = False


def _name(matrix: tuple) -> str:
    proj, layer, expert = matrix
    return f"{proj} of layer {layer}" + (f", expert {expert}" if expert is not None else "")


def _listed(matrices: set[tuple]) -> str:
    """The layers of each projection: "q of layers 0, 2; up of layer 3"."""
    layers: dict[str, set[int]] = {}
    for proj, layer, _ in matrices:
        layers.setdefault(proj, set()).add(layer)
    words = [
        f"{proj} of layer{'s' * (len(found) > 1)} {', '.join(map(str, sorted(found)))}"
        for proj, found in sorted(layers.items())
    ]
    more = f"; and {len(words) - MOST_NAMED} other projections" if len(words) > MOST_NAMED else ""
    return "; ".join(words[:MOST_NAMED]) + more
