"""Times the feed-forward layer of a mixture of experts: grouped products against a loop over the experts.

    python -m bench.experts [--model moe-79m] [--json FILE]

Forward and backward of one layer on 16,384 random tokens (a CPU: 1,024) from a random router. Compares outputs and
gradients first, then times both in turns; medians. The loop is what one would write: select, multiply, add back.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from torch import Tensor

from bench.harness import (
    JsonFlag,
    interleaved,
    require,
    this_device,
    write_figures,
)
from engine.cli import AT_LEAST_1, check_limits, exit_with_a_sentence, one_of
from kernels.grouped_matmul import Routing, grouped_matmul
from model import ACTIVATIONS, SIZES

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Arguments(JsonFlag):
    """Time one layer of experts."""

    model: Annotated[str, one_of([size for size, config in SIZES.items() if config.experts])] | None = None
    """Named size with experts (default: moe-79m; on a CPU moe-nano)."""
    repeats: Annotated[int, AT_LEAST_1] = 20
    """Timed rounds."""


def grouped(x: Tensor, up: Tensor, down: Tensor, experts: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """As model.py does it: tokens sorted by expert, one product for all."""
    routing = Routing(experts, len(up))
    hidden = act(grouped_matmul(routing.send(x), up.mT, routing.offsets))
    return routing.collect(grouped_matmul(hidden, down, routing.offsets)).sum(1)


def loop(x: Tensor, up: Tensor, down: Tensor, experts: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """An expert at a time; the host waits for each one's tokens."""
    out = torch.zeros_like(x)
    for e in range(len(up)):
        rows = (experts == e).any(1).nonzero().squeeze(1)
        out = out.index_add(0, rows, act(x[rows] @ up[e].mT) @ down[e])
    return out


@exit_with_a_sentence
def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    check_limits(a)
    device = this_device()
    cuda = device.type == "cuda"
    name = a.model or ("moe-79m" if cuda else "moe-nano")
    c, dtype = SIZES[name], torch.bfloat16 if cuda else torch.float32
    torch.manual_seed(0)
    tokens = 16_384 if cuda else 1024
    x = torch.randn(tokens, c.d_model, device=device, dtype=dtype)
    up, down = (0.02 * torch.randn(c.experts, c.d_ff, c.d_model, device=device, dtype=dtype) for _ in range(2))
    experts = torch.rand(tokens, c.experts, device=device).topk(c.top_k).indices
    leaves = [leaf.requires_grad_() for leaf in (x, up, down)]
    act = ACTIVATIONS[c.ffn]

    def both_ways(layer: Callable[..., Tensor]) -> list[Tensor]:
        out = layer(*leaves, experts, act)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]

    for what, ours, exact in zip(("output", "dx", "dup", "ddown"), both_ways(grouped), both_ways(loop), strict=True):
        require(f"grouped products: {what}", ours, exact, TOLERANCE[dtype], "the loop's")
    candidates = {"grouped": lambda i: both_ways(grouped), "loop": lambda i: both_ways(loop)}
    seconds = interleaved(candidates, device, a.repeats)
    median = {which: 1e6 * statistics.median(values) for which, values in seconds.items()}
    print(f"{name}, {tokens:,} tokens, forward and backward of one layer, {str(dtype).removeprefix('torch.')}")
    print(f"grouped {median['grouped']:10.1f} us   loop {median['loop']:10.1f} us")
    print(f"ratio   {median['loop'] / median['grouped']:10.2f}x")
    write_figures(a.json, {"model": name, "tokens": tokens, "median_us": median})
    return 0


if __name__ == "__main__":
    sys.exit(main())
