"""What the GPUs that people train on can do at best, and what a training step needs of them.

    device = find(torch.cuda.get_device_name()); seconds = light_seconds(model, optimizers, tokens, seq_len, device)

Vendor data sheets; a device that is not in the table has no MFU and no speed of light, rather than a wrong one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model import Transformer
from optim import step_cost


@dataclass(frozen=True)
class Device:
    """Dense bf16 FLOP/s with fp32 accumulation, without sparsity, and memory bytes/s."""

    bf16_flops: float
    bytes_per_second: float


DEVICES = {
    "NVIDIA GeForce RTX 3090": Device(71.2e12, 936e9),
    "NVIDIA GeForce RTX 4090": Device(165.2e12, 1008e9),
    "NVIDIA GeForce RTX 5090": Device(209.5e12, 1792e9),
    "NVIDIA L40S": Device(362e12, 864e9),
    "NVIDIA A100-SXM4-40GB": Device(312e12, 1555e9),
    "NVIDIA A100-SXM4-80GB": Device(312e12, 2039e9),
    "NVIDIA H100 80GB HBM3": Device(989e12, 3350e9),
    "NVIDIA H200": Device(989e12, 4800e9),
}


def find(name: str) -> Device | None:
    """The device of this name, as torch.cuda.get_device_name() gives it."""
    return DEVICES.get(name)


def light_seconds(
    model: Transformer,
    optimizers: Sequence[torch.optim.Optimizer],
    tokens: int,
    seq_len: int,
    device: Device,
    ranks: int = 1,
) -> float:
    """The least time one update of `tokens` can take: its matmuls at the peak, then the optimizers' bytes.

    Counts 6 FLOPs per matmul parameter and token, attention where it is causal, Newton-Schulz's half products, and
    every gradient, weight and moment once; nothing elementwise, which a perfect program would hide behind the matmuls.
    """
    update_flops, update_bytes = step_cost(optimizers)
    flops = tokens * model.flops_per_token(seq_len, causal=True) + update_flops
    return (flops / device.bf16_flops + update_bytes / device.bytes_per_second) / ranks
