"""Time on the device, and what the device could do at best: moments in its queue, phases of a step, the speed of light.

    times = Times(device); ...; times.mark("forward"); times.milliseconds()
    seconds = light_seconds(model, step_cost(optimizers), tokens, seq_len, DEVICES[torch.cuda.get_device_name()])

Reading a moment waits until the device has passed it; taking one does not. Peaks are from vendor data sheets; a device
that is not in the table has no MFU and no speed of light, rather than a wrong one.
"""

import time
from dataclasses import dataclass

import torch
from torch import nn

from engine.cli import GIB

Point = torch.cuda.Event | float  # a moment on the device's timeline, or on the host's without a GPU


def point(device: torch.device) -> Point:
    """This moment in the device's queue."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Point, stop: Point) -> float:
    """Waits until the device has passed `stop`."""
    if isinstance(stop, float):
        return stop - start
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


class Times:
    """How long each phase of a step took; marks are events in the device's queue, read when the step is over."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start()

    def start(self) -> None:
        """Forget what was marked; the first phase begins now."""
        self.names: list[str] = []
        self.points = [point(self.device)]

    def mark(self, phase: str) -> None:
        """Call the time since the mark before this one `phase`."""
        self.names.append(phase)
        self.points.append(point(self.device))

    def milliseconds(self) -> dict[str, float]:
        """Sum of each phase; waits for the last mark."""
        totals = dict.fromkeys(self.names, 0.0)
        seconds_between(self.points[0], self.points[-1])
        for phase, start, stop in zip(self.names, self.points[:-1], self.points[1:], strict=True):
            totals[phase] += 1e3 * seconds_between(start, stop)
        return totals


class Stopwatch:
    """Adds up the seconds between start and stop; drains the device's queue at both ends. Wall time runs on."""

    def __init__(self, device: torch.device, seconds: float = 0.0, wall_seconds: float = 0.0) -> None:
        self.device, self.total, self.started = device, seconds, None
        self.began = time.perf_counter() - wall_seconds

    def start(self) -> Point:
        """Start, and return this moment on the device's timeline."""
        self._drain()
        self.started = time.perf_counter()
        return point(self.device)

    def stop(self) -> None:
        self._drain()
        self.total, self.started = self.seconds(), None

    def seconds(self) -> float:
        return self.total + (time.perf_counter() - self.started if self.started is not None else 0.0)

    def wall_seconds(self) -> float:
        return time.perf_counter() - self.began

    def _drain(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


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


def light_seconds(
    model: nn.Module,
    step_cost: tuple[float, float],
    tokens: int,
    seq_len: int,
    device: Device,
    ranks: int = 1,
) -> float:
    """The least time one step on `tokens` can take: its matmuls at the peak, then the optimizers' bytes.

    Counts 6 FLOPs per matmul parameter and token, attention where it is causal, Newton-Schulz's half products, and
    every gradient, weight and moment once; nothing elementwise, which a perfect program would hide behind the matmuls.
    Each of several ranks has its share of the tokens; `step_cost` counts its share of the parameters.
    """
    optimizer_flops, optimizer_bytes = step_cost
    flops = tokens / ranks * model.flops_per_token(seq_len, causal=True) + optimizer_flops
    return flops / device.bf16_flops + optimizer_bytes / device.bytes_per_second


class Speed:
    """What tokens/s mean for one run: shares of what its GPUs could do, None on a device that is not in the table."""

    def __init__(
        self,
        model: nn.Module,
        step_cost: tuple[float, float],
        batch_tokens: int,
        seq_len: int,
        name: str,
        ranks: int = 1,
    ) -> None:
        self.model, self.batch_tokens, self.seq_len, self.ranks = model, batch_tokens, seq_len, ranks
        self.name, self.device = name, DEVICES.get(name)
        work = (model, step_cost, batch_tokens, seq_len)
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
