"""What the suites train at each scale: models, budgets and the grids of sweeps.

    SCALES["nano"].moe["tokens"]; SCALES["full"].rates["moe-lr-muon"]

full has the documents' sizes, nano the same experiments on models for two CPU cores.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from suites import documents
from suites.arms import ARMS, Arm

Fields = Mapping[str, Any]  # of settings.Settings


@dataclass(frozen=True)
class Fight:
    """The runs of a fair fight: model and budget, the arms, the first being the reference, and the trials of each."""

    fields: Fields
    arms: tuple[Arm, ...] = (ARMS["adamw"], ARMS["muon"])
    trials: int = 32

    @property
    def steps(self) -> int:
        return self.fields["tokens"] // self.fields["batch_tokens"]

    def budget(self, steps: int, validations: int = 1) -> Fields:
        """So many steps, and so many validations after the first."""
        return {"tokens": steps * self.fields["batch_tokens"], "eval_every": max(1, steps // validations)}


@dataclass(frozen=True)
class Scale:
    """Model and budget of each kind of suite, and the grids of their sweeps."""

    dense: Fields  # S0's short run
    baseline: Fields  # S3's longer run
    search: Fields  # S2's learning-rate search
    sizes: Mapping[str, Fields]  # S2's four models
    moe: Fields  # S4's mixture of experts
    moe_long: Fields
    moe_short: Fields  # S4's fast sweep, 200 of its 500 steps
    fight: Fight  # repeats no document, so `everything` skips it
    fixed: Fields  # of every run, unless its condition says otherwise: new defaults of train.py must not change a suite
    lengths: Mapping[int, Fields]  # budgets of the first of `sizes`, by tokens per parameter
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # by suite and optimizer
    sweep_seeds: tuple[int, ...] = (0, 1, 2)  # of the suites on which no claim hangs
    claim_seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5)  # of those on which one hangs
    fresh_seeds: tuple[int, ...] = (6, 7, 8, 9, 10, 11)  # of those that confirm what other seeds chose
    documents_seeds: tuple[int, ...] = fresh_seeds  # of such a suite of a document
    written: Fields = field(default_factory=dict)  # what S0's and S3's conditions as written measure
    corpora: Mapping[str, documents.Corpus] = field(default_factory=dict)  # by document


def _budget(steps: int, batch_tokens: int) -> dict[str, int]:
    return {"tokens": steps * batch_tokens, "batch_tokens": batch_tokens}


_S2 = {"schedule": "cosine", "min_lr": 0.1, "warmup": 0.05, "dropout": 0.1, "weight_decay": 0.1}
_S4 = _S2 | {"momentum": 0.9, "ns_coefficients": "quintic", "spectra_every": 0}
_FIXED = {"momentum": 0.95, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.95, "schedule": "linear", "warmup": 0.05}
_FIXED |= {"min_lr": 0.1, "grad_clip": 1.0}
_NANO = {"eval_every": 16, "eval_tokens": 8192, "spectra_every": 16}

SCALES = {
    "full": Scale(
        dense={"model": "88m", **_budget(123, 16_384)},
        baseline={"model": "88m", **_budget(103_760, 16_384)},
        search={"model": "16m", **_budget(600, 8192), "schedule": "constant", "spectra_every": 0},
        sizes={
            "11m": _S2 | {"model": "11m", **_budget(1500, 65_536)},
            "29m": _S2 | {"model": "29m", **_budget(1250, 49_152)},
            "50m": _S2 | {"model": "50m", **_budget(1000, 32_768)},
            "108m": _S2 | {"model": "108m", **_budget(750, 24_576)},
        },
        moe=_S4 | {"model": "moe-79m", **_budget(125, 49_152), "precision": "fp32"},
        moe_long=_budget(500, 49_152),
        moe_short=_budget(50, 49_152),
        fixed=_FIXED | {"adamw_lr": 0.006},
        fight=Fight({"model": "88m", **_budget(123, 16_384), "spectra_every": 0}),
        lengths={ratio: _budget(171 * ratio, 65_536) for ratio in (20, 40, 80, 160)},
        rates={
            "lr-sensitivity muon": (0.001, 0.003, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05),
            "lr-sensitivity adamw": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
            "speedrun-lr muon": (0.006, 0.012, 0.024, 0.048, 0.096),
            "speedrun-lr adamw": (0.0005, 0.001, 0.002, 0.004, 0.008),
            "moe-lr-muon": (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.12, 0.15),
            "moe-lr-adam": (1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2),
        },
        documents_seeds=documents.SEEDS,
        corpora=documents.CORPORA,
    ),
    "nano": Scale(
        dense=_NANO | {"model": "nano", **_budget(128, 2048)},
        baseline=_NANO | {"model": "nano", **_budget(256, 2048), "eval_every": 32, "spectra_every": 32},
        search=_NANO | {"model": "nano", **_budget(128, 2048), "schedule": "constant", "spectra_every": 0},
        sizes={
            name: _NANO | _S2 | {"model": "nano", **_budget(128, 2048), "spectra_every": 64} | shape
            for name, shape in {
                "64 wide": {"d_model": 64, "layers": 2, "heads": 2, "kv_heads": 2, "d_ff": 256},
                "96 wide": {"d_model": 96, "layers": 3, "heads": 3, "kv_heads": 3, "d_ff": 384},
                "128 wide": {"d_model": 128, "layers": 4, "heads": 4, "kv_heads": 4, "d_ff": 512},
                "192 wide": {"d_model": 192, "layers": 4, "heads": 6, "kv_heads": 6, "d_ff": 768},
            }.items()
        },
        moe=_NANO | _S4 | {"model": "moe-nano", **_budget(128, 2048)},
        moe_long=_budget(384, 2048) | {"eval_every": 48},
        moe_short=_budget(51, 2048),
        fixed=_FIXED | {"adamw_lr": 0.02},
        fight=Fight(_NANO | {"model": "nano", **_budget(128, 2048), "spectra_every": 0}),
        lengths={ratio: _budget(176 * ratio, 2048) for ratio in (1, 2, 4, 8)},
        rates={
            "lr-sensitivity muon": (0.003, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2),
            "lr-sensitivity adamw": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
            "speedrun-lr muon": (0.01, 0.02, 0.04, 0.08, 0.16),
            "speedrun-lr adamw": (0.001, 0.002, 0.004, 0.008, 0.016),
            "moe-lr-muon": (0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.25),
            "moe-lr-adam": (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.04),
        },
        written={"spectra_every": 256},  # before the first step and after the last
    ),
}
