"""Measures every tile on this machine's GPU and prints its row for the table in kernels/configs.py.

    python -m bench.tune

About two minutes. Checks each candidate against float64 before it is timed; ties within 2 % keep the current tile.
"""

import statistics
import sys

import torch
import triton

from bench.harness import interleaved, require, this_device
from bench.newton_schulz import captured
from kernels import configs
from kernels.configs import Row, Tile
from kernels.matmul_add import launch_matmul_add
from kernels.symmetric import launch_symmetric_matmul

SYMMETRIC = [Tile(b, b, k, w, s) for b in (64, 128) for k in (32, 64) for w in (4, 8) for s in (2, 3, 4)]
FULL = [
    *(Tile(m, n, k, w, s) for m, n in ((64, 128), (128, 128)) for k in (32, 64) for w in (4, 8) for s in (2, 3, 4)),
    *(Tile(128, 256, 64, 8, s) for s in (2, 3)),
]
# For each field of a row: the shape to measure it on, and the candidates.
CASES = {
    "symmetric_small": ((44, 256, 256), SYMMETRIC),
    "symmetric": ((44, 512, 512), SYMMETRIC),
    "full_small": ((44, 128, 512), FULL),
    "full": ((44, 512, 2048), FULL),
    "roomy": ((44, 528, 528), [tile for tile in SYMMETRIC if tile.block_m == 128 and tile.num_warps == 8]),
}


def tune_field(field: str, current: Tile) -> Tile:
    """The fastest tile of a field on this GPU."""
    shape, tiles = CASES[field]
    A = torch.randn(shape[0], shape[1], shape[1], device="cuda", dtype=torch.float16) / shape[1] ** 0.5
    A = A + A.mT
    X = torch.randn(shape, device="cuda", dtype=torch.float16)
    symmetric = field not in ("full_small", "full")
    exact = A.double() @ (A if symmetric else X).double() + (A if symmetric else X).double()
    runs, choose = {}, configs._choose
    for tile in dict.fromkeys((current, *tiles)):

        def run(i: int, tile: Tile = tile) -> torch.Tensor:
            configs._choose = lambda *a: (tile, configs._overhangs(tile, *a[3:6]))
            if symmetric:
                return launch_symmetric_matmul(A, A, A, 1.0, 1.0)
            return launch_matmul_add(A, X, X, 1.0)

        try:
            product = run(0)
        except triton.runtime.errors.OutOfResources:
            continue
        require(f"{field} {tile}", product, exact, allowed=2e-3)
        replay = captured(lambda run=run: run(0))
        runs[str(tile)] = lambda i, replay=replay: replay()
    medians = {name: statistics.median(times) for name, times in interleaved(runs, this_device(), 50).items()}
    configs._choose = choose
    best = min(medians, key=medians.get)
    for name, seconds in sorted(medians.items(), key=lambda item: item[1])[:5]:
        print(f"{field:16} {name:75} {1e6 * seconds:8.1f} us", flush=True)
    if str(current) in medians and medians[str(current)] < 1.02 * medians[best]:
        return current
    return next(tile for tile in tiles if str(tile) == best)


def main() -> int:
    if not torch.cuda.is_available():
        print("error: bench.tune needs a GPU, and this machine has none", file=sys.stderr)
        return 2
    capability = torch.cuda.get_device_capability()
    old = configs.row(capability)
    tuned = {field: tune_field(field, getattr(old, field)) for field in CASES}
    row: Row = old._replace(**tuned)
    print(f"    {capability}: {row},  # measured on {torch.cuda.get_device_name()}, torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
