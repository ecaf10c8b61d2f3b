"""What a training step keeps on the device, counted from the model's shape, and the micro-batch that fits.

    count = MemoryCount(model, "muon", sequences=8, seq_len=2048); count.largest_micro_batch(); count.describe(8)

A count, not a measurement: tensors that the backward pass reads, weights, gradients and optimizer state; fragments of
the allocator and cuBLAS's workspaces are the SLACK.
"""

from dataclasses import dataclass

import torch

from model import Transformer

SLACK = 0.1  # of the device's free memory that is left alone
GIB = 2**30


@dataclass(frozen=True)
class MemoryCount:
    """One update of `sequences` sequences per rank of `seq_len` tokens, in micro-batches yet to be chosen."""

    model: Transformer
    optimizer: str
    sequences: int
    seq_len: int

    def bytes_by_purpose(self, micro_batch: int) -> dict[str, int]:
        """Bytes with `micro_batch` sequences per forward pass."""
        model, c, tokens = self.model, self.model.config, micro_batch * self.seq_len
        item = torch.empty((), dtype=model.compute_dtype).element_size()
        parameters = model.parameter_count()
        in_banks = sum(bank.parameter.numel() for bank in model.banks())
        moments = 2 * parameters - (in_banks if self.optimizer == "muon" else 0)
        # Per layer: both residual inputs and their norms, queries, keys and values before and after norm and rotation,
        # the attention's output, and the feed-forward before and after its activation (the kernel keeps the latter).
        heads_width = c.head_width * (c.heads + 2 * c.kv_heads)
        ffn_widths = 1 if model.fuses_ffn else 3 if c.ffn == "swiglu" else 2
        widths = 5 * c.d_model + 2 * heads_width + ffn_widths * c.d_ff
        # Logits and their gradient in the compute type, and in fp32 where nothing fuses the loss.
        per_logit = item if model.kernels else 2 * item + 4
        return {
            "weights": 4 * parameters,
            "gradients": 4 * parameters,
            "moments": 4 * moments,
            "compute copies": item * parameters if item < 4 else 0,
            "activations": item * tokens * (c.layers * widths + 2 * c.d_model),
            "logits": per_logit * tokens * model.vocab_size,
        }

    def total_bytes(self, micro_batch: int) -> int:
        return sum(self.bytes_by_purpose(micro_batch).values())

    def largest_micro_batch(self, available_bytes: int | None = None) -> int:
        """The largest divisor of `sequences` that is counted to fit this GPU's free memory; 1 if none does."""
        if available_bytes is None:
            available_bytes, _ = torch.cuda.mem_get_info(self.model.embedding.device)
        divisors = (m for m in range(self.sequences, 0, -1) if self.sequences % m == 0)
        return next((m for m in divisors if self.total_bytes(m) <= (1 - SLACK) * available_bytes), 1)

    def describe(self, micro_batch: int) -> str:
        """One line for people: the total and its parts."""
        parts = ", ".join(f"{purpose} {size / GIB:.2f}" for purpose, size in self.bytes_by_purpose(micro_batch).items())
        return f"{self.total_bytes(micro_batch) / GIB:.2f} GiB by count at --micro-batch {micro_batch} ({parts})"

    def misfit(self, micro_batch: int) -> str:
        """What to say when the device ran out of memory, with a smaller micro-batch that is counted to fit."""
        if micro_batch == 1:
            return "one sequence does not fit this device; choose a smaller --model or --seq-len"
        device = self.model.embedding.device
        total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else self.total_bytes(micro_batch)
        smaller = max(m for m in range(1, micro_batch) if self.sequences % m == 0)
        fitting = min(smaller, self.largest_micro_batch(total))
        return f"--micro-batch {micro_batch} does not fit this device; {fitting} should: {self.describe(fitting)}"
