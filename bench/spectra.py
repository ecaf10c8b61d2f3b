"""Times one spectra event, ours against float64 SVDs.

    python -m bench.spectra [--model 88m] [--json FILE]

Checks first: singular values above 1e-3 of the largest to 1e-5, leading subspaces by principal angles. Then times both
in turns on the same matrices, every projection's weight and update, and a whole event from snapshot to disk; medians.
"""

import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from bench.harness import JsonFlag, interleaved, write_figures
from engine import files
from engine.cli import AT_LEAST_1, check_limits, exit_with_a_sentence, one_of
from engine.ranks import Sharding
from kernels.newton_schulz import orthogonalize, reach
from metrics import SUBSPACE_RANK, Momenta, SpectraRecorder, decompose_bank
from model import SIZES, Transformer

SINGULAR_VALUE_TOLERANCE, ANGLE_TOLERANCE = 1e-5, 1e-4
STRONG = 1e-3  # of the largest singular value
SEPARATED = 1e-3  # of s_5: where s_5 - s_6 is less, the subspace is arbitrary and no two methods agree on it


@dataclass(frozen=True)
class Arguments(JsonFlag):
    """Time one spectra event on this machine's CPU."""

    model: Annotated[str, one_of(SIZES)] = "88m"
    """Named size."""
    repeats: Annotated[int, AT_LEAST_1] = 3
    """Events timed of each kind."""


def by_svd(bank: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The plain way: a full float64 decomposition of each matrix."""
    return [torch.linalg.svd(W.double(), full_matrices=False) for W in bank.flatten(0, -3)]


def check(bank: Tensor) -> int:
    """SystemExit where ours differs from the SVD; returns how many pairs of subspaces could be compared."""
    compared = 0
    ours = decompose_bank(bank)
    for i, (U, s, Vh) in enumerate(by_svd(bank)):
        strong = s > STRONG * s[0]
        error = ((ours.singular_values[i] - s).abs() / s)[strong].max().item()
        if not error <= SINGULAR_VALUE_TOLERANCE:
            sys.exit(f"matrix {i} of {tuple(bank.shape)}: singular values off by {error:.2g}, not timed")
        k = SUBSPACE_RANK
        if s[k - 1] - s[k] < SEPARATED * s[k - 1]:
            continue
        for found, exact in ((ours.left[i], U[:, :k]), (ours.right[i], Vh[:k].mT)):
            sines = torch.linalg.svdvals(exact - found @ (found.mT @ exact))
            if not sines.max() <= ANGLE_TOLERANCE:
                sys.exit(f"matrix {i} of {tuple(bank.shape)}: subspace off by {sines.max():.2g} rad, not timed")
        compared += 1
    return compared


@exit_with_a_sentence
def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    check_limits(a)
    torch.manual_seed(0)
    model = Transformer(SIZES[a.model], vocab_size=64)
    weights = [bank.parameter for bank in model.banks()]
    updates = [0.02 * orthogonalize(torch.randn_like(W)) for W in weights]  # Muon's: nearly flat spectra
    leading = [W.detach() + torch.randn(*W.shape[:-1], 5) @ torch.randn(*W.shape[:-2], 5, W.shape[-1]) for W in weights]
    subspaces = sum(check(bank.detach()[:2]) for bank in weights + updates + leading)
    with tempfile.TemporaryDirectory() as folder:
        recorder = SpectraRecorder(model, Path(folder) / files.SPECTRA)
        sharding = Sharding(model)
        for W in weights:
            W.grad = torch.randn_like(W)
        recorder.record(0, 0)
        recorder.flush()  # simulates levels of chance, once per process

        def whole_event(step: int) -> None:
            momenta = Momenta(sharding.bank_gradients(), reach("polar_express", 5))
            recorder.before_update(sharding.bank_gradients(), momenta=momenta)
            with torch.no_grad():
                for W, update in zip(weights, updates, strict=True):
                    W.add_(update)
            recorder.record(step, 0)
            recorder.flush()

        candidates = {
            "eigenproblems": lambda i: [decompose_bank(bank.detach()) for bank in weights + updates],
            "svd": lambda i: [by_svd(bank.detach()) for bank in weights + updates],
            "whole event": whole_event,
        }
        seconds = interleaved(candidates, torch.device("cpu"), a.repeats, warmup=0)
        recorder.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    speedup = medians["svd"] / medians["eigenproblems"]
    matrices = sum(bank.flatten(0, -3).shape[0] for bank in weights)
    print(f"{a.model}: {matrices} matrices, weight and update, float64, {torch.get_num_threads()} threads")
    print(f"equal to SVDs, with {subspaces} pairs of leading subspaces")
    for name, median in medians.items():
        print(f"{name:14} {median:7.2f} s   {min(seconds[name]):.2f} to {max(seconds[name]):.2f}")
    print(f"ratio          {speedup:7.2f}x")
    write_figures(a.json, {"model": a.model, "seconds": seconds, "speedup": speedup})
    return 0


if __name__ == "__main__":
    sys.exit(main())
