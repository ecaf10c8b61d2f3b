"""Memories that notice misuse: which bytes belong to a tensor, who wrote and read them last, what is still in flight.

    shadow = Shadow(size, granule); racing = shadow.reading(places, who)
    region = Region(tensor); region.add(name, tensor); region.seal(granule)

Two accesses of one place, one of them a write, race unless one warp makes both or a barrier of their program lies
between. Lanes of one warp count as ordered: Triton's code keeps them together.
"""

import ctypes
from typing import Any

import numpy as np

from .formats import Array, PtxError

PROGRAM_SHIFT, EPOCH_SHIFT, ANY_WARP = 40, 8, 255  # of an access: program << 40 | barriers passed << 8 | warp


class Shadow:
    """The last write and the last reads of each place (`granule` bytes) of a memory; -1 where there were none."""

    SEVERAL_PROGRAMS = 1 << 62

    def __init__(self, size: int, granule: int) -> None:
        self.granule = granule
        self.wrote, self.read = (np.full(-(-size // granule), -1, np.int64) for _ in range(2))
        self.in_flight = np.zeros(len(self.wrote), np.bool_)

    def places(self, offsets: Array, size: int, who: Array) -> tuple[Array, Array]:
        """The places of accesses of `size` bytes, and who touches each."""
        count = size // self.granule
        if count == 1:
            return offsets // self.granule, who
        return (offsets[:, None] // self.granule + np.arange(count)).ravel(), np.repeat(who, count)

    @staticmethod
    def unordered(before: Array, who: Array) -> Array:
        """Which earlier accesses are by another program, or by another warp since the last barrier."""
        other_program = before >> PROGRAM_SHIFT != who >> PROGRAM_SHIFT
        return (before >= 0) & (before != who) & (other_program | (before >= who & ~ANY_WARP))

    def touched_by_others(self, places: Array, who: Array) -> Array:
        """Which places somebody else wrote or read, unordered, or a copy is on its way to."""
        written = self.unordered(self.wrote[places], who)
        return written | self.unordered(self.read[places], who) | self.in_flight[places]

    def reading(self, places: Array, who: Array) -> Array:
        """Note these reads; which of them race with an earlier write."""
        racing = self.unordered(self.wrote[places], who) | self.in_flight[places]
        before = self.read[places]
        noted = np.where(self.unordered(before, who), self._joined(before, who), who)
        self.read[places] = noted
        after = self.read[places]
        several = after != noted  # more than one reader in this instruction
        self.read[places[several]] = self._joined(after[several], noted[several])
        return racing

    def _joined(self, a: Array, b: Array) -> Array:
        """One number for two readers: any warp of their program, or several programs."""
        return np.where(a >> PROGRAM_SHIFT == b >> PROGRAM_SHIFT, b | ANY_WARP, self.SEVERAL_PROGRAMS)

    def writing(self, places: Array, who: Array) -> tuple[Array, Array]:
        """Note these writes; which race with an earlier access, and which with another of the same instruction."""
        racing = self.touched_by_others(places, who)
        self.wrote[places] = who
        return racing, self.wrote[places] != who

    def describe(self, place: int) -> str:
        """The place and its last accesses in words."""

        def words(access: int) -> str:
            if access < 0:
                return "nobody"
            if access == self.SEVERAL_PROGRAMS:
                return "several programs"
            warp = "several warps" if access & 255 == ANY_WARP else f"warp {access & 255}"
            return f"{warp} of program {access >> PROGRAM_SHIFT}"

        flying = "its copy still in flight, " if self.in_flight[place] else ""
        accesses = f"last written by {words(self.wrote[place])}, read by {words(self.read[place])}"
        return f"byte {place * self.granule:,}, {flying}{accesses}"


class Region:
    """The memory of one tensor storage, and which of its bytes belong to the tensors that were passed."""

    def __init__(self, tensor: Any) -> None:
        storage = tensor.untyped_storage()
        self.start, self.size, self.keep_alive = storage.data_ptr(), storage.nbytes(), storage
        if self.start % 16:
            raise PtxError("a tensor's storage does not start at a multiple of 16 bytes")
        whole = (ctypes.c_uint8 * (-(-self.size // 16) * 16)).from_address(self.start)
        self.bytes = np.ctypeslib.as_array(whole)  # rounded up so that it can be viewed as larger items
        self.belongs = np.zeros(self.size, np.bool_)
        self.names: list[str] = []

    def add(self, name: str, tensor: Any) -> None:
        """A tensor in this storage may be accessed at its elements."""
        item = tensor.element_size()
        first = tensor.storage_offset() * item
        strides = (*(stride * item for stride in tensor.stride()), 1)
        if tensor.numel():
            np.lib.stride_tricks.as_strided(self.belongs[first:], (*tensor.shape, item), strides)[...] = True
        self.names.append(name)

    def seal(self, granule: int) -> None:
        """All tensors are added."""
        everything = self.belongs.all()
        self.belong_before = None if everything else np.concatenate(([0], np.cumsum(self.belongs, dtype=np.int64)))
        self.shadow = Shadow(self.size, granule)

    def outside(self, offsets: Array, size: int) -> tuple[Array, str]:
        """Which accesses leave the storage, or else touch bytes between the tensors' elements; and what to call it."""
        wrong = (offsets < 0) | (offsets + size > self.size)
        if wrong.any() or self.belong_before is None:
            return wrong, "out of bounds"
        own = self.belong_before[offsets + size] - self.belong_before[offsets]
        return own != size, "outside the elements of the tensor, but inside its storage"
