"""The cores that this process may use, and how many of them are free; importing it does not import torch.

workers = free_cores()
"""

import contextlib
import math
import os
from pathlib import Path

LOOKS, LOOK_SECONDS = 3, 0.25  # for busy cores: a process that just ends is gone in the next look


def own_cores() -> set[int]:
    """Numbers of the cores that the affinity of this process allows (taskset)."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def busy_cores(seconds: float) -> float | None:
    """How many of them are busy, averaged over so many seconds; None where that cannot be learned."""
    try:
        import psutil
    except ModuleNotFoundError:  # a training machine may lack it
        return None
    percents = psutil.cpu_percent(seconds, percpu=True)
    if len(percents) <= max(own_cores()):  # some cores are offline: their numbers are not positions in the list
        return None
    return sum(percents[core] for core in own_cores()) / 100


def free_cores() -> int:
    """Cores that this process may use, less those that others keep busy: next to a busy process one thread on the other
    core is faster than two that wait for each other. Limits are the affinity, the control group's quota and
    OMP_NUM_THREADS. Looks for a quarter of a second, and twice more where that was busy."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(own_cores())
    allowed = int(min(cores, _quota(), int(wanted) if wanted.isdecimal() and int(wanted) else math.inf))
    idle = 0
    for _ in range(LOOKS if allowed > 1 else 0):
        idle = max(idle, round(cores - (busy_cores(LOOK_SECONDS) or 0.0)))
        if idle >= allowed:
            break
    return max(1, min(allowed, idle))


def _quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Cores that the control group of this process and those around it grant; infinite where nothing is limited."""
    least = math.inf
    try:
        group = next(line[3:] for line in own.read_text(encoding="utf-8").splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        group = "/"
    folder = root / group.strip("/")
    for place in (folder, *folder.parents):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (place / "cpu.max").read_text(encoding="utf-8").split()
            least = min(least, int(quota) / int(period))  # ValueError for "max"
        if place == root:
            break
    return least
