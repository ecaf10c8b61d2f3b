"""Text from a model: reads prompts, chooses one token after another until each row has ended, slides past the context.

    for tokens in generate(decoder, [[0, 17, 4]], Sampling(temperature=0.8), draws=[draws_of(0)], most=200, end=0): ...

A row's tokens depend on its prompt and its draws alone, not on the rows next to it (up to the rounding of sums).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.decoder import Decoder


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: from softmax(logits / temperature), restricted to the `top_k` most probable tokens
    (0: all) and then to the fewest of these that hold `top_p` of their probability. Temperature 0 takes the largest."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def candidates(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities (B, K) in float64, falling, and the token ids that have them; those not to be drawn have 0."""
    V = logits_BV.shape[-1]
    logits_BK, ids_BK = logits_BV.double().topk(min(sampling.top_k or V, V))
    if not sampling.temperature:
        return torch.ones_like(logits_BK[:, :1]), ids_BK[:, :1]
    p_BK = ((logits_BK - logits_BK[:, :1]) / sampling.temperature).softmax(-1)  # of differences: none overflows
    before_BK = p_BK.cumsum(-1) - p_BK  # a token stays if those before it do not hold top_p yet
    p_BK = p_BK.masked_fill(before_BK >= sampling.top_p, 0.0)
    return p_BK / p_BK.sum(-1, keepdim=True), ids_BK


def draws_of(seed: int, *numbers: int) -> np.random.Generator:
    """The random numbers of one text: a stream of its own for each prompt and sample."""
    return np.random.default_rng([seed, *numbers])


def choose(logits_BV: Tensor, sampling: Sampling, draws: Sequence[np.random.Generator]) -> list[int]:
    """One token per row, by inverting the distribution function at one uniform number of each row's `draws`."""
    if not sampling.temperature:
        return logits_BV.argmax(-1).tolist()
    p_BK, ids_BK = candidates(logits_BV, sampling)
    uniform_B1 = torch.tensor([[one.random()] for one in draws], dtype=torch.float64, device=p_BK.device)
    sums_BK = p_BK.cumsum(-1)
    # The first token whose sum exceeds the number; the last sum may be rounded to below 1.
    at_B1 = torch.searchsorted(sums_BK, uniform_B1 * sums_BK[:, -1:], right=True)
    last_B1 = (p_BK > 0).sum(-1, keepdim=True) - 1
    return ids_BK.gather(1, torch.minimum(at_B1, last_B1))[:, 0].tolist()


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    draws: Sequence[np.random.Generator],
    most: int,
    end: int | None = None,
    say: Callable[[str], None] = lambda sentence: None,
) -> Iterator[list[int | None]]:
    """For each of up to `most` steps the next token of every row; None once it has drawn `end`, which is not given.

    `prompts` are token ids, at least one each. A row whose tokens fill the context continues with the later half of it;
    a longer prompt is cut to that from the start. `say` gets a sentence on each.
    """
    kept, slid = max(1, decoder.context // 2), False
    rows, running, logits = [list(prompt) for prompt in prompts], [True] * len(prompts), None
    longest = max(map(len, rows))
    if longest > decoder.context:
        say(f"a prompt of {longest:,} tokens: the model sees {decoder.context:,}, so it starts from the last {kept:,}")
    for _ in range(most):
        full = [len(row) > decoder.context for row in rows]
        if logits is None or any(full):
            if logits is not None and not slid:
                say(f"the context of {decoder.context:,} tokens is full: it slides, keeping the last {kept:,}")
                slid = True
            rows = [row[-kept:] if over else row for row, over in zip(rows, full, strict=True)]
            logits = decoder.read(*_padded(rows, decoder.device))
        else:
            logits = decoder.step(torch.tensor([row[-1:] for row in rows], device=decoder.device))
        tokens = choose(logits, sampling, draws)
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
        running = [going and token != end for going, token in zip(running, tokens, strict=True)]
        yield [token if going else None for token, going in zip(tokens, running, strict=True)]
        if not any(running):
            return


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The rows (B, T) with zeros in front of the shorter ones, and how many; None where all are of one length."""
    T = max(map(len, rows))
    tokens = torch.tensor([[0] * (T - len(row)) + list(row) for row in rows], device=device)
    padding = torch.tensor([T - len(row) for row in rows], device=device)
    return tokens, padding if padding.any() else None
