"""Settings of train.py whose defaults depend on the model.

defaults_of("nano").lr["muon"]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

NANO = ("nano", "moe-nano")  # for a first look on a CPU


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """The settings whose defaults depend on the model, under their names; `lr` by optimizer."""

    lr: Mapping[str, float]
    adamw_lr: float
    momentum: float
    beta1: float
    batch_tokens: int
    eval_tokens: int

    def rates(self, optimizer: str) -> dict[str, float]:
        """Both rates of AdamW, or of a kind of Muon."""
        return {"lr": self.lr["adamw" if optimizer == "adamw" else "muon"], "adamw_lr": self.adamw_lr}


# The winners of the sweeps in bench/LOG.md, which moe-nano borrows.
SMALL = Defaults(
    lr={"muon": 0.04, "adamw": 0.005}, adamw_lr=0.02, momentum=0.85, beta1=0.7, batch_tokens=8192, eval_tokens=16_384
)
# Not swept yet: Muon's rates are the 88M speedrun's of the prior work, AdamW's lies between its 0.006 and 0.0005.
LARGE = Defaults(
    lr={"muon": 0.024, "adamw": 0.002},
    adamw_lr=0.006,
    momentum=0.95,
    beta1=0.9,
    batch_tokens=16_384,
    eval_tokens=131_072,
)


def defaults_of(model: str) -> Defaults:
    """The defaults of a named size."""
    return SMALL if model in NANO else LARGE


def default_data(model: str) -> Path:
    """The embedded shards whose vocabulary suits the model, or the other ones where only those were built."""
    small, large = Path("shards/embedded-4096"), Path("shards/embedded-49152")
    first, second = (small, large) if model in NANO else (large, small)
    return second if second.exists() and not first.exists() else first
