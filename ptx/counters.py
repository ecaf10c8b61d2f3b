"""What one launch did: instructions by class, memory requests, sectors and wavefronts, and what was found wrong.

    launch.total("st.global").units, launch.instructions["mma"], launch.faults, launch.summary()

Instructions are those of PTX: ptxas folds much of the address arithmetic, so `integer` and `mov` are upper bounds.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .formats import WARP, Array
from .parser import Instruction

SECTOR_BYTES, BANKS, BANK_BYTES = 32, 32, 4
SPECIAL_FUNCTIONS = ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "div", "sin", "cos", "tanh")
CLASSES = {
    **{name: name for name in ("mma", "mov", "cvt", "ldmatrix", "stmatrix")},
    **dict.fromkeys(("bra", "ret", "exit"), "branch"),
    **dict.fromkeys(("bar", "barrier"), "barrier"),
    **dict.fromkeys(SPECIAL_FUNCTIONS, "special"),
    **dict.fromkeys(("shfl", "redux", "vote"), "shuffle"),
}


def class_of(instruction: Instruction) -> str:
    """The class that an instruction is counted under."""
    name, words = instruction.name, instruction.words
    if name in ("ld", "st", "atom", "red"):
        return f"{name}.{next((word for word in words if word in ('global', 'shared', 'param')), 'generic')}"
    if name == "cp":
        return "cp.async" if len(instruction.operands) > 1 else "cp.async.wait"
    if name in ("fma", "add", "mul", "sub") and any(w.startswith(("f32", "f16", "bf16")) for w in words[1:]):
        return "float"
    if name == "mma" and words[-4] == "f16":
        return "mma.f16"  # fp16 sums, which some GPUs do at twice the rate
    return CLASSES.get(name, "integer")


class Traffic(NamedTuple):
    """What memory instructions of one kind did: `units` are sectors (global memory) or wavefronts (shared memory)."""

    requests: int = 0
    units: int = 0
    ideal_units: int = 0
    bytes: int = 0

    def plus(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: int) -> "Traffic":
        return self if factor == 1 else Traffic(*(factor * n for n in self))


def sectors(addresses: Array, active: Array, size: int) -> Traffic:
    """Requests of warps (n, 32) to global memory: the 32-byte sectors that each touches, and how few could hold its
    bytes. An access is aligned to its size, so it lies in one sector."""
    nowhere = np.int64(1) << 60
    ordered = np.sort(np.where(active, addresses, nowhere), axis=1)
    valid = ordered < nowhere
    new = np.diff(ordered, axis=1, prepend=-1) != 0
    new_sector = np.diff(ordered // SECTOR_BYTES, axis=1, prepend=-1) != 0
    distinct = (new & valid).sum(1) * size
    requests, touched = int(valid[:, 0].sum()), int((new_sector & valid).sum())
    return Traffic(requests, touched, int((-(-distinct // SECTOR_BYTES)).sum()), int(distinct.sum()))


def wavefronts(addresses: Array, active: Array, size: int) -> Traffic:
    """Requests of warps (n, 32) to shared memory. A pass serves 32 lanes of 4 bytes, 16 of 8 or 8 of 16, and takes as
    many wavefronts as the busiest bank has distinct words."""
    lanes = min(WARP, BANKS * BANK_BYTES // size)
    requests, warps = int(active.any(1).sum()), len(addresses)
    words = addresses // BANK_BYTES
    if size >= BANK_BYTES:
        words = words[:, :, None] + np.arange(size // BANK_BYTES)
        words = np.where(active[:, :, None], words, -1).reshape(warps * (WARP // lanes), -1)
    else:
        words = np.where(active, words, -1)
    words = np.sort(words, axis=1)
    new = (np.diff(words, axis=1, prepend=-2) != 0) & (words >= 0)
    passes, _ = np.nonzero(new)
    load = np.bincount(passes * BANKS + words[new] % BANKS, minlength=len(words) * BANKS).reshape(-1, BANKS)
    return Traffic(requests, int(load.max(1).sum()), int(new.any(1).sum()), int(active.sum()) * size)


class Fault(NamedTuple):
    """What a check found, and where it was found first."""

    kind: str
    kernel: str
    instruction: str
    details: str

    def __str__(self) -> str:
        return f"{self.kind} in {self.kernel}: {self.instruction}: {self.details}"


@dataclass
class Launch:
    """The counters of one launch."""

    kernel: str
    grid: tuple[int, ...]
    capability: int
    shared_bytes: int
    constants: dict[str, Any] = field(default_factory=dict)
    instructions: Counter[str] = field(default_factory=Counter)  # issued per warp, by class
    traffic: dict[tuple[str, str], Traffic] = field(default_factory=lambda: defaultdict(Traffic))  # by (kind, line)
    faults: dict[Fault, int] = field(default_factory=dict)  # -> how often
    programs: int = 0
    seconds: float = 0.0

    def add_fault(self, kind: str, instruction: object, details: str) -> None:
        """Faults of one kind at one instruction are counted together, with the details of the first."""
        found = Fault(kind, self.kernel, str(instruction), details)
        known = next((fault for fault in self.faults if fault[:3] == found[:3]), found)
        self.faults[known] = self.faults.get(known, 0) + 1

    def total(self, *kinds: str) -> Traffic:
        """Of all lines: ld.global, st.global, cp.async.global, ld.shared, st.shared, cp.async.shared, ldmatrix, ..."""
        total = Traffic()
        for (kind, _), traffic in self.traffic.items():
            if kind in kinds:
                total = total.plus(traffic)
        return total

    def lines(self, kind: str) -> dict[str, Traffic]:
        """The traffic of one kind by line of Python."""
        return {line: traffic for (found, line), traffic in self.traffic.items() if found == kind}

    def describe(self) -> str:
        """Architecture, kernel, block sizes, warps, stages, flags that are set, and grid."""
        numbers = {name: value for name, value in self.constants.items() if not isinstance(value, bool)}
        blocks = "x".join(str(value) for name, value in numbers.items() if name.startswith("BLOCK_"))
        flags = [name for name, value in self.constants.items() if value is True]
        options = (f"w{numbers.get('num_warps', 4)}", f"s{numbers.get('num_stages', 3)}", *flags)
        return " ".join(filter(None, (f"sm_{self.capability}", self.kernel, blocks, *options, f"grid {self.grid}")))

    def summary(self) -> str:
        """A few lines of text: what was executed, and a line for each kind of memory request."""
        mix = ", ".join(f"{name} {count:,}" for name, count in self.instructions.most_common())
        rows = [f"{self.describe()}: {self.programs} programs; instructions of warps: {mix}"]
        for kind in sorted({kind for kind, _ in self.traffic}):
            traffic, unit = self.total(kind), "sectors" if kind.endswith("global") else "wavefronts"
            each, needed = traffic.units / max(traffic.requests, 1), traffic.ideal_units / max(traffic.units, 1)
            rows.append(
                f"    {kind:16} {traffic.requests:9,} requests {traffic.units:10,} {unit} ({needed:4.0%} of them"
                f" needed, {each:5.2f} each) {traffic.bytes:12,} B"
            )
        return "\n".join(rows + [f"    {fault} ({count} times)" for fault, count in self.faults.items()])
