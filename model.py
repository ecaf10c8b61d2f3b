"""The decoder: named sizes, weights stored as banks, and the one map from banks to projections.

    model = Transformer(SIZES["88m"], vocab_size=49152); loss = model(tokens_BT, targets_BT)

Pre-RMSNorm, rotary positions on the time axis, optional QK-norm, grouped-query attention, tied embedding, no biases.
With experts the feed-forward is a mixture: each token goes to its top-k experts and no token is dropped.
Shape letters: B batch, T time, N = B T tokens, D model width, H heads, K key/value heads, E width of a head,
R experts per token, X experts, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

from kernels.attention import MAX_T, causal_attention
from kernels.cross_entropy import linear_cross_entropy
from kernels.grouped_matmul import Routing, grouped_matmul
from kernels.relu2_mlp import relu2_mlp

INIT_STD = 0.02
ROPE_BASE = 10_000.0
EXPERT_PROJECTIONS = ("gate", "up", "down")  # each expert has its own
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")  # gate: swiglu only
HEADED = ("q", "k", "v")  # their rows are heads
KERNELS = frozenset(("cross_entropy", "relu2_mlp"))  # fused kernels that a training loss can use on a GPU
CPU_KERNELS = KERNELS | {"attention"}  # and on a CPU
FLEX_MIN_HEAD_WIDTH = 16  # the least that Triton's dot takes; FlexAttention pads other widths, as 48, to a power of two
# Stored (d_ff, d) like `up`, so that both are one batch for Muon; the map is the transpose.
STORED_TRANSPOSED = ("down",)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a model; every field is a count except `ffn` (activation) and the two dropouts (probabilities): of the
    embedding and each block's outputs, and of attention weights and hidden units of each (expert's) feed-forward.

    `experts` 0 is a dense model. In a mixture each token goes to `top_k` experts, `balance` weighs the load-balancing
    loss, and `router_noise` is the standard deviation of the noise that training adds to the router's logits.
    """

    d_model: int
    layers: int
    heads: int
    kv_heads: int
    d_ff: int
    seq_len: int
    ffn: str = "silu"
    qk_norm: bool = False
    dropout: float = 0.0
    inner_dropout: float = 0.0
    experts: int = 0
    top_k: int = 2
    balance: float = 0.01
    router_noise: float = 0.0

    def __post_init__(self) -> None:
        for count in ("d_model", "layers", "heads", "kv_heads", "d_ff", "seq_len"):
            if getattr(self, count) < 1:
                raise ValueError(f"{count} {getattr(self, count)}: must be at least 1")
        if self.d_model % self.heads or (self.d_model // self.heads) % 2:
            raise ValueError(f"d_model {self.d_model} does not split into {self.heads} heads of even width")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not share {self.kv_heads} key/value heads evenly")
        if self.ffn not in ACTIVATIONS:
            raise ValueError(f"unknown ffn {self.ffn!r}; choose from {', '.join(ACTIVATIONS)}")
        for dropout in ("dropout", "inner_dropout"):
            if not 0 <= getattr(self, dropout) < 1:
                raise ValueError(f"{dropout} {getattr(self, dropout)}: must be at least 0 and below 1")
        if self.experts < 0 or (self.experts and not 1 <= self.top_k <= self.experts):
            raise ValueError(f"top_k {self.top_k}: must be between 1 and the {self.experts} experts")
        if not (0 <= self.balance < math.inf and 0 <= self.router_noise < math.inf):
            raise ValueError(f"balance {self.balance} and router_noise {self.router_noise}: must not be negative")

    @classmethod
    def of(cls, flags: Mapping[str, Any]) -> "ModelConfig":
        """The shape that filled-in flags, or a run's config, give; ValueError where they do not go together."""
        shape = {field.name: flags[field.name] for field in dataclasses.fields(cls) if field.name != "qk_norm"}
        return cls(**shape, qk_norm=SIZES[flags["model"]].qk_norm)

    @property
    def head_width(self) -> int:
        return self.d_model // self.heads


ACTIVATIONS = {
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "swiglu": F.silu,  # applied to the gate, which then multiplies `up`
}

SIZES = {
    "nano": ModelConfig(d_model=128, layers=4, heads=4, kv_heads=2, d_ff=512, seq_len=256, ffn="relu2", qk_norm=True),
    "11m": ModelConfig(d_model=192, layers=4, heads=6, kv_heads=6, d_ff=768, seq_len=512),
    "16m": ModelConfig(d_model=256, layers=4, heads=8, kv_heads=8, d_ff=1024, seq_len=256),
    "29m": ModelConfig(d_model=384, layers=6, heads=8, kv_heads=8, d_ff=1536, seq_len=512),
    "50m": ModelConfig(d_model=512, layers=8, heads=8, kv_heads=8, d_ff=2048, seq_len=512),
    "88m": ModelConfig(d_model=512, layers=22, heads=8, kv_heads=4, d_ff=2048, seq_len=2048, ffn="relu2", qk_norm=True),
    "108m": ModelConfig(d_model=768, layers=10, heads=16, kv_heads=16, d_ff=3072, seq_len=512),
    "moe-79m": ModelConfig(d_model=384, layers=6, heads=8, kv_heads=8, d_ff=1536, seq_len=512, experts=8),
    "moe-nano": ModelConfig(d_model=128, layers=2, heads=4, kv_heads=4, d_ff=256, seq_len=256, experts=4, qk_norm=True),
}


class Projection(NamedTuple):
    """One weight matrix as the map it is: `weight` is an (out, in) view of its bank."""

    layer: int
    name: str
    expert: int | None
    weight: Tensor


class Place(NamedTuple):
    """Where a projection is stored: matrix `index` of bank number `bank`, as its map or as the transpose.

    `index` counts matrices over all leading dimensions: members, layers and, innermost, experts.
    """

    layer: int
    name: str
    expert: int | None
    bank: int
    index: int
    transposed: bool


class Bank(NamedTuple):
    """All projections of one stored shape: `parameter` (members x layers, rows, cols), member by member.

    A bank of experts is (members x layers, experts, rows, cols).
    """

    parameter: nn.Parameter
    members: tuple[str, ...]
    layers: int

    @property
    def transposed(self) -> tuple[bool, ...]:
        """For each layer of each member, whether its map is the transpose of what is stored."""
        return tuple(name in STORED_TRANSPOSED for name in self.members for _ in range(self.layers))


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """x / sqrt(mean(x²)) along the last axis, times a learned gain."""
    return F.rms_norm(x, x.shape[-1:]) * gain.to(x.dtype)


def rotary_table(seq_len: int, head_width: int) -> tuple[Tensor, Tensor]:
    """cos and sin (seq_len, head_width / 2) of position x frequency, positions along the time axis."""
    # Pair i turns by base^(-2i / E) radians per position: the first pair fastest, the last slowest.
    frequencies = ROPE_BASE ** -(torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def rotate(x_BTHE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + E/2}) of every head by the angle of their time step."""
    cos, sin = cos_TE[:, None].to(x_BTHE.dtype), sin_TE[:, None].to(x_BTHE.dtype)
    first, second = x_BTHE.chunk(2, dim=-1)  # a pair is one number of each half
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def fuses_masks(x: Tensor) -> bool:
    """Whether FlexAttention applies a document mask and skips empty blocks: only where it is compiled for a GPU. On a
    CPU it has no backward pass and without compilation it is slow, so SDPA reads the same mask as booleans there."""
    return x.is_cuda and torch.compiler.is_compiling()


def document_mask(tokens_BT: Tensor, start: int, fused: bool) -> BlockMask | Tensor:
    """The keys that each token attends to: itself and the earlier tokens of its document.

    Returns blocks for FlexAttention (`fused`), or (B, 1, T, T) booleans for SDPA. A document begins at each `start`;
    the tokens before the first `start` of a row are the rest of a document.
    """
    B, T = tokens_BT.shape
    document_BT = (tokens_BT == start).cumsum(1)  # numbers the documents of a row: +1 at each start

    def visible(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_BT[b, query] == document_BT[b, key])

    create = create_block_mask if fused else create_mask
    return create(visible, B, None, T, T, device=tokens_BT.device)


class Transformer(nn.Module):
    """A decoder of `config`'s shape. Weights are fp32; activations have `compute_dtype` (fp32 unless set).

    `kernels` names the fused kernels (of KERNELS or CPU_KERNELS) that training uses; validation uses none, so that no
    kernel flatters a score. With `document_start`, the token that begins each document, attention stays within a
    document. Projections named in `apart` share no bank with others, so that another optimizer can have them; initial
    weights stay the same.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, apart: Collection[str] = ()) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.compute_dtype, self.kernels = torch.float32, frozenset()
        self.document_start: int | None = None
        self.whole_batch = False
        D, L, E = config.d_model, config.layers, config.head_width
        self.embedding = nn.Parameter(torch.empty(vocab_size, D))
        stored = {"q": (D, D), "k": (config.kv_heads * E, D), "v": (config.kv_heads * E, D), "o": (D, D)}
        if config.ffn == "swiglu":
            stored["gate"] = (config.d_ff, D)
        stored |= {"up": (config.d_ff, D), "down": (config.d_ff, D)}
        # Projections of one stored shape share a bank, so that Muon orthogonalises them in one batch.
        members: dict[tuple[int, ...], list[str]] = {}
        for name, shape in stored.items():
            if config.experts and name in EXPERT_PROJECTIONS:
                shape = (config.experts, *shape)
            members.setdefault(shape, []).append(name)
        nn.init.normal_(self.embedding, std=INIT_STD)
        weights: dict[str, Tensor] = {}
        for shape, names in sorted(members.items(), key=lambda bank: bank[1]):
            drawn = nn.init.normal_(torch.empty(len(names), L, *shape), std=INIT_STD)
            for together in ([n for n in names if n not in apart], [n for n in names if n in apart]):
                if together:
                    weights["_".join(together)] = drawn[[names.index(n) for n in together]].flatten(0, 1)
        self.weights = nn.ParameterDict(weights)
        self.attention_gain = nn.Parameter(torch.ones(L, D))
        self.ffn_gain = nn.Parameter(torch.ones(L, D))
        self.final_gain = nn.Parameter(torch.ones(D))
        if config.qk_norm:
            self.q_gain = nn.Parameter(torch.ones(L, E))
            self.k_gain = nn.Parameter(torch.ones(L, E))
        cos, sin = rotary_table(config.seq_len, E)
        self.register_buffer("cos_TE", cos, persistent=False)
        self.register_buffer("sin_TE", sin, persistent=False)
        if config.experts:
            self.router = nn.Parameter(torch.empty(L, config.experts, D).normal_(std=INIT_STD))
            # Choices per expert in the last forward pass.
            self.register_buffer("expert_counts", torch.zeros(L, config.experts, dtype=torch.long), persistent=False)
            self.register_buffer("balance_loss", torch.zeros(()), persistent=False)  # of the last forward pass, weighed
            # The shares f_e over all micro-batches and ranks, where a step sets them (engine/step.py).
            self.register_buffer("batch_shares", torch.zeros(L, config.experts), persistent=False)

    def banks(self) -> list[Bank]:
        """Every block matrix, grouped by stored shape; embedding, gains and router belong to no bank."""
        return [Bank(p, tuple(name.split("_")), self.config.layers) for name, p in self.weights.items()]

    def places(self) -> Iterator[Place]:
        """Where each block matrix is stored, layer by layer."""
        banks = self.banks()
        for layer in range(self.config.layers):
            for name in PROJECTIONS:
                for number, bank in enumerate(banks):
                    if name not in bank.members:
                        continue
                    index, transposed = bank.members.index(name) * bank.layers + layer, name in STORED_TRANSPOSED
                    if bank.parameter.ndim == 3:
                        yield Place(layer, name, None, number, index, transposed)
                    for expert in range(bank.parameter.shape[1] if bank.parameter.ndim == 4 else 0):
                        place = index * bank.parameter.shape[1] + expert
                        yield Place(layer, name, expert, number, place, transposed)

    def projections(self, tensors: Sequence[Tensor] | None = None) -> Iterator[Projection]:
        """Each block matrix as its (out, in) map, layer by layer; a view, so it follows the weights.

        `tensors`, one in the shape of each bank, are mapped instead of the weights: gradients, or a copy.
        """
        tensors = [bank.parameter for bank in self.banks()] if tensors is None else tensors
        for place in self.places():
            matrix = tensors[place.bank].flatten(0, -3)[place.index]
            yield Projection(place.layer, place.name, place.expert, matrix.mT if place.transposed else matrix)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits (B, T, V), or with targets the mean cross-entropy in nats, a 0-D fp32 tensor.

        In training the loss of a mixture includes the load-balancing loss of every layer. `expert_counts` and
        `balance_loss` are overwritten in place.
        """
        c, dtype = self.config, self.compute_dtype
        x, counts, balance = self._trunk(tokens_BT)
        if c.experts:
            self.expert_counts.copy_(counts)
            self.balance_loss.copy_(balance.detach())
        # The tied head: logits are inner products with the rows of the embedding.
        if targets_BT is not None and "cross_entropy" in self.kernels and self.training:
            loss = linear_cross_entropy(x.flatten(0, 1), self.embedding.to(dtype), targets_BT.flatten())
            return loss + balance if c.experts else loss
        logits = F.linear(x, self.embedding.to(dtype))
        if targets_BT is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets_BT.flatten())
        return loss + balance if c.experts and self.training else loss

    def turns(self) -> Tensor:
        """The rotation of each position as a matrix (T, E, E) that a head is multiplied by: what `rotate` makes of the
        unit vectors."""
        c = self.config
        units = torch.eye(c.head_width, device=self.cos_TE.device).expand(1, c.seq_len, -1, -1)
        return rotate(units, self.cos_TE, self.sin_TE)[0]

    @torch.no_grad()
    def choices(self, tokens_BT: Tensor) -> Tensor:
        """How many choices of a forward pass fall on each expert of each layer, (layers, experts)."""
        return self._trunk(tokens_BT)[1]

    def _trunk(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor | None, Tensor | float]:
        """The final hidden states (B, T, D); for a mixture the choices of each layer and the load-balancing loss."""
        c, dtype = self.config, self.compute_dtype
        # Banks -> for each projection its matrix of every layer.
        per_layer: dict[str, tuple[Tensor, ...]] = {}
        for bank in self.banks():
            # One cast, and one stack for the gradient; compiled for a GPU a cast per layer.
            matrices = bank.parameter.to(dtype).unbind(0)
            for i, name in enumerate(bank.members):
                per_layer[name] = matrices[i * c.layers : (i + 1) * c.layers]

        mask = None
        if self.document_start is not None:  # FlexAttention drops no weights
            fused = fuses_masks(tokens_BT) and not (c.inner_dropout and self.training)
            mask = document_mask(tokens_BT, self.document_start, fused)
        # Rows of the embedding are scaled by sqrt(D), since the same small matrix is the output head.
        x = F.embedding(tokens_BT, self.embedding).to(dtype) * c.d_model**0.5
        x = self._drop(x, c.dropout)
        counts, balance = [], 0.0
        for layer in range(c.layers):
            w = {name: matrices[layer] for name, matrices in per_layer.items()}
            # x + attention(norm(x)), then x + ffn(norm(x)): each block adds to the residual stream.
            x = x + self._drop(self._attention(rms_norm(x, self.attention_gain[layer]), w, layer, mask), c.dropout)
            h = rms_norm(x, self.ffn_gain[layer])
            if c.experts:
                y, count, layer_balance = self._mixture(h.flatten(0, 1), w, layer)
                h = y.view_as(h)
                counts.append(count)
                balance = balance + layer_balance
            else:
                h = self._ffn(h, w)
            x = x + self._drop(h, c.dropout)
        return rms_norm(x, self.final_gain), torch.stack(counts) if counts else None, balance

    def _attention(self, x: Tensor, w: dict[str, Tensor], layer: int, mask: BlockMask | Tensor | None) -> Tensor:
        (B, T, _), E = x.shape, self.config.head_width
        # Project to H query heads and K key/value heads of width E.
        q = F.linear(x, w["q"]).view(B, T, -1, E)
        k = F.linear(x, w["k"]).view(B, T, -1, E)
        v = F.linear(x, w["v"]).view(B, T, -1, E)
        # QK-norm: unit-scale queries and keys with a learned gain bound the attention logits.
        if self.config.qk_norm:
            q, k = rms_norm(q, self.q_gain[layer]), rms_norm(k, self.k_gain[layer])
        # RoPE: after it q · k depends on the distance in time alone.
        q, k = rotate(q, self.cos_TE[:T], self.sin_TE[:T]), rotate(k, self.cos_TE[:T], self.sin_TE[:T])
        dropped = self.config.inner_dropout if self.training else 0.0
        if mask is None and "attention" in self.kernels and self.training and T <= MAX_T and not dropped:
            return F.linear(causal_attention(q, k, v).flatten(2), w["o"])
        # Grouped queries: H / K query heads share one key/value head.
        sharing = q.shape[2] // k.shape[2]
        dense_mask = isinstance(mask, Tensor)
        # No memory-efficient kernel takes shared heads in fp32 or with a mask: copy the shared heads there.
        if q.is_cuda and (dense_mask or (mask is None and q.dtype == torch.float32)):
            k, v = k.repeat_interleave(sharing, dim=2), v.repeat_interleave(sharing, dim=2)
            sharing = 1
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, T, H, E) -> (B, H, T, E)
        # softmax(q kᵀ / sqrt(E)) v over the visible keys.
        if mask is None or dense_mask:
            options = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": sharing > 1}
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropped, **options)
        else:
            y = flex_attention(q, k, v, block_mask=mask, enable_gqa=sharing > 1)
        # Join the heads and mix them.
        return F.linear(y.transpose(1, 2).reshape(B, T, -1), w["o"])

    def _ffn(self, x: Tensor, w: dict[str, Tensor]) -> Tensor:
        dropped = self.config.inner_dropout
        if "relu2_mlp" in self.kernels and self.config.ffn == "relu2" and self.training and not dropped:
            return relu2_mlp(x, w["up"], w["down"])
        activation = ACTIVATIONS[self.config.ffn]
        up = F.linear(x, w["up"])
        hidden = activation(F.linear(x, w["gate"])) * up if "gate" in w else activation(up)
        return self._drop(hidden, dropped) @ w["down"]  # stored transposed, so no .mT

    def _mixture(self, x_ND: Tensor, w: dict[str, Tensor], layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted sum of the chosen experts' outputs (N, D); choices per expert (X,); the load-balancing loss.

        The loss is balance X sum_e f_e P_e (Fedus et al. 2021): f_e the share of the choices, P_e the mean probability,
        f_e over the whole batch where `whole_batch` says so. The mean over micro-batches is then that of the batch.
        """
        c = self.config
        # Router: a logit per token and expert, in fp32. P_e is the mean over tokens, before any noise.
        logits_NX = F.linear(x_ND.float(), self.router[layer])
        probabilities_X = logits_NX.softmax(-1).mean(0)
        if c.router_noise and self.training:
            logits_NX = logits_NX + c.router_noise * torch.randn_like(logits_NX)
        chosen_NR, experts_NR = logits_NX.topk(c.top_k)
        # Copy each token to its R experts, sorted by expert, so that one grouped matmul serves them all.
        routing = Routing(experts_NR, c.experts)
        x = routing.send(x_ND)
        activation = ACTIVATIONS[c.ffn]
        up = grouped_matmul(x, w["up"].mT, routing.offsets)
        gated = "gate" in w
        hidden = activation(grouped_matmul(x, w["gate"].mT, routing.offsets)) * up if gated else activation(up)
        # Back to token order; weights are the softmax over the chosen logits: that over all, renormalised.
        hidden = self._drop(hidden, c.inner_dropout)
        y_NRD = routing.collect(grouped_matmul(hidden, w["down"], routing.offsets))
        y_ND = (y_NRD * chosen_NR.softmax(-1).to(y_NRD.dtype)[..., None]).sum(1)
        # Least when f and P are uniform: it pulls probability away from the experts that get most tokens.
        shares_X = routing.counts.to(probabilities_X.dtype) / experts_NR.numel()
        if self.whole_batch and self.training:
            shares_X = self.batch_shares[layer]
        return y_ND, routing.counts, c.balance * c.experts * (shares_X * probabilities_X).sum()

    def _drop(self, x: Tensor, probability: float) -> Tensor:
        return F.dropout(x, probability, self.training) if probability else x

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def active_parameter_count(self) -> int:
        """Parameters active for one token: all but the experts that it is not sent to."""
        return self.parameter_count() - self._idle_count()

    def matmul_parameter_count(self) -> int:
        """Parameters that multiply activations: the block matrices, the router and the tied head."""
        router = self.router.numel() if self.config.experts else 0
        return self.embedding.numel() + router + sum(p.numel() for p in self.weights.values())

    def active_matmul_parameter_count(self) -> int:
        """Parameters that multiply one token's activations."""
        return self.matmul_parameter_count() - self._idle_count()

    def _idle_count(self) -> int:
        experts = sum(p.numel() for p in self.weights.values() if p.ndim == 4)
        return experts - experts * self.config.top_k // self.config.experts if experts else 0

    def flops_per_token(self, seq_len: int, causal: bool = False) -> int:
        """Forward and backward, 6 N + 12 L d T: N the active matmul parameters, attention in full (PaLM, appendix B)
        or its causal half."""
        attention = 12 * self.config.layers * self.config.d_model * seq_len
        return 6 * self.active_matmul_parameter_count() + (attention // 2 if causal else attention)
