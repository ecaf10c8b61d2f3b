"""The machine: programs of one grid that execute a kernel together, their registers, shared memory and barriers.

    Machine(code, launch, regions, parameters).run(first, count, (x, y, z))

All threads of all programs at one block execute it at once, as arrays; those furthest behind go first, so that
branches join again. Notes in launch.faults: races in shared and global memory, reads of copies in flight or of shared
memory that nobody wrote, barriers that not all threads reach. An access outside its tensor raises PtxError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .counters import Fault, Launch, Traffic
from .decoder import RETURNED, Code
from .formats import ITEMS, WARP, Array, PtxError, same_bits
from .memory import EPOCH_SHIFT, PROGRAM_SHIFT, Region, Shadow
from .operands import Mask
from .parser import Instruction

NAN_BYTE = 0xFF  # 0xFFFF... is NaN in fp16, bf16 and fp32 alike: what nobody wrote


class Copies(NamedTuple):
    """The copies of one cp.async that have not arrived: for which threads, in which group, to where, and what."""

    live: Array
    group: Array
    offsets: Array
    items: Array


class Registers(dict):
    """Name -> array. One that nobody wrote is NaN or the largest integer: compilers leave halves of pairs undefined."""

    def __init__(self, code: Code) -> None:
        super().__init__()
        self.code = code

    def __missing__(self, name: str) -> Array:
        dtype = self.code.program.register_type(name)
        return np.full((1, 1), False if dtype is np.bool_ else np.iinfo(dtype).max, dtype)


class Machine:
    """One launch's programs, some at a time; `parameters` are the kernel's by name, as (1, 1) arrays."""

    def __init__(
        self, code: Code, launch: Launch, regions: list[Region], parameters: dict[str, Array], check: bool = True
    ) -> None:
        self.code, self.launch, self.regions, self.parameters, self.check = code, launch, regions, parameters, check
        self.region_starts = np.array([region.start for region in regions])
        self.threads = code.program.threads
        self.warps = self.threads // WARP
        self.patterns: dict[tuple, Traffic] = {}  # counted already: many programs make the same accesses

    def run(self, first: int, count: int, grid: tuple[int, int, int]) -> None:
        """Execute programs first .. first + count from entry to return."""
        numbers, lanes = first + np.arange(count)[:, None], np.arange(self.threads)[None, :]
        self.programs, self.shape = count, (count, self.threads)
        self.special = _special_registers(numbers, lanes, grid, self.threads)
        self.identity = (numbers.astype(np.int64) << PROGRAM_SHIFT) | (lanes // WARP)
        self.epoch = np.zeros((count, 1), np.int64)  # barriers passed
        self.registers = Registers(self.code)
        self.fragments: dict[tuple[str, ...], tuple] = {}  # operands of products, by their registers' names
        self.shared_stride = -(-max(self.launch.shared_bytes, 16) // 16) * 16
        self.shared = np.full(count * self.shared_stride, NAN_BYTE, np.uint8)
        self.shared_shadow = Shadow(len(self.shared), self.code.granules["shared"])
        self.copies: list[Copies] = []
        self.groups_committed = np.zeros((1, 1), np.int64)
        self.block = np.zeros((1, 1), np.int64)
        self.waiting = np.zeros((1, 1), np.bool_)
        with np.errstate(all="ignore"):
            while self._step():
                pass
        self.launch.programs += count

    # Control.

    def _step(self) -> bool:
        """One block, for the threads that are furthest behind; when all wait at barriers, the barriers open."""
        ready = ~self.waiting & (self.block < RETURNED)
        if not ready.any():
            if not self.waiting.any():
                return False
            self._open_barriers()
            return True
        number = int(np.broadcast_to(self.block, ready.shape)[ready].min())
        here = ready & (self.block == number)
        self.mask = None if here.all() else here
        self._count_instructions(number)
        self.jumped = False
        for execute in self.code.blocks[number]:
            execute(self)
        if not self.jumped:
            self.jump(self.mask, np.int64(number + 1))
        return True

    def _count_instructions(self, number: int) -> None:
        warps = self.programs * self.warps
        if self.mask is not None:
            by_warp = np.broadcast_to(self.mask, self.shape).reshape(self.programs, self.warps, WARP)
            warps = int(by_warp.any(2).sum())
        for name, count in self.code.counts[number].items():
            self.launch.instructions[name] += count * warps

    def jump(self, mask: Mask, target: Array) -> None:
        """These threads continue at the block `target`."""
        self.block = np.atleast_2d(target) if mask is None else np.where(mask, target, self.block)
        if self.block.size > 1 and (self.block == self.block.flat[0]).all():
            self.block = self.block.reshape(-1)[:1].reshape(1, 1)
        self.jumped = True

    def active(self, guard: Array) -> Mask:
        """The threads that are here and whose guard holds."""
        mask = guard if self.mask is None else guard & self.mask
        return None if mask.all() else mask

    def wait_at_barrier(self, mask: Mask) -> None:
        self.waiting = self.waiting | (True if mask is None else mask)
        if self.waiting.all():
            self.waiting = np.ones((1, 1), np.bool_)

    def _open_barriers(self) -> None:
        waiting, block = np.broadcast_to(self.waiting, self.shape), np.broadcast_to(self.block, self.shape)
        here = waiting.any(1)
        first, last = np.where(waiting, block, RETURNED).min(1), np.where(waiting, block, -1).max(1)
        if (here & (first != last)).any():
            self.fault("threads of a program wait at different barriers", None, f"blocks {first.min()} to {last.max()}")
        if (waiting != here[:, None]).any():
            self.fault("threads returned while others wait at a barrier", None, "")
        self.epoch = self.epoch + here[:, None]
        self.waiting = np.zeros((1, 1), np.bool_)

    # Reports and counters.

    def fault(self, kind: str, instruction: Instruction | None, details: str) -> None:
        self.launch.add_fault(kind, instruction, details)

    def _error(self, kind: str, instruction: Instruction, details: str) -> PtxError:
        return PtxError(str(Fault(kind, self.launch.kernel, str(instruction), details)))

    def _culprit(self, wrong: Array, mask: Mask) -> str:
        """The first thread of the active ones that `wrong` is about, in words."""
        every = np.ones(self.shape, np.bool_) if mask is None else np.broadcast_to(mask, self.shape)
        lane = np.flatnonzero(every)[np.flatnonzero(wrong)[0]]
        program = int(self.identity[lane // self.threads, 0]) >> PROGRAM_SHIFT
        return f"program {program}, thread {lane % self.threads} (warp {lane % self.threads // WARP})"

    def _race(self, verb: str, instruction: Instruction, shadow: Shadow, places: Array, racing: Array, mask: Mask):
        """`racing` has one entry for each of `places`, of which an access may have several."""
        count = len(places) // int(np.prod(self.shape) if mask is None else np.broadcast_to(mask, self.shape).sum())
        culprit = self._culprit(racing.reshape(-1, count).any(1), mask)
        place = int(places[np.flatnonzero(racing)[0]])
        self.fault(f"race: unordered {verb}", instruction, f"{culprit}, {shadow.describe(place)}")

    def count(
        self, counter: Callable, kind: str, instruction: Instruction, addresses: Array, mask: Mask, size: int
    ) -> None:
        """Add an access to the traffic, each warp's 32 addresses a request. Addresses that are the same for all
        programs are (1, threads) and counted once."""
        times, active = 1, np.ones((1, 1), np.bool_) if mask is None else mask
        if addresses.shape[0] == 1 and active.shape[1] == 1:
            times = self.programs if active.shape[0] == 1 else int(active.sum())
            active = np.ones((1, 1), np.bool_)
        shape = (np.broadcast_shapes(addresses.shape, active.shape)[0], self.threads)
        key = (counter, size, addresses.tobytes()) if shape[0] == 1 and mask is None else None
        found = self.patterns.get(key) if key else None
        if found is None:
            by_warp = (np.broadcast_to(a, shape).reshape(-1, WARP) for a in (addresses, active))
            found = counter(*by_warp, size)
            if key:
                self.patterns[key] = found
        place = kind, instruction.source_line
        self.launch.traffic[place] = self.launch.traffic[place].plus(found.times(times))

    # Memory. Values of the active threads are flat arrays, in the order of the threads.

    def select(self, values: Array, mask: Mask) -> Array:
        """The active threads' values, flat."""
        full = np.broadcast_to(values, self.shape)
        return full.ravel() if mask is None else full[np.broadcast_to(mask, self.shape)]

    def spread(self, values: Array, mask: Mask) -> Array:
        """Flat values of the active threads as (programs, threads), zero for the others."""
        if mask is None:
            return values.reshape(self.shape)
        full = np.zeros(self.shape, values.dtype)
        full[np.broadcast_to(mask, self.shape)] = values
        return full

    def _who(self, mask: Mask) -> Array:
        return self.select(self.identity + (self.epoch << EPOCH_SHIFT), mask)

    def locate(self, space: str, addresses: Array, mask: Mask, size: int, instruction: Instruction) -> tuple:
        """(bytes of the memory, its shadow, offsets of the active threads' accesses), checked."""
        chosen = self.select(addresses, mask)
        wrong = chosen & (size - 1) != 0
        if wrong.any():
            raise self._error("misaligned access", instruction, self._culprit(wrong, mask))
        if space == "global":
            region = self._region(chosen, size, instruction, mask)
            return region.bytes, region.shadow, chosen - region.start
        wrong = (chosen < 0) | (chosen + size > self.launch.shared_bytes)
        if wrong.any():
            where = f"{size} bytes at {chosen[np.flatnonzero(wrong)[0]]:,} of {self.launch.shared_bytes:,} bytes of"
            raise self._error("out of bounds", instruction, f"{self._culprit(wrong, mask)}, {where} shared memory")
        start = self.select(np.arange(self.programs)[:, None] * self.shared_stride, mask)
        return self.shared, self.shared_shadow, chosen + start

    def _region(self, addresses: Array, size: int, instruction: Instruction, mask: Mask) -> Region:
        """The storage that holds the lowest of these addresses; raises where one is outside of its tensors."""
        number = int(np.searchsorted(self.region_starts, addresses.min(), "right")) - 1
        region = self.regions[max(number, 0)]
        offsets = addresses - region.start
        wrong, kind = region.outside(offsets, size)
        if wrong.any():
            where = f"{size} bytes at {offsets[np.flatnonzero(wrong)[0]]:,} of {region.size:,} bytes of"
            details = f"{self._culprit(wrong, mask)}, {where} {', '.join(region.names)}"
            raise self._error(kind, instruction, details)
        return region

    def load(self, space: str, addresses: Array, size: int, mask: Mask, instruction: Instruction) -> Array:
        """The active threads' items of `size` bytes."""
        memory, shadow, offsets = self.locate(space, addresses, mask, size, instruction)
        if self.check:
            places, who = shadow.places(offsets, size, self._who(mask))
            racing = shadow.reading(places, who)
            if racing.any():
                self._race("read", instruction, shadow, places, racing, mask)
            unwritten = shadow.wrote[places] < 0
            if space == "shared" and unwritten.any():
                lanes = unwritten.reshape(len(offsets), -1).any(1)
                self.fault("read of shared memory that nobody wrote", instruction, self._culprit(lanes, mask))
        return memory.view(ITEMS[size])[offsets // size]

    def store(
        self, space: str, addresses: Array, items: Array, size: int, mask: Mask, instruction: Instruction
    ) -> None:
        """Write the active threads' items of `size` bytes. Writing the value that is there already is not a race."""
        memory, shadow, offsets = self.locate(space, addresses, mask, size, instruction)
        memory, index = memory.view(ITEMS[size]), offsets // size
        before = memory[index] if self.check else None
        memory[index] = items
        if not self.check:
            return
        places, who = shadow.places(offsets, size, self._who(mask))
        with_earlier, with_each_other = shadow.writing(places, who)
        per_access = len(places) // len(offsets)
        for racing, old in ((with_earlier, before), (with_each_other, memory[index])):
            racing = racing & np.repeat(~same_bits(old, items), per_access)
            if racing.any():
                self._race("write", instruction, shadow, places, racing, mask)

    # Asynchronous copies: data arrives, and counts as written, when its thread waits for its group.

    def start_copy(self, addresses: Array, items: Array, size: int, mask: Mask, instruction: Instruction) -> None:
        _, shadow, offsets = self.locate("shared", addresses, mask, size, instruction)
        if self.check:
            places, who = shadow.places(offsets, size, self._who(mask))
            racing = shadow.touched_by_others(places, who)
            if racing.any():
                self._race("asynchronous write", instruction, shadow, places, racing, mask)
            shadow.in_flight[places] = True
        poison = np.full(size, NAN_BYTE, np.uint8).view(ITEMS[size])[0]
        self.shared.view(ITEMS[size])[offsets // size] = poison
        live = np.ones(self.shape, np.bool_) if mask is None else np.broadcast_to(mask, self.shape).copy()
        group = np.broadcast_to(self.groups_committed + 1, self.shape)
        self.copies.append(Copies(live, group, self.spread(offsets, mask), self.spread(items, mask)))

    def commit_copies(self, mask: Mask) -> None:
        """What was started since the last commit is a group."""
        self.groups_committed = self.groups_committed + (1 if mask is None else mask.astype(np.int64))

    def wait_for_copies(self, mask: Mask, newest: int) -> None:
        """All groups but the `newest` ones have arrived."""
        in_flight = []
        for copy in self.copies:
            arrived = copy.live & (copy.group <= self.groups_committed - newest)
            if mask is not None:
                arrived &= mask
            if arrived.any():
                self._finish(copy, arrived)
                copy = copy._replace(live=copy.live & ~arrived)
            if copy.live.any():
                in_flight.append(copy)
        self.copies = in_flight

    def _finish(self, copy: Copies, arrived: Array) -> None:
        offsets, items = copy.offsets[arrived], copy.items[arrived]
        size = items.dtype.itemsize
        self.shared.view(ITEMS[size])[offsets // size] = items
        if self.check:
            places, who = self.shared_shadow.places(offsets, size, self._who(arrived))
            self.shared_shadow.wrote[places], self.shared_shadow.in_flight[places] = who, False


def _special_registers(numbers: Array, lanes: Array, grid: tuple[int, int, int], threads: int) -> dict[str, Array]:
    x, y, z = grid
    values = {
        **{"%laneid": lanes % WARP, "%warpid": lanes // WARP},
        **{"%tid.x": lanes, "%tid.y": 0, "%tid.z": 0, "%ntid.x": threads, "%ntid.y": 1, "%ntid.z": 1},
        **{"%ctaid.x": numbers % x, "%ctaid.y": numbers // x % y, "%ctaid.z": numbers // (x * y)},
        **{"%nctaid.x": x, "%nctaid.y": y, "%nctaid.z": z},
    }
    return {name: np.atleast_2d(np.asarray(value)).astype(np.uint32) for name, value in values.items()}
