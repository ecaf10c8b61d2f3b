"""Reads on with a model, token by token: the keys and values of what it has read are kept.

    decoder = Decoder(model); logits_BV = decoder.read(prompt_BT); logits_BV = decoder.step(token_B1)

Shape letters: B batch, T time, D model width, E width of a head, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Decoder:
    """The model as it reads on from where it is: keys and values of the tokens read so far are kept, so that the next
    one costs a pass of one token. In fp32, without gradients, of the weights as they are when it is made.

    On a CPU such a pass of a small model costs mostly the number of operations and the reading of matrices: so q, k and
    v are one product, norms and rotations few operations, and matrices lie as a product with one row reads fastest.
    """

    @torch.inference_mode()
    def __init__(self, model: nn.Module) -> None:
        c, device = model.config, model.embedding.device
        self.model, self.context, self.device, self.length = model, c.seq_len, device, 0
        banks = ((bank, i, name) for bank in model.banks() for i, name in enumerate(bank.members))
        matrices = {name: bank.parameter[i * c.layers : (i + 1) * c.layers] for bank, i, name in banks}
        self.layers = [{name: by_layer[layer] for name, by_layer in matrices.items()} for layer in range(c.layers)]
        root_d, root_e = c.d_model**0.5, c.head_width**0.5
        for layer, w in enumerate(self.layers):
            w["qkv"], w["o"] = torch.cat((w["q"], w["k"], w["v"])).mT.contiguous(), w["o"].mT.contiguous()
            if not c.experts:
                w |= {name: w[name].mT.contiguous().mT for name in ("gate", "up") if name in w}
            w |= {"attention_gain": model.attention_gain[layer] * root_d, "ffn_gain": model.ffn_gain[layer] * root_d}
            if c.qk_norm:
                gains = model.q_gain[layer].expand(c.heads, -1), model.k_gain[layer].expand(c.kv_heads, -1)
                w["qk_gain"] = torch.cat(gains)[:, None] * root_e
        self.final_gain, self.head = model.final_gain * root_d, model.embedding.mT.contiguous()
        self.turns_TEE = model.turns()
        # F.rms_norm adds eps to the mean square: sqrt(x·x + eps D) is hypot(|x|, sqrt(eps D)).
        eps = torch.finfo(torch.float32).eps
        self.floors = {width: torch.tensor((eps * width) ** 0.5, device=device) for width in (c.d_model, c.head_width)}

    @torch.inference_mode()
    def read(self, tokens_BT: Tensor, padding_B: Tensor | None = None) -> Tensor:
        """Start anew with these tokens, at most `context`; logits (B, V) of the one after them.

        Rows of unlike length are padded in front by `padding_B` tokens, which no other token sees. Positions count from
        the padding's start, which changes nothing: RoPE knows distances only.
        """
        c = self.model.config
        shape = (c.layers, 2, len(tokens_BT), c.kv_heads, c.seq_len, c.head_width)
        self.kept, self.length, self.hidden = torch.empty(shape, device=self.device), 0, None
        if padding_B is not None:
            self.hidden = (torch.arange(c.seq_len, device=self.device) < padding_B[:, None])[:, None, None]  # of keys
        return self.step(tokens_BT)

    @torch.inference_mode()
    def step(self, tokens_BT: Tensor) -> Tensor:
        """Read the next token of each row (B, 1), if there is room: `length` < `context`; logits (B, V) after it."""
        (B, T), start, end, c = tokens_BT.shape, self.length, self.length + tokens_BT.shape[1], self.model.config
        turns = self.turns_TEE[start] if T == 1 else self.turns_TEE[start:end]
        mask = None if self.hidden is None else ~self.hidden[..., :end]
        if mask is not None and T > 1:  # padding sees itself, so that it stays finite
            mask = (mask | torch.eye(T, dtype=torch.bool, device=self.device)).tril()
        options = {"attn_mask": mask, "is_causal": mask is None and T > 1, "enable_gqa": c.heads > c.kv_heads}
        x = F.embedding(tokens_BT.flatten(), self.model.embedding) * c.d_model**0.5  # (B T, D)
        for layer, (w, (keys, values)) in enumerate(zip(self.layers, self.kept, strict=True)):
            heads = self._norm(x, w["attention_gain"]).mm(w["qkv"]).view(B, T, -1, c.head_width).transpose(1, 2)
            qk = heads[:, : -c.kv_heads]
            if c.qk_norm:
                qk = self._norm(qk, w["qk_gain"])
            qk = qk @ turns if T == 1 else (qk[..., None, :] @ turns).squeeze(-2)
            keys[:, :, start:end], values[:, :, start:end] = qk[:, c.heads :], heads[:, -c.kv_heads :]
            y = F.scaled_dot_product_attention(qk[:, : c.heads], keys[:, :, :end], values[:, :, :end], **options)
            x = torch.addmm(x, y.transpose(1, 2).reshape(B * T, -1), w["o"])
            h = self._norm(x, w["ffn_gain"])
            x = x + (self.model._mixture(h, w, layer)[0] if c.experts else self.model._ffn(h, w))
        self.length = end
        return self._norm(x.view(B, T, -1)[:, -1], self.final_gain).mm(self.head)

    def _norm(self, x: Tensor, gain: Tensor) -> Tensor:
        """`rms_norm` with a gain that is multiplied by the root of the width."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * (gain / torch.hypot(norm, self.floors[x.shape[-1]]))
