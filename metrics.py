"""Spectral metrics of every weight matrix, each defined once, and the worker that logs them next to the training loop.

    spectrum = decompose(W_BMN); record = projection_record(spectrum.of(0), of_update, of_gradient)
    recorder = SpectraRecorder(model, path); recorder.before_update(gradients, momenta=momenta); optimizer.step()
    recorder.record(step, tokens); recorder.flush(); recorder.close()

Float64 throughout, by the symmetric eigenproblem of the smaller Gram matrix: `python -m bench.spectra` shows its error
and its time next to those of an SVD. An undefined value is None (JSON null), never 0.0 or NaN. An event costs the loop
one copy of the block matrices, their gradients, momenta and update, asynchronous on a GPU; the worker writes its lines
in one piece.
"""

import functools
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.cli import RunFailed
from engine.eigh import eigh_leading, eigh_values
from engine.files import SUBSPACE_RANK, JsonlWriter, finite
from kernels.optimizer import scales_of
from model import Bank, Transformer

UPDATE_KEYS = (
    "left_alignment",
    "right_alignment",
    "grad_norm",
    "grad_effective_rank",
    "grad_stable_rank",
    "grad_condition",
    "update_norm",
    "update_effective_rank",
    "update_gap",
    "ns_residual",
)
MOMENTUM_KEYS = (
    "momentum_stable_rank",
    "momentum_effective_rank",
    "momentum_below_range",
    "momentum_range",
    "momentum_singular_values",
)
MOMENTUM_DIGITS = 4  # of each singular value, which are many
# Eigenvalues of a Gram matrix below this times its larger side, as a share of the largest, are rounding: singular
# values below 7e-7 of the largest read as 0 at 2048 x 512. Weights in fp32 have no more digits.
ROUNDING = torch.finfo(torch.float64).eps
LEAST_PRIORITY = 19  # of a thread on Linux: on a CPU spectra take the time that training leaves
QUEUE_EVENTS = 2  # of the 88M model one holds 0.8 GB
DECOMPOSED_BYTES = 2**28  # of float64 matrices at once in the worker


def entropy_nats(singular_values: Tensor) -> float:
    """-sum p ln p with p = s / sum s; NaN for a zero matrix."""
    p = singular_values / singular_values.sum()
    return -torch.xlogy(p, p).sum().item()


def spectral_metrics(singular_values: Tensor) -> dict[str, Any]:
    """The metrics that need only the singular values (descending, float64) of a matrix.

    spectral_norm s_1; entropy -sum p ln p in nats, p = s / sum s; effective_rank exp(entropy) (Roy & Vetterli 2007);
    spectral_entropy -sum q ln q / ln r, q = s² / sum s²; stable_rank sum s² / s_1²; orthogonality_error
    |(W/s_1)ᵀ(W/s_1) - I|_F / sqrt(r) on the small side; weight_norm |W|_F.
    """
    s, r = singular_values, len(singular_values)
    energy = s.square().sum()
    q = s.square() / energy
    relative = s / s[0]
    entropy = entropy_nats(s)
    values = {
        "spectral_norm": s[0].item(),
        "spectral_entropy": -torch.xlogy(q, q).sum().item() / math.log(r) if r > 1 else math.nan,
        "entropy": entropy,
        "effective_rank": math.exp(entropy),
        "stable_rank": (energy / s[0].square()).item(),
        "weight_norm": energy.sqrt().item(),
        "orthogonality_error": (relative.square() - 1).square().mean().sqrt().item(),
    }
    return {"singular_values": [finite(v) for v in s.tolist()]} | {k: finite(v) for k, v in values.items()}


class Spectrum(NamedTuple):
    """Singular values (r,), descending, and the leading left (m, k) and right (n, k) subspaces of one matrix, or of a
    batch of them with one more dimension in front; all NaN for a matrix that is not finite."""

    singular_values: Tensor
    left: Tensor
    right: Tensor

    @property
    def mT(self) -> "Spectrum":
        """The spectrum of the transpose."""
        return Spectrum(self.singular_values, self.right, self.left)

    def of(self, i: int) -> "Spectrum":
        """The spectrum of one matrix of a batch."""
        return Spectrum(*(tensor[i] for tensor in self))


def decompose(matrices: Tensor) -> Spectrum:
    """The spectra of a batch (B, m, n): singular values to 1e-5 of themselves wherever they exceed 1e-3 of the largest
    (in fact to about 1e-9), subspaces as an SVD gives them."""
    m, n = matrices.shape[1:]
    small, finite = _small_side(matrices)
    eigenvalues, near = eigh_leading(small @ small.mT, min(SUBSPACE_RANK, m, n))
    s = _roots(eigenvalues, finite, max(m, n))
    far = small.mT @ near
    far = far / torch.linalg.vector_norm(far, dim=1, keepdim=True)  # NaN where s_k is 0: there is no such direction
    return Spectrum(s, far, near) if m > n else Spectrum(s, near, far)


def singular_values(matrices: Tensor) -> Tensor:
    """Those of `decompose` alone, (B, r)."""
    small, finite = _small_side(matrices)
    return _roots(eigh_values(small @ small.mT), finite, max(matrices.shape[1:]))


def _small_side(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """A batch in float64 with rows on the smaller side, zero where a matrix is not finite, and which ones are."""
    X, finite = matrices.double(), matrices.isfinite().all(dim=-1).all(dim=-1)
    if not finite.all():
        X = torch.where(finite[:, None, None], X, 0.0)
    return X.mT if X.shape[1] > X.shape[2] else X, finite


def _roots(eigenvalues: Tensor, finite: Tensor, side: int) -> Tensor:
    """Singular values from the eigenvalues of Gram matrices, 0 where those are rounding."""
    largest = eigenvalues[:, :1].clamp(min=0.0)
    eigenvalues = torch.where(eigenvalues <= side * ROUNDING * largest, 0.0, eigenvalues)  # NaN stays
    return torch.where(finite[:, None], eigenvalues.sqrt(), math.nan)


def alignment(subspace_a: Tensor, subspace_b: Tensor) -> float:
    """Mean cosine of the principal angles between two subspaces given by orthonormal columns; 1 = the same."""
    return torch.linalg.svdvals(subspace_a.mT @ subspace_b).mean().item()


@functools.cache
def chance_alignment(dimension: int, k: int, trials: int = 1000) -> float:
    """Expected `alignment` of two independent random k-dimensional subspaces of R^dimension, by simulation.

    One of them may be taken as the first k coordinates, so only the top block of the other's basis matters.
    """
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(trials):
        basis = torch.linalg.qr(torch.randn(dimension, k, dtype=torch.float64, generator=generator)).Q
        total += torch.linalg.svdvals(basis[:k]).mean().item()
    return total / trials


def projection_record(
    weight: Spectrum, update: Spectrum | None, gradient: Tensor | None, ns_residual: float | None = None
) -> dict[str, Any]:
    """Every metric of one projection (out, in) from its spectra; update keys are None without an update.

    `gradient` are singular values; grad_condition is s_1 / s_r, None where s_r is 0. update_gap is s_k - s_{k+1} of the
    update (k = 5): the smaller it is compared with s_k, the more arbitrary are the update's top directions, and their
    alignment.
    """
    k, rows, cols = weight.left.shape[1], len(weight.left), len(weight.right)
    record = spectral_metrics(weight.singular_values) | dict.fromkeys(UPDATE_KEYS)
    record["left_alignment_chance"] = finite(chance_alignment(rows, k))
    record["right_alignment_chance"] = finite(chance_alignment(cols, k))
    if gradient is not None:
        energy = gradient.square().sum()
        record["grad_norm"] = finite(energy.sqrt().item())
        record["grad_effective_rank"] = finite(math.exp(entropy_nats(gradient)))
        record["grad_stable_rank"] = finite((energy / gradient[0].square()).item())
        record["grad_condition"] = finite((gradient[0] / gradient[-1]).item())
    if ns_residual is not None:
        record["ns_residual"] = finite(ns_residual)
    if update is not None:
        s = update.singular_values
        record["update_norm"] = finite(torch.linalg.vector_norm(s).item())
        record["update_effective_rank"] = finite(math.exp(entropy_nats(s)))
        if len(s) > k:
            record["update_gap"] = finite((s[k - 1] - s[k]).item())
        if weight.singular_values[k - 1] > 0 and s[k - 1] > 0:
            record["left_alignment"] = finite(alignment(weight.left, update.left))
            record["right_alignment"] = finite(alignment(weight.right, update.right))
    return record


def momentum_record(momentum: Tensor | None, least: float | None) -> dict[str, Any]:
    """The metrics of a momentum's singular values s (descending, float64), None without one: its ranks, and the share
    of the s with s / |s| < `least`, the lower end of the range that Newton-Schulz brings to 0.5 or more; None where it
    is not iterated."""
    record: dict[str, Any] = dict.fromkeys(MOMENTUM_KEYS)
    if momentum is None:
        return record
    energy = momentum.square().sum()
    record["momentum_stable_rank"] = finite((energy / momentum[0].square()).item())
    record["momentum_effective_rank"] = finite(math.exp(entropy_nats(momentum)))
    if least is not None:
        record["momentum_range"] = finite(least)
        if energy > 0:
            record["momentum_below_range"] = finite((momentum < least * energy.sqrt()).double().mean().item())
    values = momentum.tolist()
    record["momentum_singular_values"] = [
        float(f"{s:.{MOMENTUM_DIGITS}g}") if math.isfinite(s) else None for s in values
    ]
    return record


class WorkerFailed(RunFailed):
    """The worker died; the message is its reason."""


class Momenta(NamedTuple):
    """What each bank's update is made of (`TrainingStep.bank_momenta`), and the least singular value, as a share of the
    Frobenius norm, that Newton-Schulz brings to 0.5 or more (kernels/newton_schulz.py: `reach`); None where nothing is
    iterated."""

    banks: list[Tensor]
    least: float | None


class MuonStep(NamedTuple):
    """What Muon's update was made with: the projections that it trains, and their settings at that step."""

    names: Sequence[str]
    lr: float
    weight_decay: float
    lr_scale: str


def ns_residuals(weights: Tensor, updates: Tensor, spectrum: Spectrum, bank: Bank, muon: MuonStep) -> Tensor:
    """|O Oᵀ - I|_F / sqrt(r) on the small side for each matrix of a bank, O what Muon subtracted from the weights over
    rate and scale: 0 where it is orthogonal, 1 where it is 0. `spectrum` is that of the updates: without weight decay
    they are O already; with it the decay is taken out, and the Gram matrix made in fp32, good to 1e-6 of I."""
    W, dW = weights.flatten(0, -3), updates.flatten(0, -3)
    scales = scales_of(W.shape, {"lr_scale": muon.lr_scale, "transposed": bank.transposed})
    step = muon.lr * torch.tensor(scales, dtype=torch.float64)[:, None]
    if not muon.weight_decay:
        return ((spectrum.singular_values / step).square() - 1).square().mean(-1).sqrt()
    small = torch.add(dW, W - dW, alpha=muon.lr * muon.weight_decay) / step[:, None].float()
    small = small.mT if small.shape[1] > small.shape[2] else small
    excess = small @ small.mT - torch.eye(small.shape[1])
    return torch.linalg.matrix_norm(excess) / small.shape[1] ** 0.5


@dataclass(frozen=True)
class Event:
    """The block matrices after an update, what it changed, its gradients and momenta, and what Muon made it with; all
    but the weights are None where there was no update, the last one also where there is no Muon."""

    step: int
    tokens: int
    weights: list[Tensor]
    updates: list[Tensor] | None
    gradients: list[Tensor] | None
    momenta: Momenta | None
    muon: MuonStep | None
    copied: torch.cuda.Event | None


class SpectraRecorder:
    """Writes one line per projection to `path` at each event, and hands the lines to each of `listeners`; close it, or
    its last events are lost. `seconds_blocked` is how long its calls held up the loop. Projections named in `cut` are
    orthogonalised in parts: no `ns_residual` or reach of theirs is logged."""

    def __init__(
        self,
        model: Transformer,
        path: Path,
        listeners: Iterable[Callable[[Sequence[dict[str, Any]]], None]] = (),
        seconds_blocked: float = 0.0,
        cut: Collection[str] = (),
    ) -> None:
        self.cut = cut
        self.model, self.writer, self.listeners = model, JsonlWriter(path), list(listeners)
        self.device = model.embedding.device
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.seconds_blocked = seconds_blocked
        self.before: list[Tensor] | None = None
        self.gradients: list[Tensor] | None = None
        self.momenta: Momenta | None = None
        self.muon: MuonStep | None = None
        self.failure: BaseException | None = None
        self.events: queue.Queue[Event | None] = queue.Queue(QUEUE_EVENTS)
        self.worker = threading.Thread(target=self._work, name="spectra", daemon=True)
        self.worker.start()

    @torch.no_grad()
    def before_update(
        self, gradients: list[Tensor], muon: MuonStep | None = None, momenta: Momenta | None = None
    ) -> None:
        """Keep the weights as they are before the optimizer touches them, and each bank's gradient and momentum, which
        must be copies."""
        start = time.perf_counter()
        self.before = [bank.parameter.detach().clone() for bank in self.model.banks()]
        self.gradients, self.momenta, self.muon = gradients, momenta, muon
        self.seconds_blocked += time.perf_counter() - start

    @torch.no_grad()
    def record(self, step: int, tokens: int) -> None:
        """Snapshot the weights and, if `before_update` was called, the update since, for the worker to measure."""
        start = time.perf_counter()
        self.check()
        weights = [bank.parameter.detach().clone() for bank in self.model.banks()]
        updates = (
            None if self.before is None else [torch.sub(w, b, out=b) for w, b in zip(weights, self.before, strict=True)]
        )
        copied, gradients, momenta, muon = None, self.gradients, self.momenta, self.muon
        if self.stream is not None:  # the copies overlap with what the device does next
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                weights, updates, gradients = (self._to_host(t) for t in (weights, updates, gradients))
                momenta = momenta and momenta._replace(banks=self._to_host(momenta.banks))
                copied = torch.cuda.Event()
                copied.record()
        self.before = self.gradients = self.momenta = self.muon = None
        self._put(Event(step, tokens, weights, updates, gradients, momenta, muon, copied))
        self.seconds_blocked += time.perf_counter() - start

    def _to_host(self, tensors: list[Tensor] | None) -> list[Tensor] | None:
        if tensors is None:
            return None
        for tensor in tensors:
            tensor.record_stream(self.stream)
        return [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]

    def _put(self, event: Event | None) -> None:
        while True:
            self.check()
            try:
                return self.events.put(event, timeout=0.1)
            except queue.Full:
                continue

    def check(self) -> None:
        """WorkerFailed if the worker has failed, or is gone and leaves events unmeasured."""
        if self.failure is not None:
            raise WorkerFailed(f"spectra: {type(self.failure).__name__}: {self.failure}") from self.failure
        if self.events.unfinished_tasks and not self.worker.is_alive():
            raise WorkerFailed("spectra: the worker stopped unexpectedly")

    def flush(self) -> None:
        """Wait until every event so far is on disk."""
        start = time.perf_counter()
        with self.events.all_tasks_done:  # as events.join() does, which would wait endlessly for a dead worker
            while self.events.unfinished_tasks and self.worker.is_alive():
                self.events.all_tasks_done.wait(timeout=0.5)
        self.writer.sync()
        self.seconds_blocked += time.perf_counter() - start
        self.check()

    def close(self) -> None:
        """Let the worker finish what is queued, and end it; a failure is raised by `flush`, not here."""
        if self.worker.is_alive():
            self.events.put(None)
            self.worker.join()

    def _work(self) -> None:
        # A second pool of OpenMP threads during a training on the CPU cost every step 25 % (bench/LOG.md).
        torch.set_num_threads(1 if self.stream is None else max(1, (os.cpu_count() or 2) - 1))
        if self.stream is None and sys.platform == "linux":  # the training's core is this one too
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEAST_PRIORITY)
        ended = False
        while not ended:
            event = self.events.get()
            try:
                ended = event is None
                if not ended and self.failure is None:
                    self._measure(event)
            except BaseException as failure:
                self.failure = failure
            finally:
                del event  # its memory must not wait for the next one
                self.events.task_done()

    def _measure(self, event: Event) -> None:
        if event.copied is not None:
            event.copied.synchronize()
        of_weights = [decompose_bank(bank) for bank in event.weights]
        of_updates = event.updates and [decompose_bank(bank) for bank in event.updates]
        of_gradients = event.gradients and singular_values_of(event.gradients)
        of_momenta = event.momenta and singular_values_of(event.momenta.banks)
        residuals = self._residuals(event, of_updates)
        lines = []
        for place in self.model.places():
            of_weight = of_weights[place.bank].of(place.index)
            of_update = of_updates and of_updates[place.bank].of(place.index)
            if place.transposed:
                of_weight, of_update = of_weight.mT, of_update and of_update.mT
            of_gradient = None if of_gradients is None else of_gradients[place.bank][place.index]
            of_momentum = None if of_momenta is None else of_momenta[place.bank][place.index]
            least = event.momenta and event.momenta.least
            residual = None if residuals[place.bank] is None else residuals[place.bank][place.index].item()
            if place.name in self.cut:  # what was orthogonalised are its parts
                least = residual = None
            line = {"step": event.step, "tokens": event.tokens, "layer": place.layer, "proj": place.name}
            if place.expert is not None:
                line["expert"] = place.expert
            line |= projection_record(of_weight, of_update, of_gradient, residual)
            lines.append(line | momentum_record(of_momentum, least))
        self.writer.write(*lines)
        for listener in tuple(self.listeners):
            try:
                listener(lines)
            except Exception as failure:  # a live view is no reason to lose a run
                print(f"a live view of the spectra ends here: {type(failure).__name__}: {failure}", file=sys.stderr)
                self.listeners.remove(listener)

    def _residuals(self, event: Event, of_updates: list[Spectrum] | None) -> list[Tensor | None]:
        """`ns_residuals` of each bank; None for one that Muon does not train."""
        muon, banks = event.muon, self.model.banks()
        if muon is None or of_updates is None:
            return [None] * len(banks)
        of = zip(event.weights, event.updates, of_updates, banks, strict=True)
        return [ns_residuals(*tensors, b, muon) if set(b.members) <= set(muon.names) else None for *tensors, b in of]


def decompose_bank(bank: Tensor) -> Spectrum:
    """The spectra of all matrices of a bank."""
    return Spectrum(*(torch.cat(tensors) for tensors in zip(*measure_bank(bank, decompose), strict=True)))


def singular_values_of(banks: Sequence[Tensor]) -> list[Tensor]:
    """The singular values of all matrices of each bank."""
    return [torch.cat(measure_bank(bank, singular_values)) for bank in banks]


def measure_bank(bank: Tensor, measure: Callable[[Tensor], Any]) -> list[Any]:
    """What `measure` finds in the matrices of a bank, a bounded number of them at a time."""
    matrices = bank.flatten(0, -3)
    at_once = max(1, DECOMPOSED_BYTES // (8 * matrices[0].numel()))
    return [measure(part) for part in matrices.split(at_once)]
