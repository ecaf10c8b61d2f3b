import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import model as model_file
from model import CPU_KERNELS, SIZES, ModelConfig, Transformer, rotary_table, rotate

PUBLISHED_COUNTS = {
    "11m": 11_208_384,
    "16m": 15_730_944,
    "29m": 29_496_192,
    "50m": 50_340_352,
    "88m": 88_630_528,
    "108m": 108_543_744,
}
SMALL = ModelConfig(d_model=32, layers=2, heads=4, kv_heads=2, d_ff=48, seq_len=24, ffn="relu2", qk_norm=True)


def small_model(**changes):
    torch.manual_seed(0)
    return Transformer(replace(SMALL, **changes), vocab_size=50)


@pytest.mark.parametrize(("size", "count"), PUBLISHED_COUNTS.items())
def test_parameter_count_equals_the_published_one(size, count):
    with torch.device("meta"):
        assert Transformer(SIZES[size], vocab_size=49_152).parameter_count() == count


def test_flops_per_token_of_the_88m_model():
    with torch.device("meta"):
        model = Transformer(SIZES["88m"], vocab_size=49_152)
    blocks = 22 * (2 * 512 * 512 + 2 * 256 * 512 + 2 * 2048 * 512)
    assert model.flops_per_token(2048) == 6 * (blocks + 49_152 * 512) + 12 * 22 * 512 * 2048


@torch.no_grad()
def test_spectra_at_initialisation_equal_the_reference_values():
    torch.manual_seed(0)
    weights = {}
    for p in Transformer(SIZES["88m"], vocab_size=16).projections():
        if p.layer < 8 or p.name not in ("up", "down"):  # fewer of the large ones vary less
            weights.setdefault(p.name, []).append(p.weight)
    square, narrow, wide = (0.90, 412, 0.920), (0.77, 237, 0.954), (1.35, 495, 0.980)
    expected = {"q": square, "o": square, "k": narrow, "v": narrow, "up": wide, "down": wide}
    for name, reference in expected.items():
        s = torch.linalg.svdvals(torch.stack(weights[name]))
        share, energy = s / s.sum(1, keepdim=True), s.square() / s.square().sum(1, keepdim=True)
        effective_rank = (-(share * share.log()).sum(1)).exp()
        spectral_entropy = -(energy * energy.log()).sum(1) / math.log(s.shape[1])
        means = [values.mean().item() for values in (s[:, 0], effective_rank, spectral_entropy)]
        assert means == pytest.approx(reference, rel=0.01)


def test_projections_cover_every_block_weight_once_with_the_shape_of_the_map():
    model = small_model(ffn="swiglu")
    shapes = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32), "gate": (48, 32), "up": (48, 32)}
    shapes["down"] = (32, 48)
    seen = [(p.layer, p.name, tuple(p.weight.shape)) for p in model.projections()]
    assert sorted(seen) == sorted((layer, *item) for layer in range(2) for item in shapes.items())
    with torch.no_grad():
        for p in model.projections():
            p.weight.add_(1.0)  # each element exactly once
    fresh = small_model(ffn="swiglu")
    for bank, before in zip(model.banks(), fresh.banks(), strict=True):
        torch.testing.assert_close(bank.parameter.detach(), before.parameter.detach() + 1)


@pytest.mark.parametrize("ffn", ["relu2", "silu", "relu", "gelu", "swiglu"])
def test_forward_equals_a_plain_model_written_from_the_projections(ffn):
    model = small_model(ffn=ffn)
    with torch.no_grad():
        for gain in (model.attention_gain, model.ffn_gain, model.final_gain, model.q_gain, model.k_gain):
            gain.uniform_(0.5, 1.5)
    W = {(p.layer, p.name): p.weight for p in model.projections()}
    tokens = torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(1))

    def norm(x, gain):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * gain

    def rope(x):  # (T, width) of one head, by complex multiplication
        angles = torch.arange(24)[:, None] * 10_000.0 ** (-torch.arange(4) * 2 / 8)
        turned = torch.complex(x[:, :4], x[:, 4:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag), dim=1)

    activation = {"relu2": lambda u: u.relu() ** 2, "silu": F.silu, "relu": torch.relu, "gelu": F.gelu}.get(ffn)
    x = model.embedding[tokens] * math.sqrt(32)
    for layer in range(2):
        h = norm(x, model.attention_gain[layer])
        q, k, v = (h @ W[layer, name].mT for name in "qkv")
        heads = torch.empty_like(q)
        for b in range(2):
            for head in range(4):
                width, shared = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
                qh, kh = norm(q[b, :, width], model.q_gain[layer]), norm(k[b, :, shared], model.k_gain[layer])
                scores = rope(qh) @ rope(kh).mT / math.sqrt(8)
                scores = scores.masked_fill(torch.ones(24, 24).triu(1).bool(), -math.inf)
                heads[b, :, width] = scores.softmax(-1) @ v[b, :, shared]
        x = x + heads @ W[layer, "o"].mT
        h = norm(x, model.ffn_gain[layer])
        up = h @ W[layer, "up"].mT
        hidden = activation(up) if activation else F.silu(h @ W[layer, "gate"].mT) * up
        x = x + hidden @ W[layer, "down"].mT
    logits = norm(x, model.final_gain) @ model.embedding.mT
    torch.testing.assert_close(model(tokens), logits, rtol=1e-4, atol=1e-4)
    targets = tokens.roll(-1, dims=1)
    expected = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(model(tokens, targets), expected, rtol=1e-5, atol=1e-5)


def test_rotary_positions_change_with_time_and_not_with_head():
    cos, sin = rotary_table(16, 8)
    x = torch.randn(1, 1, 1, 8).expand(1, 16, 3, 8)
    turned = rotate(x, cos, sin)
    assert torch.equal(turned[:, :, 0], turned[:, :, 2])
    assert not torch.allclose(turned[:, 0], turned[:, 5])
    scores = (turned[0, :, 0] @ turned[0, :, 0].mT).diagonal(offset=3)
    torch.testing.assert_close(scores, scores[0].expand(13))  # only the distance in time counts


def test_a_token_does_not_see_the_future():
    model = small_model()
    tokens = torch.randint(50, (1, 24), generator=torch.Generator().manual_seed(2))
    changed = tokens.clone()
    changed[0, 15] = (changed[0, 15] + 1) % 50
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.allclose(before[:, 15:], after[:, 15:])


@pytest.mark.parametrize("kernels", [frozenset(), CPU_KERNELS])
@pytest.mark.parametrize("masked", [False, True])
def test_inner_dropout_drops_attention_weights_and_hidden_units_and_keeps_the_mean(kernels, masked):
    model = small_model(inner_dropout=0.25)
    model.kernels = kernels
    w = {p.name: p.weight for p in model.projections() if p.layer == 0}
    w |= {"down": w["down"].mT.contiguous(), "o": torch.eye(len(w["o"]))}
    x = torch.randn(300, 1, len(w["o"]), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(300, 1, 1, 1, dtype=torch.bool) if masked else None
    dropped = model._attention(x, w, 0, mask)
    kept = model.eval()._attention(x, w, 0, mask)
    model.train()
    heads = (dropped / kept).view(300, SMALL.heads, -1)  # one key, whose weight 1 becomes 0 or 1 / 0.75 in each head
    torch.testing.assert_close(heads, heads[..., :1].round().expand_as(heads) / 0.75, rtol=1e-4, atol=1e-4)
    assert 0.7 < (heads > 0).float().mean() < 0.8

    model.config = replace(model.config, ffn="relu")  # positive, so a zero is a dropped unit
    x, w["up"], w["down"] = x.abs(), torch.rand(64, x.shape[-1]), torch.eye(64)
    torch.testing.assert_close(*once_or_more(model._ffn(x, w), model.eval()._ffn(x, w)), rtol=1e-4, atol=1e-4)


def test_inner_dropout_reaches_the_hidden_units_of_experts():
    model = small_model(inner_dropout=0.25, experts=1, top_k=1, ffn="relu", d_ff=64)
    D = model.config.d_model
    w = {"up": torch.rand(1, 64, D), "down": torch.eye(64, D)[None]}
    x = torch.rand(300, D, generator=torch.Generator().manual_seed(0))
    dropped, kept = model._mixture(x, w, 0)[0], model.eval()._mixture(x, w, 0)[0]
    torch.testing.assert_close(*once_or_more(dropped, kept), rtol=1e-4, atol=1e-4)


def once_or_more(dropped, kept):
    """The ratios, and 0 or 1 / 0.75 nearest to them, of about three quarters."""
    ratios = (dropped / kept).flatten()
    assert 0.73 < (ratios > 0).float().mean() < 0.77
    return ratios, ratios.round() / 0.75


def test_without_inner_dropout_the_fast_attention_of_a_cpu_is_used(monkeypatch):
    calls = []
    monkeypatch.setattr(model_file, "causal_attention", lambda q, k, v: (calls.append(1), q)[1])
    for probability, layers in ((0.1, 0), (0.0, SMALL.layers)):
        model = small_model(inner_dropout=probability)
        model.kernels = CPU_KERNELS
        model(torch.zeros(1, 24, dtype=torch.long))
        assert len(calls) == layers


@pytest.mark.parametrize("kind", ["dropout", "inner_dropout"])
def test_dropout_acts_in_training_only(kind):
    model = small_model(**{kind: 0.5})
    tokens = torch.zeros(1, 24, dtype=torch.long)
    assert not torch.allclose(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_bf16_activations_stay_close_to_fp32():
    model = small_model()
    tokens = torch.randint(50, (2, 24))
    exact = model(tokens, tokens)
    model.compute_dtype = torch.bfloat16
    rounded = model(tokens, tokens)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"heads": 5}, "heads"), ({"heads": 64}, "heads"), ({"kv_heads": 3}, "key/value"), ({"ffn": "tanh"}, "tanh")],
)
def test_impossible_shapes_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        replace(SMALL, **change)
