"""The arms of a fair fight: an optimizer, the search space declared for it, and the trials drawn from that space.

    for settings in draw(ARMS["muon"], trials=32): print(settings)

Trials are a Sobol sequence (1967) in Owen's scrambling (scipy.stats.qmc) with a fixed seed: even in every setting at
once, equal on every machine, and the first 32 of 64 trials are the 32.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.stats import qmc

from suites.scales import Fields

SOBOL_SEED = 0
EDGE = 0.05  # share of an axis at either end that counts as its edge


@dataclass(frozen=True)
class Axis:
    """The range of a setting, and along what trials are even in it: the value, its logarithm, or that of 1 - value."""

    low: float
    high: float
    along: Literal["value", "log", "log of 1 - value"] = "log"

    def _coordinate(self, value: float) -> float:
        if self.along == "value":
            return value
        return math.log(value) if self.along == "log" else -math.log(1 - value)

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        low, high = self._coordinate(self.low), self._coordinate(self.high)
        return (self._coordinate(value) - low) / (high - low)

    def value(self, place: float) -> float:
        """The setting at a place, to three digits (of 1 - value where that is the axis)."""
        low, high = self._coordinate(self.low), self._coordinate(self.high)
        at = low + place * (high - low)
        if self.along == "log of 1 - value":
            return round(1 - _three_digits(math.exp(-at)), 9)
        return _three_digits(at if self.along == "value" else math.exp(at))

    def on_edge(self, value: float) -> bool:
        return not EDGE <= self.place(value) <= 1 - EDGE


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")


@dataclass(frozen=True)
class Arm:
    """A way to train: settings that make it what it is, and a range for each setting that is tuned."""

    name: str
    fixed: Fields
    space: Mapping[str, Axis]


# What every arm tunes next to the rate of its block matrices. Decay is so wide because AdamW's best may be 1.0.
SHARED = {
    "adamw_lr": Axis(0.001, 0.1),
    "weight_decay": Axis(0.003, 3.0),
    "warmup": Axis(0.0, 0.3, "value"),
}
BETAS = {"beta1": Axis(0.5, 0.98, "log of 1 - value"), "beta2": Axis(0.7, 0.999, "log of 1 - value")}
MUON_SPACE = {"lr": Axis(0.003, 0.3), **SHARED, "momentum": Axis(0.7, 0.99, "log of 1 - value")}

ARMS = {
    arm.name: arm
    for arm in (
        Arm("adamw", {"optimizer": "adamw"}, {"lr": Axis(0.0002, 0.05), **SHARED, **BETAS}),
        Arm("muon", {"optimizer": "muon"}, MUON_SPACE),
    )
}


def draw(arm: Arm, trials: int) -> list[dict[str, Any]]:
    """The tuned settings of each trial; a power of two is drawn, where the sequence is even, and cut."""
    sequence = qmc.Sobol(len(arm.space), scramble=True, rng=np.random.default_rng(SOBOL_SEED))
    points = sequence.random_base2(math.ceil(math.log2(trials)))[:trials]
    return [{k: axis.value(float(u)) for (k, axis), u in zip(arm.space.items(), p, strict=True)} for p in points]
