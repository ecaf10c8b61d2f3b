"""What a training step keeps on the device, counted from the model's shape, and the micro-batch that fits.

    count = MemoryCount(model, "muon", sequences=8, seq_len=2048); count.largest_micro_batch(); count.describe(8)

A count, not a measurement: tensors that the backward pass reads, weights, gradients and optimizer state; fragments of
the allocator and cuBLAS's workspaces are the SLACK. Only available_bytes and peak_bytes ask the device.
"""

import resource
from dataclasses import dataclass

import torch
from torch import nn

from engine.cli import GIB, BadInput
from kernels.attention import MAX_T
from kernels.cross_entropy import chunk_rows

SLACK = 0.1  # of the device's free memory that is left alone
CPU_MICRO_BATCH_TOKENS = 2048  # more gain nothing (bench/LOG.md)


@dataclass(frozen=True)
class MemoryCount:
    """One step on `sequences` sequences of `seq_len` tokens per rank, in micro-batches yet to be chosen."""

    model: nn.Module
    optimizer: str
    sequences: int
    seq_len: int
    compiled: bool = False
    on_muon: int | None = None
    """Elements with one moment instead of two, unless they are those of the banks."""

    def bytes_by_purpose(self, micro_batch: int) -> dict[str, int]:
        """Bytes with `micro_batch` sequences per forward pass."""
        model, c, tokens = self.model, self.model.config, micro_batch * self.seq_len
        item = torch.empty((), dtype=model.compute_dtype).element_size()
        parameters = model.parameter_count()
        in_banks = sum(bank.parameter.numel() for bank in model.banks())
        on_muon = in_banks if self.on_muon is None else self.on_muon
        moments = 2 * parameters - (on_muon if self.optimizer == "muon" else 0)
        # Per layer: both residual inputs and their norms, queries, keys and values before and after norm and rotation,
        # the attention's output, and the feed-forward before and after its activation (the kernel keeps the latter).
        heads_width = c.head_width * (c.heads + 2 * c.kv_heads)
        ffn_widths = 1 if "relu2_mlp" in model.kernels and c.ffn == "relu2" else 4 if c.ffn == "swiglu" else 2
        widths = 5 * c.d_model + 2 * heads_width + ffn_widths * c.d_ff * (c.top_k if c.experts else 1)
        if c.inner_dropout:  # the probabilities, whole, before and after some are dropped; and the hidden layer
            widths += 2 * c.heads * self.seq_len + c.d_ff * (c.top_k if c.experts else 1)
        elif "attention" in model.kernels and self.seq_len <= MAX_T:  # half of the probabilities
            widths += c.heads * self.seq_len // 2
        if c.experts:  # also the routed inputs and outputs, and the router's input in fp32
            widths += 2 * c.top_k * c.d_model + 4 * c.d_model // item
        # Logits and their gradient in the compute type; in fp32 one copy, eagerly three: widened, softmax, gradient.
        logits = tokens * model.vocab_size * (2 * item + (4 if self.compiled else 12))
        if "cross_entropy" in model.kernels:
            rows = chunk_rows(model.vocab_size, item, model.embedding.device.type != "cpu")
            logits = item * model.vocab_size * min(tokens, rows)
        return {
            "weights": 4 * parameters,
            "gradients": 4 * parameters,
            "moments": 4 * moments,
            "compute copies": item * parameters if item < 4 else 0,
            "activations": item * tokens * (c.layers * widths + 2 * c.d_model),
            "logits": logits,
        }

    def resident_bytes(self) -> int:
        """Bytes on the device between steps: weights and moments."""
        parts = self.bytes_by_purpose(1)
        return parts["weights"] + parts["moments"]

    def total_bytes(self, micro_batch: int) -> int:
        return sum(self.bytes_by_purpose(micro_batch).values())

    def largest_micro_batch(self, available_bytes: int) -> int:
        """The largest divisor of `sequences` that is counted to fit; 1 if none does."""
        divisors = (m for m in range(self.sequences, 0, -1) if self.sequences % m == 0)
        return next((m for m in divisors if self.total_bytes(m) <= (1 - SLACK) * available_bytes), 1)

    def describe(self, micro_batch: int) -> str:
        """One line for people: the total and its parts."""
        parts = ", ".join(f"{purpose} {size / GIB:.2f}" for purpose, size in self.bytes_by_purpose(micro_batch).items())
        return f"{self.total_bytes(micro_batch) / GIB:.2f} GiB by count at --micro-batch {micro_batch} ({parts})"

    def misfit(self, micro_batch: int, available_bytes: int) -> str:
        """What to say when the device ran out of memory, with a smaller micro-batch that is counted to fit."""
        if micro_batch == 1:
            return "one sequence does not fit this device; choose a smaller --model or --seq-len"
        smaller = max(m for m in range(1, micro_batch) if self.sequences % m == 0)
        fitting = min(smaller, self.largest_micro_batch(available_bytes))
        return f"--micro-batch {micro_batch} does not fit this device; {fitting} should: {self.describe(fitting)}"


def available_bytes(device: torch.device) -> int:
    """What this process may have of the device: what is free, and what it holds already."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held so far: the allocator's on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def choose_micro_batch(count: MemoryCount, wanted: int | str, device: torch.device) -> int:
    """Sequences per forward pass: the number wanted, or under "auto" the most that is counted to fit a GPU, and on a
    CPU what suits its caches. BadInput where it does not divide the batch."""
    if wanted != "auto":
        if wanted < 1 or count.sequences % wanted:
            raise BadInput(f"--micro-batch {wanted}: does not divide the {count.sequences} sequences of a rank's batch")
        return int(wanted)
    if device.type == "cuda":
        return count.largest_micro_batch(available_bytes(device))
    fitting = max(1, CPU_MICRO_BATCH_TOKENS // count.seq_len)
    return next(m for m in range(min(fitting, count.sequences), 0, -1) if count.sequences % m == 0)
