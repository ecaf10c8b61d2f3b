"""Time on the device's own timeline: moments in its queue, the phases of a step, and the clock of a run.

    times = Times(device); ...; times.mark("forward"); times.milliseconds()

Reading a moment waits until the device has passed it; taking one does not.
"""

import time

import torch

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
        """What lies between the mark before and this one was `phase`."""
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
    """Adds up the seconds between start and stop; the device's queue is drained at both ends."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.total, self.started = device, 0.0, None

    def start(self) -> None:
        self._drain()
        self.started = time.perf_counter()

    def stop(self) -> None:
        self._drain()
        self.total, self.started = self.seconds(), None

    def seconds(self) -> float:
        return self.total + (time.perf_counter() - self.started if self.started is not None else 0.0)

    def _drain(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
