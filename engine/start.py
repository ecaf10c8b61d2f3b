"""Starts a run with the weights of another model (--init-from): whether they fit, the copy, and their hash.

    check_fit(other, config, vocab_size, name); copy_weights(model, other); weights_digest(other.state_dict())

Models that fit may differ in the length of sequences, in dropout, and in which projections share a bank.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.cli import BadInput

SHAPE = ("layers", "d_model", "heads", "kv_heads", "d_ff", "ffn", "qk_norm", "experts", "top_k")


def check_fit(other: nn.Module, config: Any, vocab_size: int, name: str) -> None:
    """BadInput that names every difference in shape and vocabulary between a model and one of `config`."""
    pairs = {key: (getattr(other.config, key), getattr(config, key)) for key in SHAPE}
    if not config.experts:
        del pairs["top_k"]  # a dense model has no experts
    pairs["vocab_size"] = other.vocab_size, vocab_size
    if wrong := [f"{key} is {there} there, {here} here" for key, (there, here) in pairs.items() if there != here]:
        raise BadInput(f"{name}: its weights do not fit this model ({', '.join(wrong)})")


@torch.no_grad()
def copy_weights(model: nn.Module, other: nn.Module) -> None:
    """Give a model the weights of another of its shape, matrix by matrix."""
    for mine, its in zip(model.projections(), other.projections(), strict=True):
        mine.weight.copy_(its.weight)
    theirs = dict(other.named_parameters())
    for name, p in model.named_parameters():
        if not name.startswith("weights."):  # of the banks
            p.copy_(theirs[name])


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """16 hex digits of named fp32 weights, whatever their order."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().contiguous().numpy())
    return digest.hexdigest()[:16]
