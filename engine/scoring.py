"""What a model makes of given tokens: the loss of each, and the likelihood of answers.

    nats, correct = token_scores(model, tokens, seq_len=256, rows=4)

Tokens are cut into windows as validation cuts them, so that the mean loss on a run's validation tokens is its val_loss.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from engine.step import token_losses


@torch.no_grad()
def token_scores(model: nn.Module, tokens: np.ndarray, seq_len: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Predict every token (N,) but the first from those before it in its window of `seq_len`: the losses in nats and
    whether each has the largest logit, (N - 1,). `rows` windows go through the model at a time; the last one may be
    shorter."""
    device, targets = model.embedding.device, tokens[1:]
    nats, correct = np.empty(len(targets)), np.empty(len(targets), bool)
    whole = len(targets) // seq_len
    spans = [(w * seq_len, min(rows, whole - w), seq_len) for w in range(0, whole, rows)]
    if rest := len(targets) - whole * seq_len:
        spans.append((whole * seq_len, 1, rest))
    for first, count, width in spans:
        end = first + count * width
        inputs = torch.from_numpy(tokens[first:end].astype(np.int64)).view(count, width).to(device)
        asked = torch.from_numpy(targets[first:end].astype(np.int64)).to(device)
        _, losses, right = token_losses(model(inputs), asked)
        nats[first:end], correct[first:end] = losses.double().cpu(), right.cpu()
    return nats, correct


@torch.no_grad()
def log_likelihoods(
    model: nn.Module, context: Sequence[int], choices: Sequence[Sequence[int]], seq_len: int
) -> list[float]:
    """ln p(choice | context) in nats of each choice, all as one batch. Of a context too long for `seq_len` the end is
    kept; ValueError if not one token of it fits."""
    longest = max(map(len, choices))
    if longest > seq_len:
        raise ValueError(f"a choice of {longest:,} tokens does not fit the model's context of {seq_len:,}")
    context = list(context)[-(seq_len + 1 - longest) :]
    rows = [context + list(choice) + [0] * (longest - len(choice)) for choice in choices]  # no token sees later ones
    tokens = torch.tensor(rows, device=model.embedding.device)
    log_p = F.log_softmax(model(tokens[:, :-1])[:, len(context) - 1 :].float(), dim=-1)
    found = log_p.gather(2, tokens[:, len(context) :, None])[..., 0].double().cpu()
    return [row[: len(choice)].sum().item() for row, choice in zip(found, choices, strict=True)]
