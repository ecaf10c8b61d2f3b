"""What the five documents wrote and ran, where that differs from ours: settings, corpora, and a table for each page.

    WRITTEN["S4"]["adamw"]["lr"]; CORPORA["S4"].folder; DEVIATIONS["S4"]

S0 gives no settings and S3 few: those of the author's code are used there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEEDS = (42, 137, 256)  # of S3; its runs all used 42

_CONSTANT = {"schedule": "constant", "warmup": 0.0}
_ADAMW = {"beta2": 0.999, "decay_on": "matrices"}  # one AdamW for every parameter, as PyTorch's defaults have it

_S4_DROPOUT = {"inner_dropout": 0.1}  # "in all layers"; outputs have it in every condition

# Settings of each document by optimizer. AdamW has one rate for everything; Muon's embedding has the rate named beside.
WRITTEN: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "S0": {
        "muon": _CONSTANT | {"lr": 0.024, "adamw_lr": 0.006, "momentum": 0.95, "weight_decay": 0.0},
        "adamw": _CONSTANT | _ADAMW | {"lr": 0.006, "adamw_lr": 0.006, "weight_decay": 0.2},
    },
    "S3": {
        "muon": _CONSTANT | {"lr": 0.024, "adamw_lr": 0.006, "momentum": 0.95, "weight_decay": 0.0},
        "adamw": _CONSTANT | _ADAMW | {"lr": 0.0005, "adamw_lr": 0.0005, "weight_decay": 0.2},
    },
    "S2": {
        "muon": {"lr": 0.01, "adamw_lr": 0.001, "ns_coefficients": "quintic", "decay_on": "matrices"},
        "adamw": _ADAMW | {"lr": 0.003, "adamw_lr": 0.003},
    },
    "S4": {
        "muon": _S4_DROPOUT
        | {"lr": 0.07, "adamw_lr": 0.007, "momentum": 0.9, "weight_decay": 0.2, "decay_on": "matrices"},
        "adamw": _S4_DROPOUT | _CONSTANT | _ADAMW | {"lr": 0.001, "adamw_lr": 0.001, "weight_decay": 0.1},
    },
}


@dataclass(frozen=True)
class Corpus:
    """Where a document's corpus is looked for at full scale, and the command that builds it."""

    folder: Path
    command: str


def _corpus(name: str, words: str) -> Corpus:
    return Corpus(Path("shards") / name, f"python data.py hf {words} --out shards/{name}")


CORPORA = {
    "S0": _corpus("smollm-3m", "smollm-mix --max-tokens 3e6 --val-fraction 0.05"),
    "S3": _corpus("smollm-1.75b", "smollm-mix --max-tokens 1.75e9 --val-fraction 0.01"),
    "S2": _corpus("cosmopedia-500k", "cosmopedia --max-tokens 5e5 --val-fraction 0.1"),
    "S4": _corpus("cosmopedia-2000", "cosmopedia --max-documents 2000 --val-fraction 0.1 --tokenizer gpt2"),
}

_RATES = ("learning rates", "not given", "one rate for AdamW's matrices and Muon's embedding", "own rate for each")
# Rows of (what, the document says, its code ran, here).
DEVIATIONS: Mapping[str, tuple[tuple[str, str, str, str], ...]] = {
    "S0": (
        ("optimizer", "SVD-based orthogonalisation", "Newton-Schulz, no SVD", "Newton-Schulz"),
        ("matrices", "2D parameters", "Q, K, V, O stacked as one matrix", "each projection by itself"),
        _RATES,
        ("weight decay", "not given", "0.2 for AdamW, none for Muon", "the same; theirs under 'as written'"),
        ("weights", "not given", "bf16 without a master copy", "fp32"),
    ),
    "S3": (
        ("seeds", "42, 137, 256", "42 each time, hard-coded", "each seed sets weights, batches and dropout"),
        ("tokens", "not given", "1.7 billion", "1.7 billion at full scale"),
        ("rank tiers", "an effect of training", "not compared with the start", "given at initialisation too"),
        _RATES,
    ),
    "S2": (
        ("feed-forward", "SwiGLU", "SiLU with two matrices", "SiLU with two matrices; swiglu is --ffn swiglu"),
        ("validation", "held out", "windows that overlap the training windows", "other documents, by hash"),
        ("positions", "RoPE", "RoPE along the heads", "RoPE along time"),
        ("schedule", "5 % warm-up, cosine to 10 %", "counted in micro-steps: 20 %, to 0.9 of the peak", "in steps"),
        ("rate by size", "one for all sizes", "one for all sizes", "AdamW's falls as 1 / width; theirs 'as written'"),
        ("n", "multiple seeds", "2", "3 and more"),
    ),
    "S4": (
        ("steps", "500 of 49,152 tokens", "500 micro-steps: 125 updates", "125 updates; moe-long has 500"),
        ("experts", "Linear, ReLU, Linear", "SiLU", "SiLU without biases; ReLU is --ffn relu"),
        ("active parameters", "28.4 %", "46.3 %", "46.3 %"),
        ("attention", "28.3M parameters", "3.5M", "3.5M"),
        ("initialisation", "Kaiming uniform, LayerNorm, biases", "N(0, 0.02), RMSNorm, no biases", "as its code"),
        ("Newton-Schulz", "X (2I - AX)", "the odd quintic", "as its code: X (2I - AX) ends at the inverse of A"),
        ("its place", "before momentum (C.1)", "after momentum", "as its code; moe-ns-order has both"),
        ("rest beside Muon", "a tenth of Muon's rate", "a tenth", "swept by itself; a tenth under 'as written'"),
        ("AdamW", "one rate, beta2 0.999, decay on all but norms", "the same", "the same under 'as written'"),
        ("dropout", "0.1 in all layers", "0.1", "0.1 on embedding and outputs; also inside blocks under 'as written'"),
        ("precision", "mixed precision off", "off", "fp32 at full scale"),
        ("seed", "42", "42", "three and more"),
    ),
}
