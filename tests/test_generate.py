"""Reading on with a cache and drawing tokens, against passes over all tokens and counts by hand."""

import math

import numpy as np
import pytest
import torch

import sample
from engine.decoder import Decoder
from engine.generate import Sampling, candidates, choose, draws_of, generate
from model import ModelConfig, Transformer

NANO = {"d_model": 32, "layers": 2, "heads": 4, "kv_heads": 2, "d_ff": 48, "seq_len": 24}
NANO |= {"ffn": "relu2", "qk_norm": True}
SHAPES = {
    "as nano, grouped heads and QK-norm": NANO,
    "swiglu, heads of their own, no QK-norm": NANO | {"ffn": "swiglu", "kv_heads": 4, "qk_norm": False},
    "one key head, gelu": NANO | {"ffn": "gelu", "kv_heads": 1},
    "mixture": NANO | {"experts": 4},
    "mixture of swiglu, top 1": NANO | {"experts": 3, "top_k": 1, "ffn": "swiglu", "qk_norm": False},
}


def model_of(seed=0, **shape):
    """A model with weights, gains too, so large that logits differ by several nats."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**shape), 50).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def slow_text(model, prompt, most, end=None):
    """The most probable tokens, each from a pass over all tokens in view; past the context the later half stays."""
    T, seen, found = model.config.seq_len, list(prompt), []
    while len(found) < most:
        if len(seen) > T:
            seen = seen[-(T // 2) :]
        with torch.no_grad():
            token = int(model(torch.tensor([seen]))[0, -1].argmax())
        if token == end:
            break
        found.append(token)
        seen.append(token)
    return found


def greedy_texts(model, prompts, most, end=None, say=lambda sentence: None):
    steps = generate(Decoder(model), prompts, Sampling(0.0), draws=[], most=most, end=end, say=say)
    return sample.finished(steps, len(prompts))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_with_a_cache_are_those_without(shape):
    model, tokens = model_of(**shape), torch.randint(50, (3, 24))
    decoder = Decoder(model)
    with torch.no_grad():
        expected = model(tokens)
    found = [decoder.read(tokens[:, :5]), *(decoder.step(tokens[:, t : t + 1]) for t in range(5, 24))]
    assert torch.stack(found, 1).sub(expected[:, 4:]).abs().max() < 1e-5 * expected.abs().max()
    # Rows of unlike length, padded in front.
    lengths, padded = (11, 4, 9), torch.zeros(3, 11, dtype=torch.long)
    for row, length in enumerate(lengths):
        padded[row, 11 - length :] = tokens[row, :length]
    found = [decoder.read(padded, 11 - torch.tensor(lengths))]
    found += [
        decoder.step(torch.stack([tokens[row, n + i : n + i + 1] for row, n in enumerate(lengths)])) for i in (0, 1)
    ]
    for row, n in enumerate(lengths):
        difference = torch.stack([logits[row] for logits in found]) - expected[row, n - 1 : n + 2]
        assert difference.abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "shape", [SHAPES["as nano, grouped heads and QK-norm"], SHAPES["mixture"]], ids=("dense", "moe")
)
def test_greedy_text_is_that_of_a_slow_loop_also_past_the_context(shape):
    model, said = model_of(**shape), []
    prompts = [[1, 2, 3], [4] * 30 + [5], [7, 8, 9, 10, 11, 12, 13, 14]]
    slow = [slow_text(model, prompt, 60) for prompt in prompts]
    assert greedy_texts(model, prompts, 60, say=said.append) == slow
    assert said == [
        "a prompt of 31 tokens: the model sees 24, so it starts from the last 12",
        "the context of 24 tokens is full: it slides, keeping the last 12",
    ]
    assert len({tuple(row) for row in slow}) == 3
    end = slow[0][7]
    ended = [row[: row.index(end)] if end in row else row for row in slow]
    assert greedy_texts(model, prompts, 60, end) == ended
    assert len(ended[0]) <= 7


def test_top_k_and_top_p_leave_what_a_hand_count_leaves():
    p = torch.tensor([[0.125, 0.5, 0.25, 0.125]], dtype=torch.float64)
    kept = {
        Sampling(): [0.125, 0.5, 0.25, 0.125],
        Sampling(top_k=2): [0, 2 / 3, 1 / 3, 0],
        Sampling(top_p=0.5): [0, 1, 0, 0],
        Sampling(top_p=0.51): [0, 2 / 3, 1 / 3, 0],
        Sampling(top_k=3, top_p=0.7): [0, 2 / 3, 1 / 3, 0],  # 0.5 / 0.875 holds too little, both hold 0.857
        Sampling(temperature=0.5): [1 / 22, 16 / 22, 4 / 22, 1 / 22],  # squares
        Sampling(temperature=0.5, top_p=0.9): [0, 0.8, 0.2, 0],
    }
    for sampling, expected in kept.items():
        found, ids = candidates(p.log(), sampling)
        by_id = torch.zeros(1, 4, dtype=torch.float64).scatter_(1, ids, found)[0]
        tied = by_id[[0, 3]].sort().values  # which of two equal ones goes first is arbitrary
        assert [tied[0], *by_id[1:3], tied[1]] == pytest.approx(sorted(expected)[:1] + expected[1:3] + [expected[3]])


def test_a_token_is_drawn_where_the_random_number_falls():
    class Fixed:
        def __init__(self, number):
            self.random = lambda: number

    numbers = (0.0, 0.6, 0.7, 0.999999999999)  # 2/3 and 1/3 are left of 1/8, 1/2, 1/4, 1/8
    logits = torch.tensor([[0.125, 0.5, 0.25, 0.125]]).log().expand(4, -1)
    assert choose(logits, Sampling(top_k=2), [Fixed(number) for number in numbers]) == [1, 1, 2, 2]
    draws = [draws_of(0, number) for number in range(1000)]
    drawn = np.bincount(choose(logits[:1].expand(1000, -1), Sampling(), draws), minlength=4) / 1000
    assert np.abs(drawn - (0.125, 0.5, 0.25, 0.125)).max() < 4 * math.sqrt(0.25 / 1000)


def test_a_temperature_near_zero_takes_the_largest():
    found, ids = candidates(torch.tensor([[1.0, 9.0, 8.0]]), Sampling(temperature=1e-308))
    assert (found[0].tolist(), ids[0, 0].item()) == ([1.0, 0.0, 0.0], 1)
