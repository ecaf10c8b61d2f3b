"""The arms of a fair fight: an optimizer, the search space declared for it, and the trials drawn from that space.

    for settings in draw(ARMS["muon"], trials=32): print(settings)
    own_arm("my_file.py:MyOptimizer", ("lr=0.1:3", "momentum=0.7:0.99", "nesterov=True"))

Trials are a Sobol sequence (1967) in Owen's scrambling (scipy.stats.qmc) with a fixed seed: even in every setting at
once, equal on every machine, and the first 32 of 64 trials are the 32.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.stats import qmc

from engine.cli import BadInput
from engine.own_optimizer import class_name, options_of

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
            return round(1 - three_digits(math.exp(-at)), 9)
        return three_digits(at if self.along == "value" else math.exp(at))

    def on_edge(self, value: float) -> bool:
        return not EDGE <= self.place(value) <= 1 - EDGE


def three_digits(value: float) -> float:
    return float(f"{value:.3g}")


@dataclass(frozen=True)
class Arm:
    """A way to train: settings that make it what it is, and a range for each setting that is tuned. `options` names
    those of the space that are options of a user's class."""

    name: str
    fixed: Mapping[str, Any]
    space: Mapping[str, Axis]
    options: tuple[str, ...] = ()


# What every arm tunes next to the rate of its block matrices. Decay is so wide because AdamW's best may be 1.0.
SHARED = {
    "adamw_lr": Axis(0.001, 0.3),
    "weight_decay": Axis(0.003, 3.0),
    "warmup": Axis(0.0, 0.3, "value"),
}
ADAMW_LR = Axis(0.0002, 0.05)
BETAS = {"beta1": Axis(0.5, 0.98, "log of 1 - value"), "beta2": Axis(0.7, 0.999, "log of 1 - value")}
MUON_SPACE = {"lr": Axis(0.003, 0.3), **SHARED, "momentum": Axis(0.7, 0.99, "log of 1 - value")}
# A user's class takes no --weight-decay; its options, decay among them, are tuned if --space gives their ranges.
OWN_SPACE = {"lr": Axis(0.0001, 3.0), "adamw_lr": SHARED["adamw_lr"], "warmup": SHARED["warmup"]}


def _muon(name: str, without: str = "", **fixed: Any) -> Arm:
    """Muon with an option, and without an axis that means nothing then."""
    return Arm(name, {"optimizer": "muon", **fixed}, {k: axis for k, axis in MUON_SPACE.items() if k != without})


ARMS = {
    arm.name: arm
    for arm in (
        Arm("adamw", {"optimizer": "adamw"}, {"lr": ADAMW_LR, **SHARED, **BETAS}),
        _muon("muon"),
        _muon("muon-rows", normalize_rows=True),  # NorMuon
        _muon("muon-heads", heads_per_matrix=2),
        _muon("muon-single-heads", heads_per_matrix=1),
        _muon("muon-cautious", decay_rule="cautious"),
        _muon("muon-hyperball", "weight_decay", decay_rule="hyperball"),
        Arm(  # AdamW trains q and k
            "muon-vo-ffn",
            {"optimizer": "muon", "muon_on": "v,o,up,down"},
            MUON_SPACE | {"left_lr": ADAMW_LR},
        ),
        _muon("muon-svd", ns_method="svd"),
        _muon("muon-cubic", ns_coefficients="cubic"),
        _muon("muon-none", ns_method="none"),  # the momentum, scaled
        _muon("muon-no-momentum", "momentum", momentum=0.0),
    )
}


def own_arm(flag: str, words: Sequence[str] = ()) -> Arm:
    """A user's class as an arm: `flag` is FILE.py:CLASS, a word a range (key=low:high) or a fixed option (key=value).

    An option's range is even in the logarithm of 1 - value where it is between 0.5 and 1, as of a momentum, in the
    logarithm where it is above 0, else in the value. BadInput where a word is neither.
    """
    space, fixed = dict(OWN_SPACE), []
    for word in words:
        key, _, text = word.partition("=")
        if text and ":" not in text and key not in OWN_SPACE:
            fixed.append(word)
            continue
        try:
            low, high = map(float, text.split(":"))
        except ValueError:
            more = "" if key in OWN_SPACE else ", or key=value for a fixed option"
            raise BadInput(f"--space {word}: must be a range, as {key or 'lr'}=0.1:3{more}") from None
        if not -math.inf < low < high < math.inf:
            raise BadInput(f"--space {word}: the range must go from a number to a greater one")
        along = "log of 1 - value" if low >= 0.5 and high < 1 else "log" if low > 0 else "value"
        space[key] = Axis(low, high, OWN_SPACE[key].along if key in OWN_SPACE else along)
        if space[key].along == "log" and low <= 0:
            raise BadInput(f"--space {word}: must be above 0")
    options_of(fixed)  # refuses what is none
    options = tuple(key for key in space if key not in OWN_SPACE)
    return Arm(class_name(flag), {"optimizer": flag, "optimizer_options": tuple(fixed)}, space, options)


def value_of(fields: Mapping[str, Any], setting: str) -> Any:
    """A tuned setting or option of a condition; None where it has none of that name."""
    return fields[setting] if setting in fields else options_of(fields.get("optimizer_options", ())).get(setting)


def draw(arm: Arm, trials: int) -> list[dict[str, Any]]:
    """The settings of each trial, fixed and tuned; a power of two is drawn, where the sequence is even, and cut."""
    sequence = qmc.Sobol(len(arm.space), scramble=True, rng=np.random.default_rng(SOBOL_SEED))
    points = sequence.random_base2(math.ceil(math.log2(trials)))[:trials]
    return [
        _settings(arm, {k: axis.value(float(u)) for (k, axis), u in zip(arm.space.items(), p, strict=True)})
        for p in points
    ]


def _settings(arm: Arm, tuned: Mapping[str, float]) -> dict[str, Any]:
    fields = {**arm.fixed, **{key: value for key, value in tuned.items() if key not in arm.options}}
    if arm.options:
        fields["optimizer_options"] = (*arm.fixed["optimizer_options"], *(f"{k}={tuned[k]}" for k in arm.options))
    return fields
