"""Splits the parameters of any module between Muon and AdamW, and joins both optimizers into one.

    groups = param_groups(model); print(groups)
    optimizer = MuonWithAdamW(Muon(groups.muon, lr=0.02), torch.optim.AdamW(groups.adamw, lr=3e-4))

Muon is for the matrices between hidden layers. Embeddings, output heads, gains and biases belong to AdamW.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .optimizer import Muon

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
# Last part of the name of a layer whose outputs are logits or predictions, outside numbered blocks.
HEAD_NAMES = re.compile(
    r"(lm_|out_|classification_)?heads?|output(_layer|_projection)?|(to_)?logits|classifier|score|fc|decoder|proj_out|"
    r"qa_outputs|embed_out|unembed(ding)?|readout",
    re.IGNORECASE,
)
# In the name of a parameter, or of its module's type, where the module is not one of PyTorch's layers.
EMBEDDING_WORDS = re.compile(r"(^|[._])(\w*embed\w*|emb|pos|position\w*|tokens?|wte|wpe)($|[._])", re.IGNORECASE)

Choice = str | Sequence[str] | Callable[[str, Tensor], bool]


class Placement(NamedTuple):
    """Where a parameter went ("Muon", "AdamW" or "frozen") and why. A tied parameter has several names."""

    names: tuple[str, ...]
    parameter: Tensor
    optimizer: str
    reason: str


@dataclass(frozen=True, repr=False)
class ParamGroups:
    """`muon` and `adamw` are groups for the two optimizers; `print` shows which parameter went where."""

    muon: list[dict[str, Any]]
    adamw: list[dict[str, Any]]
    placements: list[Placement]

    def describe(self) -> str:
        """One line for each parameter, under its optimizer: names, shape, reason."""
        lines = []
        for optimizer in ("Muon", "AdamW", "frozen"):
            placed = [p for p in self.placements if p.optimizer == optimizer]
            size = sum(p.parameter.numel() for p in placed)
            lines.append(f"{optimizer}: {len(placed)} tensors, {size:,} parameters")
            lines += [f"  {' = '.join(p.names)}  {tuple(p.parameter.shape)}  {p.reason}" for p in placed]
        return "\n".join(lines)

    __str__ = describe


def param_groups(
    model: nn.Module,
    *,
    adamw: Choice = (),
    muon: Choice = (),
    row_splits: Mapping[str, int | Sequence[int]] | None = None,
) -> ParamGroups:
    """The parameters of `model` as groups for `Muon(groups.muon)` and `torch.optim.AdamW(groups.adamw)`.

    Muon gets the weights of linear layers, convolutions as (out, everything else), recurrent and attention weights with
    their stacked projections kept apart, and matrices of other modules. AdamW gets embeddings, output heads (tied to an
    embedding, or named as in HEAD_NAMES), routers, depthwise convolutions, and, in a group without weight decay, gains
    and biases. Parameters with requires_grad=False are in no group.
    `adamw` and `muon` (for matrices) overrule this. Each is a function (name, parameter) -> bool, or patterns as in
    fnmatch, where the name of a module means all its parameters. `row_splits` gives, for a pattern, how many equal
    projections are stacked in the rows of a matrix, or their row counts: {"*.attn.qkv": 3}.
    Raises ValueError for a pattern that matches nothing, a parameter chosen for both, and counts that do not add up.
    """
    names: dict[Tensor, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    flat_names = [name for aliases in names.values() for name in aliases]
    choices = (_chooser(adamw, flat_names), _chooser(muon, flat_names))
    splits = [(_chooser(pattern, flat_names), counts) for pattern, counts in (row_splits or {}).items()]
    reasons = _reasons_by_layer(model)

    placements = []
    muon_groups: dict[tuple, dict[str, Any]] = {}
    adamw_groups = [{"params": []}, {"params": [], "weight_decay": 0.0}]
    for p, aliases in names.items():
        module = _owner(model, aliases[0])
        options = _matrix_options(module, aliases[0], p)
        for matches, counts in splits:
            if p.ndim > 1 and any(matches(name, p) for name in aliases):
                options["row_splits"] = _row_counts(aliases[0], len(p) if "flatten" in options else p.shape[-2], counts)
        reason = reasons.get(p) or _reason_for_adamw(module, aliases[0], p, options)
        to_adamw, to_muon = (any(matches(name, p) for name in aliases) for matches in choices)
        if to_adamw and to_muon:
            raise ValueError(f"{aliases[0]} is chosen for AdamW and for Muon")
        if not p.requires_grad:
            optimizer, reason = "frozen", "requires_grad=False"
        elif to_adamw or (reason and not (to_muon and _is_matrix(p, options))):
            optimizer, reason = "AdamW", reason or "chosen"
        else:
            optimizer, reason = "Muon", _matrices(p, options)
        placements.append(Placement(tuple(aliases), p, optimizer, reason))
        if optimizer == "Muon":
            muon_groups.setdefault(tuple(options.items()), {"params": [], **options})["params"].append(p)
        elif optimizer == "AdamW":
            adamw_groups[_is_gain_or_bias(module, aliases[0], p)]["params"].append(p)

    groups = ParamGroups(list(muon_groups.values()), [g for g in adamw_groups if g["params"]], placements)
    grouped = [id(p) for group in groups.muon + groups.adamw for p in group["params"]]
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trained), "every trained parameter belongs to exactly one group"
    return groups


def _chooser(choice: Choice, names: Iterable[str]) -> Callable[[str, Tensor], bool]:
    """A function (name, parameter) -> bool from what the user gave."""
    if callable(choice):
        return choice

    def matches(name: str, pattern: str) -> bool:
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")

    patterns = [choice] if isinstance(choice, str) else choice
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise ValueError(f"no parameter has a name like {pattern!r}")
    return lambda name, p: any(matches(name, pattern) for pattern in patterns)


def _owner(model: nn.Module, name: str) -> nn.Module:
    """The layer that a parameter belongs to, also behind torch.nn.utils.parametrize."""
    layer, parametrized, _ = f".{name}".partition(".parametrizations.")
    return model.get_submodule((layer if parametrized else layer.rpartition(".")[0]).removeprefix("."))


def _reasons_by_layer(model: nn.Module) -> dict[Tensor, str]:
    """Parameters that belong to AdamW because of the layer that has them, under whatever name."""
    embeddings = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    heads = {p: "output head" for layer in _output_heads(model) for p in layer.parameters()}
    return heads | {p: "embedding" for layer in embeddings for p in layer.parameters()}


def _output_heads(model: nn.Module) -> Iterator[nn.Module]:
    """Layers that make logits or predictions, by type or name; of a small head of several layers, the last."""
    for name, module in model.named_modules():
        *path, leaf = name.split(".")
        if isinstance(module, nn.AdaptiveLogSoftmaxWithLoss):
            yield module
        elif HEAD_NAMES.fullmatch(leaf) and not any(part.isdigit() for part in path):
            for head in module.children() if isinstance(module, (nn.ModuleList, nn.ModuleDict)) else [module]:
                layers = [m for m in head.modules() if isinstance(m, (nn.Linear, *CONVOLUTIONS))]
                stacked = any(isinstance(m, nn.ModuleList) for m in head.modules())  # the decoder of an encoder
                yield from [] if stacked else layers[-1:]


def _matrix_options(module: nn.Module, name: str, p: Tensor) -> dict[str, Any]:
    """The options of Muon's group that say which matrices are stored in p."""
    leaf = name.rpartition(".")[2]
    if isinstance(module, CONVOLUTIONS) and p.ndim > 2:
        apart = {"row_splits": (len(p) // module.groups,) * module.groups} if module.groups > 1 else {}
        return {"flatten": True, **apart}
    if isinstance(module, nn.MultiheadAttention) and leaf == "in_proj_weight":
        return {"row_splits": (len(p) // 3,) * 3}  # q, k, v
    if isinstance(module, RECURRENT) and leaf.startswith(("weight_ih", "weight_hh")) and len(p) > module.hidden_size:
        return {"row_splits": (module.hidden_size,) * (len(p) // module.hidden_size)}  # gates
    if type(module).__name__ == "Conv1D" and p.ndim == 2:
        return {"transposed": (True,)}  # GPT-2's linear layer in transformers is stored (in, out)
    return {}


def _row_counts(name: str, rows: int, splits: int | Sequence[int]) -> tuple[int, ...]:
    counts = (rows // splits,) * splits if isinstance(splits, int) else tuple(splits)
    if sum(counts) != rows:
        raise ValueError(f"{name} has {rows} rows, but row_splits is {splits}")
    return counts


def _is_matrix(p: Tensor, options: Mapping[str, Any]) -> bool:
    flatten = "flatten" in options
    if not p.is_floating_point() or p.ndim < 2 or (p.ndim > 4 and not flatten):
        return False
    rows, cols = (len(p), p[0].numel()) if flatten else p.shape[-2:]
    return min(cols, *options.get("row_splits", (rows,))) > 1 if rows else False


def _is_gain_or_bias(module: nn.Module, name: str, p: Tensor) -> bool:
    return p.ndim < 2 or name.endswith("bias") or "norm" in type(module).__name__.lower()


def _reason_for_adamw(module: nn.Module, name: str, p: Tensor, options: Mapping[str, Any]) -> str:
    """Why a parameter does not belong to Muon, or nothing."""
    described = f"{type(module).__name__}.{name}"
    if _is_gain_or_bias(module, name, p):
        return "gain or bias"
    if "router" in described.lower():
        return "router"
    if isinstance(module, CONVOLUTIONS) and module.groups > 1 and p.shape[1] == 1:
        return "depthwise convolution"
    known = isinstance(module, (nn.Linear, nn.MultiheadAttention, *CONVOLUTIONS, *RECURRENT))
    if not known and EMBEDDING_WORDS.search(described):
        return "named like an embedding"
    return "" if _is_matrix(p, options) else "not a matrix"


def _matrices(p: Tensor, options: Mapping[str, Any]) -> str:
    """How many matrices of which size p holds: "3 of 32 x 32"."""
    rows, cols = (len(p), p[0].numel()) if "flatten" in options else p.shape[-2:]
    batch = p.numel() // (rows * cols)
    heights = Counter(options.get("row_splits", (rows,)))
    return "matrices: " + ", ".join(f"{batch * count} of {height} x {cols}" for height, count in heights.items())


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon and another optimizer as one, for trainers and schedulers that take a single optimizer.

    Its parameter groups are Muon's, then the other's: whoever changes a group's `lr` changes that optimizer's. The
    state dictionary has the usual format. Groups must be added to the two optimizers before they are joined.
    """

    def __init__(self, muon: Muon, adamw: torch.optim.Optimizer) -> None:
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self.parts = (muon, adamw)
        for part in self.parts:
            self.state.update(part.state)
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Share state and groups with the parts, also after load_state_dict has replaced both."""
        super().__setstate__(state)
        begin = 0
        for part in self.parts:
            end = begin + len(part.param_groups)
            part.__setstate__({"state": self.state, "param_groups": self.param_groups[begin:end]})
            begin = end

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "parts"):
            raise ValueError("add the group to Muon or to AdamW, then join them with MuonWithAdamW again")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss
