"""Newton-Schulz on the banks of the nano and 88m models, on whatever device there is: make bench.

Refuses to time a wrong result: singular values are checked first.
"""

import pytest
import torch

from kernels.newton_schulz import orthogonalize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("shape", [(8, 128, 128), (8, 64, 128), (8, 512, 128), (4, 2048, 512)], ids=str)
def test_orthogonalize(benchmark, shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    s = torch.linalg.svdvals(orthogonalize(G).float())
    assert s.max() < 1.15
    assert s.quantile(0.1) > 0.8

    def run() -> None:
        orthogonalize(G)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
