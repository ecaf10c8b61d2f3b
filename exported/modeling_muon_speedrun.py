"""A decoder trained by muon-speedrun, as transformers loads it: configuration and model, without the training code.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Pre-RMSNorm, rotary positions, grouped-query attention with optional QK-norm, no biases, and an embedding that is also
the output head. With experts each token goes to its top-k. Shape letters: B batch, T new tokens, S all tokens that a
query may see, N = B T, D width, H query heads, K key/value heads, E width of a head, X experts, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# The name of the cache of keys and values in `forward` and in its output; older versions call it past_key_values.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
ACTIVATIONS = {
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "swiglu": F.silu,  # applied to the gate, which then multiplies `up`
}


class MuonSpeedrunConfig(PretrainedConfig):
    """Shape of the model. `num_experts` 0 is a dense feed-forward layer; `document_start` is the token that begins a
    document, where attention stays within one, else None."""

    model_type = "muon_speedrun"
    keys_to_ignore_at_inference = (CACHE,)

    def __init__(
        self,
        vocab_size: int = 4096,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        intermediate_size: int = 512,
        max_position_embeddings: int = 256,
        hidden_act: str = "relu2",
        qk_norm: bool = True,
        num_experts: int = 0,
        num_experts_per_tok: int = 2,
        rope_theta: float = 10_000.0,
        document_start: int | None = None,
        initializer_range: float = 0.02,
        **options,
    ) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads
        self.intermediate_size, self.max_position_embeddings = intermediate_size, max_position_embeddings
        self.hidden_act, self.qk_norm = hidden_act, qk_norm
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.rope_theta, self.document_start, self.initializer_range = rope_theta, document_start, initializer_range
        super().__init__(**options)


def rotation(first: int, count: int, config: MuonSpeedrunConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (T, E / 2) of position x frequency, in the type and on the device of `like`.

    Computed in float64 on the CPU, so that every device gets the same angles.
    """
    # Pair i turns by theta^(-2i / E) radians per position: the first pair fastest, the last slowest.
    frequencies = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
    angles = torch.outer(torch.arange(first, first + count, dtype=torch.float64), frequencies)
    return angles.cos().float().to(like), angles.sin().float().to(like)


def rotate(x_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + E/2}) of every head by the angle of their position."""
    first, second = x_BHTE.chunk(2, dim=-1)
    return torch.cat((first * cos_TE - second * sin_TE, first * sin_TE + second * cos_TE), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: MuonSpeedrunConfig, layer: int) -> None:
        super().__init__()
        D, E, self.layer = config.hidden_size, config.head_dim, layer
        self.q_proj = nn.Linear(D, config.num_attention_heads * E, bias=False)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * E, bias=False)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * E, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * E, D, bias=False)
        # QK-norm: queries and keys of unit scale, with a learned gain.
        self.q_norm = nn.RMSNorm(E) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(E) if config.qk_norm else nn.Identity()
        self.head_dim = E

    def forward(
        self, x_BTD: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, cache: DynamicCache | None
    ) -> Tensor:
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x_BTD).view(heads)).transpose(1, 2), *angles)  # (B, H, T, E)
        k = rotate(self.k_norm(self.k_proj(x_BTD).view(heads)).transpose(1, 2), *angles)
        v = self.v_proj(x_BTD).view(heads).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)  # (B, K, S, E)
        # Grouped queries: H / K query heads share one key/value head.
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        # softmax(q kᵀ / sqrt(E)) v over the visible keys; a single new token sees all of them.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config: MuonSpeedrunConfig) -> None:
        super().__init__()
        D, F_ = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, F_, bias=False) if config.hidden_act == "swiglu" else None
        self.up_proj, self.down_proj = nn.Linear(D, F_, bias=False), nn.Linear(F_, D, bias=False)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        return self.down_proj(
            self.activation(up) if self.gate_proj is None else self.activation(self.gate_proj(x)) * up
        )


class Mixture(nn.Module):
    """Each token goes to its top-k experts, weighed by the softmax over the router's logits of these k."""

    def __init__(self, config: MuonSpeedrunConfig) -> None:
        super().__init__()
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.num_experts))
        self.top_k = config.num_experts_per_tok

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        logits_NX = F.linear(x_ND.float(), self.router.weight.float())  # in fp32: rounding would change the choice
        chosen_NR, experts_NR = logits_NX.topk(self.top_k)
        weights_NR = chosen_NR.softmax(-1).to(x_ND.dtype)
        y_ND = torch.zeros_like(x_ND)
        for number, expert in enumerate(self.experts):
            tokens, choice = (experts_NR == number).nonzero(as_tuple=True)
            y_ND.index_add_(0, tokens, expert(x_ND[tokens]) * weights_NR[tokens, choice, None])
        return y_ND.view_as(x_BTD)


class Block(nn.Module):
    def __init__(self, config: MuonSpeedrunConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size)
        self.mlp = Mixture(config) if config.num_experts else FeedForward(config)

    def forward(self, x: Tensor, *attention: object) -> Tensor:
        # Each half adds to the residual stream.
        x = x + self.self_attn(self.input_layernorm(x), *attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class MuonSpeedrunForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = MuonSpeedrunConfig
    _no_split_modules = ("Block",)

    def __init__(self, config: MuonSpeedrunConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: DynamicCache | None = None,
        past_key_values: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **options,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), or of the last `logits_to_keep` tokens; with `labels` (B, T) also the mean cross-entropy.

        `attention_mask` (B, S) is 0 at padding, on either side. In a mixture the loss has no load-balancing part.
        """
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        seen = 0 if cache is None else cache.get_seq_length()
        mask = self._mask(input_ids, attention_mask, cache, seen)
        # Rows of the embedding are scaled by sqrt(D), since the same small matrix is the output head.
        x = self.embed_tokens(input_ids) * self.config.hidden_size**0.5
        # Positions count padding too: attention depends on their differences alone.
        angles = rotation(seen, input_ids.shape[1], self.config, like=x)
        for layer in self.layers:
            x = layer(x, angles, mask, cache)
        logits = F.linear(self.norm(x[:, -logits_to_keep:]), self.embed_tokens.weight)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def _mask(
        self, tokens_BT: Tensor, attention_mask: Tensor | None, cache: DynamicCache | None, seen: int
    ) -> Tensor | None:
        """The keys that each new token sees, (B, 1, T, S) booleans; None where it sees all up to itself."""
        T, start = tokens_BT.shape[1], self.config.document_start
        plain = start is None and (attention_mask is None or bool(attention_mask.all()))
        if plain and (T == 1 or not seen):
            return None
        keys = torch.arange(seen + T, device=tokens_BT.device)
        visible = (keys <= keys[seen:, None])[None]
        if attention_mask is not None:
            visible = visible & attention_mask[:, None].bool()
        if start is not None:
            # Number the documents of a row: +1 at each start. The cache remembers those of the tokens before.
            before = getattr(cache, "documents", torch.zeros_like(tokens_BT[:, :1]))[:, : max(1, seen)]
            new = before[:, -1:] + (tokens_BT == start).cumsum(1)
            documents = torch.cat((before, new), dim=1) if seen else new
            if cache is not None:
                cache.documents = documents
            visible = visible & (documents[:, None] == new[:, :, None])
        visible = visible | (keys == keys[seen:, None])  # padding sees itself, so that it stays finite
        return visible[:, None]
