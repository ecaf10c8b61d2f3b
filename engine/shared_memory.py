"""Workers of one machine share weights and gradients in memory: nothing is sent, and an owner's update is everybody's.

    sharding = sharding_of(model, rank)         # for workers; where torchrun started the ranks, the one of ranks.py

A step has two meetings: before the first every rank has laid down its gradients and reads no weight until the second,
after it each owner sums and updates its parts. 5 MB of gradients take 0.7 ms instead of 10 over gloo (bench/LOG.md).
"""

import mmap
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.ranks import Rank, Sharding, unit_view

ALIGNMENT = 64  # bytes


def sharding_of(model: nn.Module, rank: Rank, whole: Sequence[Tensor] = ()) -> Sharding:
    """How the ranks of this training share its parameters, all but those in `whole`."""
    alone = rank.memory is None
    return Sharding(model, rank.index, rank.count, whole) if alone else SharedSharding(model, rank, whole)


class SharedSharding(Sharding):
    """`Sharding` whose parameters lie in memory that all ranks see, next to a board of gradients for each rank."""

    def __init__(self, model: nn.Module, rank: Rank, whole: Sequence[Tensor] = ()) -> None:
        super().__init__(model, rank.index, rank.count, whole)
        sizes = [-(-share.parameter.nbytes // ALIGNMENT) * ALIGNMENT for share in self.shares]
        total = (1 + rank.count) * sum(sizes)
        os.ftruncate(rank.memory, total)
        memory, place = mmap.mmap(rank.memory, total), 0
        self.boards: dict[int, list[Tensor]] = {}  # id of a parameter -> its gradient on each rank
        for share, size in zip(self.shares, sizes, strict=True):
            p = share.parameter
            weights, *board = (
                torch.frombuffer(memory, dtype=p.dtype, count=p.numel(), offset=place + part * size).view_as(p)
                for part in range(1 + rank.count)
            )
            self.boards[id(p)] = board
            place += (1 + rank.count) * size
            if share.split:  # what every rank updates for itself stays its own
                p.data = weights.copy_(p.detach())  # every rank writes the same
                share.cut()
        self.settle()

    def reduce_gradients(self) -> None:
        for share in self.shares:
            gradient, share.parameter.grad = share.parameter.grad, None
            self.boards[id(share.parameter)][self.rank].copy_(gradient)
        self.settle()
        for share in self.shares:
            if share.own is not None:
                first, second, *more = (
                    unit_view(board)[share.start : share.stop] for board in self.boards[id(share.parameter)]
                )
                gradient = first + second
                for part in more:
                    gradient += part
                share.own.grad = gradient.view_as(share.own)

    def updated(self, own: Tensor) -> None:
        pass  # it is where all ranks see it

    def gather(self) -> None:
        self.settle()

    def settle(self) -> None:
        dist.barrier()
