"""Times the next token of a text: with the keys and values of the earlier tokens kept, and by a pass over all of them.

    python -m bench.decode [--model nano] [--tokens 256] [--json FILE]

Random weights, one row. Compares the logits of both ways first, then times in turns: a whole text, of which the pass
over all tokens is timed at every eighth length, and the last token alone. On a CPU one thread works and the times are
its own, so that other programs count little.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from bench.harness import JsonFlag, require, this_device, write_figures
from engine.cli import AT_LEAST_1, Limit, check_limits, exit_with_a_sentence, one_of
from engine.decoder import Decoder
from engine.step import prepare_torch
from model import SIZES, Transformer

VOCAB_SIZE, EVERY, TOLERANCE = {"nano": 4096, "moe-nano": 4096}, 8, 1e-4


@dataclass(frozen=True)
class Arguments(JsonFlag):
    """Time the writing of text with and without a cache."""

    model: Annotated[str, one_of(SIZES)] = "nano"
    """Named size."""
    tokens: Annotated[int, Limit("must be at least 16", lambda value: value >= 16)] = 256
    """Length of the text, at most the size's context."""
    repeats: Annotated[int, AT_LEAST_1] = 5
    """Timed rounds; the median counts."""


@exit_with_a_sentence
def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    check_limits(a)
    prepare_torch()
    device, config = this_device(), SIZES[a.model]
    length = min(a.tokens, config.seq_len)
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer(config, VOCAB_SIZE.get(a.model, 49_152)).to(device).eval()
    tokens, decoder = torch.randint(model.vocab_size, (1, length), device=device), Decoder(model)

    def kept() -> torch.Tensor:
        logits = decoder.read(tokens[:, :1])
        for i in range(1, length):
            logits = decoder.step(tokens[:, i : i + 1])
        return logits

    def all_of(count: int) -> torch.Tensor:
        with torch.inference_mode():
            return model(tokens[:, :count])[:, -1]

    def last() -> None:
        decoder.length = length - 1
        decoder.step(tokens[:, -1:])

    require("logits", kept(), all_of(length), TOLERANCE, "those of a pass over all tokens")
    ways: dict[str, tuple[Callable[[], object], float]] = {
        "text, cached": (kept, 1),
        "text, passes": (lambda: [all_of(count) for count in range(EVERY // 2, length + 1, EVERY)], EVERY),
        "last token, cached": (lambda: [last() for _ in range(20)], 1 / 20),
        "last token, pass": (lambda: all_of(length), 1),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(a.repeats):
        for way, (work, scale) in ways.items():
            found[way].append(1e3 * scale * seconds(work, device))
    ms = {way: statistics.median(values) for way, values in found.items()}
    print(f"{a.model}, {length} tokens, {device.type}{', one thread' * (device.type == 'cpu')}, median ms")
    for what, slow in (("text", "passes"), ("last token", "pass")):
        cached, whole = ms[f"{what}, cached"], ms[f"{what}, {slow}"]
        print(f"{what:10}  cached {cached:9.2f}   {slow} over all tokens {whole:9.2f}   {whole / cached:5.1f}x")
    write_figures(a.json, {"model": a.model, "tokens": length, "median_ms": ms})
    return 0


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """On a CPU of this thread alone."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began


if __name__ == "__main__":
    sys.exit(main())
