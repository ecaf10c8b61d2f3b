"""A user's optimizer: any torch.optim.Optimizer class of a file, on the block matrices, one (out, in) matrix at a time.

    own = load_class("my_file.py:MyOptimizer", ("momentum=0.9",)); try_out(own, lr=0.02, device)
    optimizer = OwnOptimizer(own, lr=0.02, sharding=sharding, banks=model.banks())

The class needs to know neither banks, ranks, clipping nor checkpoints: it gets 2-D parameters with their gradients, and
its `lr` from the schedule. A step waits for the device, to leave out one whose gradient is not finite.
"""

import ast
import hashlib
import importlib.util
import inspect
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.cli import BadInput, first_line
from engine.ranks import Sharding, unit_view

WORDS = {"true": True, "false": False}  # as Python spells them and as others do
TRIAL_STEPS, TRIAL_SHAPES = 3, ((8, 16), (16, 8))


class BankOfMatrices(Protocol):
    """What `OwnOptimizer` asks of a bank: its matrices, and for each layer whether the map is the transpose."""

    parameter: nn.Parameter
    transposed: tuple[bool, ...]


@dataclass(frozen=True)
class OwnClass:
    """`make` is the class that `flag` (FILE.py:CLASS) names; `code` are 16 hex digits over its file."""

    flag: str
    make: type[torch.optim.Optimizer]
    options: dict[str, Any]
    code: str

    def on(self, matrices: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
        return self.make([{"params": list(matrices)}], lr=lr, **self.options)


def is_own(optimizer: str) -> bool:
    """Whether --optimizer names a class of a file."""
    return ".py:" in optimizer


def without_folder(optimizer: str) -> str:
    """--optimizer as a run records it: where its file lies does not change what is learned."""
    return Path(optimizer).name


def class_name(optimizer: str) -> str:
    """The part of --optimizer that can stand in the name of a folder."""
    return optimizer.rpartition(":")[2]


def load_class(flag: str, words: Sequence[str] = ()) -> OwnClass:
    """Run the file and take the class out of it; BadInput unless it is an optimizer that takes `lr` and the options."""
    where, _, name = flag.rpartition(":")
    path, named = Path(where), f"--optimizer {flag}"
    try:
        source = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{named}: {path} cannot be read ({error.strerror})") from None
    spec = importlib.util.spec_from_file_location(f"own_optimizer_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    try:
        exec(compile(source, path, "exec"), module.__dict__)  # not by the loader: its bytecode may be of before an edit
    except (Exception, SystemExit) as error:
        raise BadInput(f"{named}: {path} cannot be imported ({type(error).__name__}: {first_line(error)})") from None
    if not hasattr(module, name):
        raise BadInput(f"{named}: {path} has no class {name}")
    make = getattr(module, name)
    if not (isinstance(make, type) and issubclass(make, torch.optim.Optimizer)):
        raise BadInput(f"{named}: {name} is not a torch.optim.Optimizer")
    options = options_of(words)
    taken = inspect.signature(make).parameters
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        taken = {*taken, "lr", *options}
    for option in ("lr", *options):
        if option not in taken:
            raise BadInput(f"{named}: {name} takes no {option}, only {', '.join(taken)}")
    return OwnClass(flag, make, options, hashlib.sha256(source).hexdigest()[:16])


def options_of(words: Sequence[str]) -> dict[str, Any]:
    """Options from words like `momentum=0.9`: numbers, booleans, None, tuples and strings as Python writes them."""
    options: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.isidentifier():
            raise BadInput(f"--optimizer-options {word}: must be key=value, as momentum=0.9")
        if key in ("params", "lr", *options):
            advice = "is given twice" if key in options else "comes from --lr" if key == "lr" else "is not an option"
            raise BadInput(f"--optimizer-options {word}: {key} {advice}")
        try:
            options[key] = WORDS[text] if text in WORDS else ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            options[key] = text
    return options


def try_out(own: OwnClass, lr: float, device: torch.device) -> bool:
    """Train two small matrices with it, and each by itself; whether the results agree, so that ranks may share out the
    matrices. BadInput where it cannot be made, makes no step, has no rate to set, or keeps what no file can hold."""
    named = f"--optimizer {own.flag}"
    try:
        with torch.random.fork_rng(devices=[]):
            optimizer, together = _trained(own, lr, TRIAL_SHAPES, device)
            apart = [_trained(own, lr, (shape,), device)[1][0] for shape in TRIAL_SHAPES]
    except BadInput:
        raise
    except Exception as error:
        what = "with these --optimizer-options" if own.options else "on two matrices"
        raise BadInput(f"{named}: a trial {what} failed ({type(error).__name__}: {first_line(error)})") from None
    if not all("lr" in group for group in optimizer.param_groups):
        raise BadInput(f"{named}: its param_groups have no lr, which the schedule sets")
    file = io.BytesIO()
    try:
        torch.save(_on_cpu(optimizer.state_dict()), file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:
        raise BadInput(f"{named}: its state_dict is more than tensors and numbers ({first_line(error)})") from None
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(together, apart, strict=True))


def _trained(
    own: OwnClass, lr: float, shapes: Sequence[tuple[int, int]], device: torch.device
) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """A few steps on matrices whose start and gradients follow from their shape alone."""
    of_shape = {shape: torch.Generator().manual_seed(shape[0]) for shape in shapes}
    draws = {shape: torch.randn(1 + TRIAL_STEPS, *shape, generator=g).to(device) for shape, g in of_shape.items()}
    matrices = [nn.Parameter(draws[shape][0].clone()) for shape in shapes]
    optimizer = own.on(matrices, lr)
    for step in range(TRIAL_STEPS):
        for matrix, shape in zip(matrices, shapes, strict=True):
            matrix.grad = draws[shape][1 + step].clone()
        optimizer.step()
    return optimizer, [matrix.detach() for matrix in matrices]


class Owned(NamedTuple):
    """This rank's part of a bank, its matrices as (out, in) parameters in the same memory, and which are transposed."""

    part: Tensor
    matrices: list[nn.Parameter]
    transposed: list[bool]


class OwnOptimizer:
    """A user's optimizer in the place of one of ours, on this rank's matrices of the banks.

    Like Muon it divides gradients by `grad_scale` and leaves a step out if `found_inf` is not zero.
    """

    def __init__(self, own: OwnClass, *, lr: float, sharding: Sharding, banks: Sequence[BankOfMatrices]) -> None:
        self.own, self.lr, self.sharding = own, lr, sharding
        self.grad_scale: Tensor | float = 1.0
        self.found_inf: Tensor | float = 0.0
        self.owned: list[Owned] = []
        self.number_of: dict[int, int] = {}  # id of a matrix -> its number among those of all ranks
        first = 0
        for bank in banks:
            share = sharding.share_of[id(bank.parameter)]
            units, start = unit_view(bank.parameter), first + share.start
            first += len(units)
            for part in sharding.own(bank.parameter):
                matrices = unit_view(part.detach())
                flags = sharding.own_entries(bank.parameter, bank.transposed)
                flags = [flag for flag in flags for _ in range(len(matrices) // len(flags))]  # experts share a layer's
                owned = [nn.Parameter(m.mT if flag else m) for m, flag in zip(matrices, flags, strict=True)]
                self.number_of |= {id(matrix): start + i for i, matrix in enumerate(owned)}
                self.owned.append(Owned(part, owned, flags))
        self.reset()

    def reset(self) -> None:
        """Begin anew: no state, and the rate at its peak."""
        self.inner = self.own.on([matrix for owned in self.owned for matrix in owned.matrices], self.lr)
        for group in self.inner.param_groups:
            group["peak_lr"] = group["lr"]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @torch.no_grad()
    def step(self) -> None:
        if self.found_inf:
            return
        for part, matrices, transposed in self.owned:
            gradients = unit_view(part.grad / self.grad_scale)
            for matrix, gradient, flag in zip(matrices, gradients, transposed, strict=True):
                matrix.grad = gradient.mT if flag else gradient
        self.inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free the gradients, whatever `set_to_none` says."""
        for part, matrices, _ in self.owned:
            for tensor in (part, *matrices):
                tensor.grad = None

    def whole_state(self) -> dict[str, Any]:
        """What one rank alone would hold: {"state": {number of a matrix: its state}, and the rest of its state_dict}.
        All ranks must call it."""
        saved = _on_cpu(self.inner.state_dict())
        mine = {number: saved["state"][i] for i, number in enumerate(self._numbers()) if i in saved["state"]}
        parts: list[dict[int, Any]] = [mine]
        if self.sharding.world_size > 1:
            parts = [{} for _ in range(self.sharding.world_size)]
            dist.all_gather_object(parts, mine)
        groups = [{k: v for k, v in group.items() if k != "params"} for group in saved["param_groups"]]
        state = {number: one for part in parts for number, one in part.items()}
        return saved | {"state": dict(sorted(state.items())), "param_groups": groups}

    def load_whole_state(self, saved: dict[str, Any]) -> None:
        """Take this rank's part of what `whole_state` returned, on any number of ranks; none of an imported run."""
        self.reset()
        if saved == {"state": {}}:
            return
        state = {i: saved["state"][n] for i, n in enumerate(self._numbers()) if n in saved["state"]}
        own = [group["params"] for group in self.inner.state_dict()["param_groups"]]
        groups = [{**group, "params": p} for group, p in zip(saved["param_groups"], own, strict=True)]
        self.inner.load_state_dict(saved | {"state": state, "param_groups": groups})

    def _numbers(self) -> list[int]:
        """The number of each matrix, in the order in which a state_dict counts them."""
        return [self.number_of[id(p)] for group in self.inner.param_groups for p in group["params"]]


def _on_cpu(value: Any) -> Any:
    """The same with every tensor on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(one) for key, one in value.items()}
    return type(value)(map(_on_cpu, value)) if type(value) in (list, tuple) else value
