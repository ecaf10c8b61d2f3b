"""Many ranks, one training: each rank owns a share of every parameter, and optimizes that alone.

    sharding = Sharding(model, rank, world_size); optimizers = build_optimizers(model, "muon", sharding=sharding, ...)
    sharding.reduce_gradients(); optimizer.step(); sharding.gather()

A bank is dealt out by whole matrices, the embedding by rows, as evenly as whole units allow; parameters of few elements
(gains) stay on every rank. Gradients arrive by one reduce-scatter per bank, updated weights leave by one all-gather,
which overlaps with the next bank's orthogonalisation. A rank's optimizer holds state for its share only, a checkpoint
holds all of it in the form that a single rank writes, so that any number of ranks resumes from it.
"""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.cli import BadInput

if TYPE_CHECKING:
    from engine.workers import Crew

RANK_TIMEOUT = timedelta(minutes=10)  # how long a rank waits for another; compilation must fit
KEPT_WHOLE = 2**14  # elements: smaller parameters cost less to update on every rank than to send in parts
warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor).* is deprecated")


@dataclass(frozen=True)
class Rank:
    """This process among its peers, as torchrun numbers them."""

    index: int = 0
    count: int = 1
    local: int = 0
    """Its number on this machine, which is also its GPU's."""
    crew: "Crew | None" = None
    """The workers that this process has forked."""
    memory: int | None = None
    """A descriptor of memory that all workers share."""

    def least(self, value: int, device: torch.device) -> int:
        """The least of all ranks' values."""
        return int(over_ranks(value, dist.ReduceOp.MIN, self.count, device))


def over_ranks(value: float, op: dist.ReduceOp.RedOpType, count: int, device: torch.device) -> float:
    """One number of each of `count` ranks, reduced to the same on all."""
    if count == 1:
        return value
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, op=op)
    return shared.item()


def rank_from(environment: Mapping[str, str]) -> Rank:
    """The rank that torchrun's variables describe, a single one without them; BadInput unless they make sense."""
    given = {key: environment[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if key in environment}
    if not given:
        return Rank()
    shown = ", ".join(f"{key}={value}" for key, value in given.items())
    advice = "torchrun sets RANK, WORLD_SIZE and LOCAL_RANK together; unset them to train alone"
    if len(given) < 3 or not all(value.isascii() and value.isdecimal() for value in given.values()):
        raise BadInput(f"{shown} in the environment: {advice}")
    rank = Rank(int(given["RANK"]), int(given["WORLD_SIZE"]), int(given["LOCAL_RANK"]))
    if rank.index >= rank.count or rank.local > rank.index:
        raise BadInput(f"{shown} in the environment: RANK must be below WORLD_SIZE, LOCAL_RANK at most RANK; {advice}")
    if rank.count > 1 and not (environment.get("MASTER_ADDR") and environment.get("MASTER_PORT", "").isdecimal()):
        raise BadInput(
            f"{shown} in the environment, but MASTER_ADDR and MASTER_PORT do not say where rank 0 is: {advice}"
        )
    return rank


def join_ranks(device: str) -> Rank:
    """This process's place among those that torchrun started; a process of its own otherwise."""
    env = os.environ
    rank = rank_from(env)
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        if rank.local >= torch.cuda.device_count():
            raise BadInput(f"--nproc_per_node: more ranks than the {torch.cuda.device_count()} GPUs of this machine")
        torch.cuda.set_device(rank.local)
    if rank.count > 1:
        # After a restart by torchrun the store still holds the addresses of the processes before.
        store, *_ = next(dist.rendezvous("env://", timeout=RANK_TIMEOUT))
        store = dist.PrefixStore(f"start-{env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        who = {"store": store, "rank": rank.index, "world_size": rank.count}
        dist.init_process_group("nccl" if cuda else "gloo", timeout=RANK_TIMEOUT, **who)
    return rank


def unit_view(p: Tensor) -> Tensor:
    """A parameter as a sequence of what is never split: matrices (B, m, n) of a bank, rows (B, n) of a matrix."""
    return p.view(-1, *p.shape[-2:]) if p.ndim > 2 else p


def deal(units: int, unit_cost: float, loads: list[float]) -> list[int]:
    """How many of `units` equal units each rank gets: as many as the others or one more, the one more where the least
    work is so far; adds the work to `loads`."""
    ranks = len(loads)
    counts = [units // ranks] * ranks
    for rank in sorted(range(ranks), key=lambda rank: (loads[rank], rank))[: units % ranks]:
        counts[rank] += 1
    for rank, count in enumerate(counts):
        loads[rank] += count * unit_cost
    return counts


@dataclass(eq=False)
class Share:
    """One parameter and which of its units each rank owns; `own` is this rank's part, a view of the parameter, None
    where it owns nothing. A parameter kept whole has `counts` None."""

    name: str
    parameter: Tensor
    counts: list[int] | None
    rank: int

    def __post_init__(self) -> None:
        self.start = sum(self.counts[: self.rank]) if self.counts else 0
        self.stop = self.start + self.counts[self.rank] if self.counts else len(unit_view(self.parameter))
        self.cut()

    def cut(self) -> None:
        """Set `own`, again where the parameter got other memory."""
        if self.counts is None:
            self.own: Tensor | None = self.parameter
        else:
            part = unit_view(self.parameter.detach())[self.start : self.stop]
            self.own = part if len(part) else None

    @property
    def split(self) -> bool:
        return self.counts is not None

    @property
    def chunk(self) -> int:
        """Units in each rank's part of what is sent; the last of them are padding where a rank owns fewer."""
        return max(self.counts)

    def padded(self, whole: Tensor) -> Tensor:
        """The units of a tensor like the parameter, each rank's part filled up to `chunk`."""
        units = unit_view(whole)
        if all(count == self.chunk for count in self.counts):
            return units
        out = units.new_zeros(len(self.counts) * self.chunk, *units.shape[1:])
        for to, part in self._parts(out, units):
            to.copy_(part)
        return out

    def unpad(self, padded: Tensor, whole: Tensor) -> None:
        """The inverse of `padded`, into `whole`."""
        for part, to in self._parts(padded, unit_view(whole)):
            to.copy_(part)

    def _parts(self, padded: Tensor, units: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        start = 0
        for rank, count in enumerate(self.counts):
            yield padded[rank * self.chunk : rank * self.chunk + count], units[start : start + count]
            start += count


class Sharding:
    """The shares of a model's parameters, and what is sent between ranks; with one rank, nothing. Parameters in `whole`
    are not dealt out: every rank updates them for itself."""

    def __init__(self, model: nn.Module, rank: int = 0, world_size: int = 1, whole: Sequence[Tensor] = ()) -> None:
        self.rank, self.world_size = rank, world_size
        self.device = model.embedding.device
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.banks = [bank.parameter for bank in model.banks()]
        in_banks = {id(p) for p in self.banks}
        matrix_loads, row_loads = [0.0] * world_size, [0.0] * world_size
        counts: dict[str, list[int] | None] = {}
        for name, p in sorted(named, key=lambda entry: -unit_cost(entry[1])):  # the costliest first
            loads = matrix_loads if id(p) in in_banks else row_loads
            small = p.numel() <= KEPT_WHOLE and id(p) not in in_banks
            alone = world_size == 1 or small or any(p is one for one in whole)
            counts[name] = None if alone else deal(len(unit_view(p)), unit_cost(p), loads)
        self.shares = [Share(name, p, counts[name], rank) for name, p in named]
        self.share_of = {id(share.parameter): share for share in self.shares}
        # Sent in this order on every rank: banks, then the rest.
        split = [share for share in self.shares if share.split]
        self.order = sorted(split, key=lambda share: id(share.parameter) not in in_banks)
        self.in_flight: list[tuple[Share, Tensor, dist.Work]] = []
        self.bytes_sent = self.messages = 0  # since the beginning, by this rank

    def own(self, p: Tensor) -> list[Tensor]:
        """What this rank's optimizer holds of a parameter: one tensor or none."""
        own = self.share_of[id(p)].own
        return [] if own is None else [own]

    def own_entries(self, p: Tensor, entries: Sequence[Any]) -> list[Any]:
        """Of values for each entry of a bank's first dimension, those of the matrices that this rank owns."""
        share = self.share_of[id(p)]
        if not share.split:
            return list(entries)
        each = len(unit_view(p)) // len(entries)
        return [entry for entry in entries for _ in range(each)][share.start : share.stop]

    def reduce_gradients(self) -> None:
        """Sum every gradient over the ranks: afterwards each owns its part's, in `own.grad`, and no other."""
        if self.world_size == 1:
            return
        waiting: list[tuple[Share, Tensor, dist.Work]] = []
        for share in self.shares:
            gradient, share.parameter.grad = share.parameter.grad, None
            if not share.split:
                waiting.append((share, gradient, dist.all_reduce(gradient, async_op=True)))
                self._count(gradient, times=2)
                continue
            padded = share.padded(gradient)
            mine = padded.new_empty(share.chunk, *padded.shape[1:])
            waiting.append((share, mine, dist.reduce_scatter_tensor(mine, padded, async_op=True)))
            self._count(padded)
        for share, gradient, work in waiting:
            work.wait()
            if share.own is not None:
                share.own.grad = gradient[: len(share.own)]

    def squared_norms(self) -> Tensor:
        """The squared norm of this rank's part of every gradient; summed over ranks, that of the whole one."""
        return torch.stack(
            [
                torch.linalg.vector_norm(share.own.grad).square()
                if share.own is not None and (share.split or self.rank == 0)
                else torch.zeros((), device=self.device)
                for share in self.shares
            ]
        )

    def send_first(self, parameters: Sequence[Tensor]) -> None:
        """Send these before the others, in this order: an optimizer's that announces each as `updated`."""
        place = {id(p): i for i, p in enumerate(parameters)}
        self.order.sort(key=lambda share: place.get(id(share.parameter), len(place)))

    def updated(self, own: Tensor) -> None:
        """This rank's part of a parameter has its new values: begin to send it, after all before it in the order."""
        place = next((i for i, share in enumerate(self.order) if share.own is own), None)
        if place is not None:  # None: every rank has updated it for itself
            self._send_up_to(place + 1)

    def _send_up_to(self, count: int) -> None:
        for share in self.order[len(self.in_flight) : count]:
            units = unit_view(share.parameter.detach())
            mine = units[share.start : share.stop]
            if len(mine) < share.chunk:
                mine = torch.cat((mine, units.new_zeros(share.chunk - len(mine), *units.shape[1:])))
            everybody = units.new_empty(self.world_size * share.chunk, *units.shape[1:])
            self.in_flight.append((share, everybody, dist.all_gather_into_tensor(everybody, mine, async_op=True)))
            self._count(everybody)

    def settle(self) -> None:
        """Wait until every rank has read what others are about to change; needed where weights are shared in memory."""

    def gather(self) -> None:
        """Give every rank all weights as their owners updated them."""
        self._send_up_to(len(self.order))
        for share, everybody, work in self.in_flight:
            work.wait()
            share.unpad(everybody, share.parameter.detach())
        self.in_flight.clear()

    def traffic(self) -> tuple[int, int]:
        """Bytes that this rank sends in a ring, and messages, for the parameters of one step: counted from the shares
        alone. One more small message carries loss and norms."""
        total = messages = 0
        for share in self.shares if self.world_size > 1 else ():
            units = self.world_size * share.chunk if share.split else len(unit_view(share.parameter))
            whole = units * unit_view(share.parameter)[0].numel() * share.parameter.element_size()
            total += 2 * whole * (self.world_size - 1) // self.world_size
            messages += 2 if share.split else 1
        return total, messages

    def bank_gradients(self) -> list[Tensor]:
        """A copy of every bank's gradient on every rank, which all must ask for."""
        found = []
        for p in self.banks:
            share = self.share_of[id(p)]
            own = None if share.own is None else share.own.grad
            found.append(self.whole(share, own) if share.split else own.clone())
        return found

    def whole(self, share: Share, own: Tensor | None, shape: Sequence[int] | None = None) -> Tensor:
        """A tensor of the parameter's shape, or of one that is cut into units alike, from every rank's part of it."""
        if not share.split:
            return own
        whole = share.parameter.new_empty(share.parameter.shape if shape is None else shape)
        units = unit_view(whole)
        mine = units.new_zeros(share.chunk, *units.shape[1:])
        if own is not None:
            mine[: len(own)] = own
        everybody = units.new_empty(self.world_size * share.chunk, *units.shape[1:])
        dist.all_gather_into_tensor(everybody, mine)
        share.unpad(everybody, whole)
        return whole

    def part(self, share: Share, whole: Tensor) -> Tensor:
        """This rank's part of a tensor like the parameter; a scalar (a count of steps) is everybody's."""
        return unit_view(whole)[share.start : share.stop].clone() if share.split and whole.ndim else whole

    def largest(self, value: float) -> float:
        """The largest of the ranks' values."""
        return over_ranks(value, dist.ReduceOp.MAX, self.world_size, self.device)

    def _count(self, whole: Tensor, times: int = 1) -> None:
        """A ring sends (N - 1) / N of a message from each rank, `times` over."""
        self.bytes_sent += times * whole.numel() * whole.element_size() * (self.world_size - 1) // self.world_size
        self.messages += 1


def unit_cost(p: Tensor) -> float:
    """Work of one unit, for dealing: Newton-Schulz's FLOPs of a matrix, the elements of a row."""
    return float(p.shape[-2] * p.shape[-1] * min(p.shape[-2:])) if p.ndim > 2 else float(p.shape[-1])
