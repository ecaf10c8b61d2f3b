"""Watching the weights without holding up the training: snapshots in the loop, metrics and files in a worker.

    recorder = SpectraRecorder(model, path); recorder.before_update(norms); optimizer.step()
    recorder.record(step, tokens); recorder.flush(); recorder.close()

An event costs the loop a copy of the block matrices and of their update, on a GPU asynchronous. At most QUEUE_EVENTS
wait for the worker; after that the loop waits for it. An event's lines are written in one piece, so a killed run has
whole events only; a worker that failed says so at the next call.
"""

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.cli import RunFailed
from engine.files import JsonlWriter
from metrics import Spectrum, decompose, projection_record
from model import Transformer

QUEUE_EVENTS = 2  # of the 88M model one holds 0.5 GB
DECOMPOSED_BYTES = 2**28  # of float64 matrices at once in the worker


class WorkerFailed(RunFailed):
    """The worker died; the message is its reason."""


@dataclass(frozen=True)
class Event:
    """The block matrices after an update, what it changed, and the norms of its gradients; update and norms are None
    where there was no update."""

    step: int
    tokens: int
    weights: list[Tensor]
    updates: list[Tensor] | None
    grad_norms: list[Tensor] | None
    copied: torch.cuda.Event | None


class SpectraRecorder:
    """Writes one line per projection to `path` at each event, and hands the lines to `listener`; close it, or its last
    events are lost. `seconds_blocked` is how long its calls held up the loop."""

    def __init__(
        self, model: Transformer, path: Path, listener: Callable[[Sequence[dict[str, Any]]], None] | None = None
    ) -> None:
        self.model, self.writer, self.listener = model, JsonlWriter(path), listener
        self.device = model.embedding.device
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.seconds_blocked = 0.0
        self.before: list[Tensor] | None = None
        self.grad_norms: list[Tensor] | None = None
        self.failure: BaseException | None = None
        self.events: queue.Queue[Event | None] = queue.Queue(QUEUE_EVENTS)
        self.worker = threading.Thread(target=self._work, name="spectra", daemon=True)
        self.worker.start()

    @torch.no_grad()
    def before_update(self, grad_norms: list[Tensor]) -> None:
        """Keep the weights as they are before the optimizer touches them, and the norm of every matrix's gradient: for
        each bank (B,), in float64."""
        start = time.perf_counter()
        self.before = [bank.parameter.detach().clone() for bank in self.model.banks()]
        self.grad_norms = grad_norms
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
        copied = None
        if self.stream is not None:  # the copies overlap with what the device does next
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                weights, updates, norms = (self._to_host(t) for t in (weights, updates, self.grad_norms))
                copied = torch.cuda.Event()
                copied.record()
        else:
            norms = self.grad_norms
        self.before = self.grad_norms = None
        self._put(Event(step, tokens, weights, updates, norms, copied))
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
        with self.events.all_tasks_done:  # as events.join() does, which would wait for a dead worker for ever
            while self.events.unfinished_tasks and self.worker.is_alive():
                self.events.all_tasks_done.wait(timeout=0.5)
        self.writer.sync()
        self.seconds_blocked += time.perf_counter() - start
        self.check()

    def close(self) -> None:
        """Let the worker finish what is queued, and end it; says nothing of a failure, which `flush` does."""
        if self.worker.is_alive():
            self.events.put(None)
            self.worker.join()

    def _work(self) -> None:
        # A second pool of OpenMP threads beside a training on the CPU cost every step 25 % (bench/LOG.md).
        torch.set_num_threads(1 if self.stream is None else max(1, (os.cpu_count() or 2) - 1))
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
        of_updates = None if event.updates is None else [decompose_bank(bank) for bank in event.updates]
        lines = []
        for place in self.model.places():
            of_weight = of_weights[place.bank].of(place.index)
            of_update = None if of_updates is None else of_updates[place.bank].of(place.index)
            if place.transposed:
                of_weight, of_update = of_weight.mT, of_update and of_update.mT
            grad_norm = None if event.grad_norms is None else event.grad_norms[place.bank][place.index].item()
            line = {"step": event.step, "tokens": event.tokens, "layer": place.layer, "proj": place.name}
            if place.expert is not None:
                line["expert"] = place.expert
            lines.append(line | projection_record(of_weight, of_update, grad_norm))
        self.writer.write(*lines)
        if self.listener is not None:
            try:
                self.listener(lines)
            except Exception as failure:  # a live view is no reason to lose a run
                print(f"the live view of the spectra ends here: {type(failure).__name__}: {failure}", file=sys.stderr)
                self.listener = None


def decompose_bank(bank: Tensor) -> Spectrum:
    """The spectra of all matrices of a bank, a bounded number of them at a time."""
    matrices = bank.flatten(0, -3)
    at_once = max(1, DECOMPOSED_BYTES // (8 * matrices[0].numel()))
    parts = [decompose(part) for part in matrices.split(at_once)]
    return Spectrum(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
