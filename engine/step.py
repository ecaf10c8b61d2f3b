"""One training step that does not wait for the GPU (sm_80 or newer): gradients of a global batch, then every optimizer.

    step = TrainingStep(model, optimizers, micro_batch=8, grad_clip=1.0, compiled=True)
    stats = step.gradients(batch_BT1); times = step.apply()      # later: stats.read(), times.milliseconds()

If a loss or gradient norm is not finite, the device itself skips the change of the weights, so the host may learn of it
a step later. train.py runs this class and `evaluate`, bench/train.py times it.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from engine.compiling import prepare_compiling
from engine.cpu import prepare_cpu
from engine.files import DECILES
from engine.own_optimizer import OwnOptimizer
from engine.ranks import Sharding
from engine.speed import Times
from kernels import Muon

VALIDATION_TOKENS = {"cuda": 8192, "cpu": 1024}  # per forward pass, whose fp32 logits are held whole
WARMUP_STEPS = 4  # the first makes optimizer state, the third captures Muon's step


def prepare_torch() -> None:
    """Settings of the whole process: TF32 on a GPU for what is left in fp32, a fast CPU, a compile cache."""
    torch.set_float32_matmul_precision("high")
    prepare_cpu()
    prepare_compiling()


class StepStats(NamedTuple):
    """A step's results on the host. `loss` is the cross-entropy. `not_finite` names the parameters whose gradients are
    not. Of a mixture `balance_loss` is what training adds to the loss, `expert_counts` the choices over the global
    batch, layer by layer; both are None of a dense model."""

    loss: float
    grad_norm: float
    stop_requested: bool
    not_finite: tuple[str, ...]
    balance_loss: float | None = None
    expert_counts: list[list[float]] | None = None

    @property
    def finite(self) -> bool:
        return all(math.isfinite(value) for value in (self.loss, self.balance_loss or 0.0, self.grad_norm))


class PendingStats:
    """The statistics of a step on their way from the device; only `read` waits, and for them alone.

    `values` holds loss, norm, stop, a norm for each of `names`, and of a mixture the balance loss and `layers` equal
    rows of counts.
    """

    def __init__(self, values: Tensor, names: Sequence[str], layers: int = 0) -> None:
        self.names, self.layers, self.arrived = names, layers, None
        self.values = values
        if values.is_cuda:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> StepStats:
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, grad_norm, stop, *rest = self.values.tolist()
        norms, (balance, *flat) = rest[: len(self.names)], rest[len(self.names) :] or [None]
        experts = len(flat) // self.layers if self.layers else 0
        counts = [flat[layer * experts : (layer + 1) * experts] for layer in range(self.layers)] or None
        bad = tuple(name for name, norm in zip(self.names, norms, strict=True) if not math.isfinite(norm))
        return StepStats(loss, grad_norm, bool(stop), bad, balance, counts)


class TrainingStep:
    """The model, compiled if requested, and its optimizers; micro_batch sequences per forward pass."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        micro_batch: int,
        grad_clip: float = 1.0,
        compiled: bool = False,
        sharding: Sharding | None = None,
        backend: str | Callable = "inductor",
    ) -> None:
        self.model, self.optimizers = model, optimizers
        self.micro_batch, self.grad_clip = micro_batch, grad_clip
        self.sharding = sharding or Sharding(model)
        self.world_size = self.sharding.world_size
        self.forward = torch.compile(model, dynamic=False, fullgraph=True, backend=backend) if compiled else model
        self.choices = model.choices
        if compiled and model.config.experts:
            self.choices = torch.compile(model.choices, dynamic=False, fullgraph=True, backend=backend)
        self.names = tuple(share.name for share in self.sharding.shares)
        self.mixture = model.config.experts > 0
        self.device = model.embedding.device
        self.times = Times(self.device)

    def gradients(self, batch_BT1: Tensor, stop_requested: bool = False, times: Times | None = None) -> PendingStats:
        """Gradients of the mean loss over the global batch, accumulated over micro-batches and summed over ranks,
        which keep their shares.

        `batch_BT1` is this rank's share: integer tokens, one more per row than the model reads, rows a multiple of
        micro_batch. Returns the loss in nats, the norm before clipping, and whether any rank received a signal; gives
        the optimizers the clip factor and the flag to skip. `times` gets the marks, by default new ones.
        """
        self.times = times or Times(self.device)
        if len(batch_BT1) % self.micro_batch:
            raise ValueError(f"{len(batch_BT1)} rows are not a multiple of the micro-batch {self.micro_batch}")
        micro_batches = batch_BT1.to(self.device, non_blocking=True).long().split(self.micro_batch)
        self.times.mark("transfer")
        loss, balance = torch.zeros((2,), device=self.device)
        counts = torch.zeros_like(self.model.expert_counts, dtype=torch.float32) if self.mixture else None
        if self.mixture and self.model.config.balance:
            self.model.whole_batch = len(micro_batches) > 1 or self.world_size > 1
            if self.model.whole_batch:
                self.model.batch_shares.copy_(self._batch_shares(micro_batches))
                self.times.mark("forward")
        for rows in micro_batches:
            parts = len(micro_batches) * self.world_size
            share = self.forward(rows[:, :-1], rows[:, 1:]) / parts
            self.times.mark("forward")
            share.backward()
            self.times.mark("backward")
            loss += share.detach()
            if self.mixture:
                counts += self.model.expert_counts
                balance += self.model.balance_loss / parts
        of_experts = torch.cat((balance[None], counts.flatten())) if self.mixture else loss.new_empty(0)
        stop = torch.full((), float(stop_requested), device=self.device)
        self.sharding.reduce_gradients()
        shared = torch.cat((torch.stack((loss, stop)), self.sharding.squared_norms(), of_experts))
        if self.world_size > 1:
            dist.all_reduce(shared)
        loss, stop = shared[:2]
        norms, of_experts = shared[2 : 2 + len(self.names)].sqrt(), shared[2 + len(self.names) :]
        grad_norm = torch.linalg.vector_norm(norms)
        found_inf = (~torch.isfinite(loss + grad_norm)).float()
        clip = torch.clamp(grad_norm / self.grad_clip, min=1.0) if self.grad_clip else torch.ones_like(loss)
        for optimizer in self.optimizers:
            optimizer.grad_scale, optimizer.found_inf = clip, found_inf
        if self.mixture:  # reported by itself, though it is part of what is minimised
            loss = loss - of_experts[0]
        values = torch.cat((torch.stack((loss, grad_norm, stop)), norms, of_experts))
        return PendingStats(values, self.names, self.model.config.layers if self.mixture else 0)

    def _batch_shares(self, micro_batches: Sequence[Tensor]) -> Tensor:
        """The share of the choices that fall on each expert over the global batch, (layers, experts).

        The load-balancing loss of a batch is a product of two means over it, so that of its parts does not add up to
        it: this pass without gradients finds one factor, the passes with gradients that follow use it.
        """
        with random_numbers_kept(self.device):  # noise and dropout are drawn again alike
            counts = sum(self.choices(rows[:, :-1]) for rows in micro_batches).float()
        if self.world_size > 1:
            dist.all_reduce(counts)
        return counts / counts.sum(-1, keepdim=True)

    @torch.no_grad()
    def bank_momenta(self) -> list[Tensor] | None:
        """What `apply` will make each bank's update of, on every rank, which all must ask for: Muon's input of
        Newton-Schulz, AdamW's first moment; from the gradients as they are after clipping. None where a user's
        optimizer trains the banks."""
        if any(isinstance(o, OwnOptimizer) for o in self.optimizers):
            return None
        owner = {id(p): o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        found = []
        for p in self.sharding.banks:
            share = self.sharding.share_of[id(p)]
            own = None if share.own is None else next_momentum(owner[id(share.own)], share.own)
            found.append(self.sharding.whole(share, own))
        return found

    def apply(self) -> Times:
        """The optimizers' step on the gradients, clipped, or nothing where they are not finite; frees the gradients."""
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.sharding.gather()
        self.times.mark("optimizer")
        return self.times

    def warm_up(self, tokens_BT1: Tensor) -> None:
        """A few steps on made-up tokens, so that compilation and first launches come before the clock starts.

        All are undone: weights, optimizer state and random numbers are as before a first step.
        """
        weights = [p.detach().clone() for p in self.model.parameters()]
        with random_numbers_kept(self.device):
            for _ in range(WARMUP_STEPS):
                self.gradients(tokens_BT1)
                self.apply()
        with torch.no_grad():
            for p, weight in zip(self.model.parameters(), weights, strict=True):
                p.copy_(weight)
            for o in self.optimizers:
                if isinstance(o, OwnOptimizer):
                    o.reset()
                    continue
                for tensor in (t for state in o.state.values() for t in state.values()):
                    tensor.zero_()  # in place: a captured step keeps reading it


def next_momentum(optimizer: torch.optim.Optimizer, p: Tensor) -> Tensor:
    """Muon's `next_input`, or the first moment that AdamW's next step makes of a parameter's gradient, in its shape."""
    if isinstance(optimizer, Muon):
        return optimizer.next_input(p)
    beta = next(group["betas"][0] for group in optimizer.param_groups if any(p is one for one in group["params"]))
    before = optimizer.state[p].get("exp_avg", torch.zeros_like(p))
    return before.lerp(p.grad / optimizer.grad_scale, 1 - beta)


@contextlib.contextmanager
def random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Draw in the body without consequence. CUDA is asked only where it trains: a forked worker cannot start it."""
    cuda = device.type == "cuda"
    states = torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else None
    yield
    torch.set_rng_state(states[0])
    if cuda:
        torch.cuda.set_rng_state_all(states[1])


class Evaluation(NamedTuple):
    """Mean loss in nats, next-token accuracy, and the mean loss over the targets of each decile, NaN where there are
    none."""

    loss: float
    accuracy: float
    by_decile: list[float]


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[np.ndarray], deciles_V: Tensor, world_size: int = 1) -> Evaluation:
    """The losses of this rank's `batches` of token rows and all other ranks'; `deciles_V` is the decile of each token
    id (corpus/frequency.py)."""
    model.eval()
    device = model.embedding.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, tokens
    by_decile = torch.zeros(2, DECILES, dtype=torch.float64, device=device)  # loss, tokens
    for batch in batches:
        rows = torch.from_numpy(batch).to(device).long()
        targets = rows[:, 1:].flatten()
        loss, losses, correct = token_losses(model(rows[:, :-1]), targets)
        sums[0] += loss
        sums[1] += correct.sum()
        sums[2] += len(targets)
        of_targets = torch.stack((losses.double(), torch.ones_like(losses, dtype=torch.float64)))
        by_decile.index_add_(1, deciles_V[targets], of_targets)
    if world_size > 1:
        dist.all_reduce(sums)
        dist.all_reduce(by_decile)
    model.train()
    loss, accuracy = (sums[:2] / sums[2]).tolist()
    return Evaluation(loss, accuracy, (by_decile[0] / by_decile[1]).tolist())


def token_losses(logits_BTV: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the cross-entropies of B T targets in nats, each of them, and whether each has the largest logit."""
    logits = logits_BTV.flatten(0, 1).float()
    log_p = F.log_softmax(logits, dim=-1)
    # The sum as F.cross_entropy makes it, whose order of adding is its own: no loss changes by a bit.
    loss = F.nll_loss(log_p, targets, reduction="sum")
    return loss, -log_p.gather(1, targets[:, None])[:, 0], logits.argmax(dim=-1) == targets
