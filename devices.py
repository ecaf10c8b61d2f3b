"""What the GPUs that people train on can do at best, and what a training step needs of them.

    device = find(torch.cuda.get_device_name()); seconds = light_seconds(model, optimizers, tokens, seq_len, device)

Vendor data sheets; a device that is not in the table has no MFU and no speed of light, rather than a wrong one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clock import Times
from memory import GIB
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
    Of several ranks each has its share of the tokens, and `optimizers` hold its share of the parameters.
    """
    update_flops, update_bytes = step_cost(optimizers)
    flops = tokens / ranks * model.flops_per_token(seq_len, causal=True) + update_flops
    return flops / device.bf16_flops + update_bytes / device.bytes_per_second


class Speed:
    """What tokens/s mean for one run: shares of what its GPUs could do, None on a device that is not in the table."""

    def __init__(
        self,
        model: Transformer,
        optimizers: Sequence[torch.optim.Optimizer],
        batch_tokens: int,
        seq_len: int,
        name: str,
        ranks: int = 1,
    ) -> None:
        self.model, self.batch_tokens, self.seq_len, self.ranks = model, batch_tokens, seq_len, ranks
        self.device = find(name)
        work = (model, optimizers, batch_tokens, seq_len)
        self.light_seconds = None if self.device is None else light_seconds(*work, self.device, ranks)

    def mfu(self, tokens_per_second: float | None, causal: bool = False) -> float | None:
        """Model FLOPs utilisation, 0 to 1, with attention counted in full or its causal half."""
        if self.device is None or tokens_per_second is None:
            return None
        flops = tokens_per_second * self.model.flops_per_token(self.seq_len, causal)
        return flops / (self.device.bf16_flops * self.ranks)

    def fields(self, times: Times, seconds: float) -> dict[str, str]:
        """For a step's line: where its `seconds` went, and how far from the best possible they are."""
        phases = times.milliseconds()
        fields = {f"{phase}_ms": f"{phases[phase]:.1f}" for phase in ("forward", "backward", "optimizer")}
        if self.model.embedding.is_cuda:
            fields["memory_gib"] = f"{torch.cuda.max_memory_allocated() / GIB:.2f}"
        if self.light_seconds is not None:
            speed = self.batch_tokens / seconds
            fields["mfu"], fields["mfu_causal"] = f"{self.mfu(speed):.3f}", f"{self.mfu(speed, causal=True):.3f}"
            fields["light"] = f"{self.light_seconds / seconds:.3f}"
        return fields
