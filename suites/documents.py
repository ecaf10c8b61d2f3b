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
_TEXT_HERE = "the same at full scale; at nano scale Python's standard library, 4,096 entries"
_MIX = ("text and tokenizer", "not given", "70 % fineweb-edu-dedup, 30 % cosmopedia-v2; 49,152 entries", _TEXT_HERE)
# Rows of (what, the document says, its code ran, here); "" are around the document's own words.
DEVIATIONS: Mapping[str, tuple[tuple[str, str, str, str], ...]] = {
    "S0": (
        ("optimizer", '"SVD-based orthogonalization"', "Newton-Schulz, no SVD", "Newton-Schulz"),
        ("matrices", '"all 2D parameter updates"', "Q, K, V, O stacked as one matrix", "each projection by itself"),
        _MIX,
        _RATES,
        ("weight decay", "not given", "0.2 for AdamW, none for Muon", "the same; theirs under 'as written'"),
        ("weights", "not given", "bf16 without a master copy", "fp32"),
    ),
    "S3": (
        (
            "seeds",
            '"seed42", "seed137", "seed256"',
            "42 each time, hard-coded",
            "each seed sets weights, batches and dropout",
        ),
        _MIX,
        (
            "tokens",
            'not given; S1: "2B tokens of text data"',
            "1.7 billion",
            "1.7 billion at full scale, 524,288 at nano scale",
        ),
        ("rank tiers", '"perfectly preserved"', "not compared with the start", "given at initialisation too"),
        _RATES,
    ),
    "S2": (
        ("text and tokenizer", '"SmolLM-Corpus (500k tokens)"', "500k tokens of cosmopedia-v2", _TEXT_HERE),
        ("feed-forward", '"SwiGLU"', "SiLU with two matrices", "SiLU with two matrices; swiglu is --ffn swiglu"),
        ("validation", "not given", "windows that overlap the training windows", "other documents, by hash"),
        ("positions", '"RoPE"', "RoPE along the heads", "RoPE along time"),
        ("schedule", "not given", "5 % warm-up, cosine to 10 %, in micro-steps: 20 %, to 0.9 of the peak", "in steps"),
        ("rate by size", "not given", "one for all sizes", "AdamW's falls as 1 / width; theirs 'as written'"),
        ("n", '"Multiple seeds"', "2", "3 and more"),
    ),
    "S4": (
        (
            "steps",
            '"Training Steps: 500", "49,152 tokens"',
            "500 micro-steps: 125 updates",
            "125 updates; moe-long has 500",
        ),
        ("text and tokenizer", '"cosmopedia-v2", "GPT-2 BPE tokenizer"', "cosmopedia-v2", _TEXT_HERE),
        (
            "documents",
            '"Training documents: 1,800", "Validation documents: 200"',
            "2,000, split 90/10",
            "about 1,800 and 200 at full scale, by a hash of each",
        ),
        ("experts", '"nn.ReLU()" between two "nn.Linear"', "SiLU", "SiLU without biases; ReLU is --ffn relu"),
        ("active parameters", '"~28.4%"', "46.3 %", "46.3 %"),
        ("attention", '"~28.3M parameters"', "3.5M", "3.5M"),
        (
            "initialisation",
            '"Kaiming uniform initialization", "Layer norms: Weights=1, Bias=0"',
            "N(0, 0.02), RMSNorm, no biases",
            "as its code",
        ),
        (
            "Newton-Schulz",
            '"X_{k+1} = X_k(2I - AX_k)"',
            "the odd quintic",
            "as its code: X (2I - AX) ends at the inverse of A",
        ),
        (
            "its place",
            'C.1: "Apply Newton-Schulz orthogonalization", then "Apply momentum"',
            "after momentum",
            "as its code; moe-ns-order has both",
        ),
        (
            "scale of the update",
            "none: \"p.data.add_(grad, alpha=-group['lr'])\"",
            "sqrt(max(1, rows / columns))",
            "as its code; --lr-scale none",
        ),
        (
            "rest beside Muon",
            '"AdamW LR: 0.007 (10× lower)"',
            "a tenth of Muon's rate",
            "swept by itself; a tenth under 'as written'",
        ),
        (
            "AdamW",
            '"AdamW (all parameters)", "Beta2 (β₂): 0.999", decay "Not applied to biases and layer norms"',
            "the same",
            "the same under 'as written'",
        ),
        (
            "dropout",
            '"0.1 in all layers"',
            "0.1",
            "0.1 on embedding and outputs; also inside blocks under 'as written'",
        ),
        ("precision", '"Mixed Precision: Disabled"', "off", "fp32 at full scale"),
        ("seed", '"seed=42"', "42", "three and more"),
    ),
}
