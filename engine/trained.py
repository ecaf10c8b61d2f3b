"""Opens a trained run for reading: its settings and the weights of its best or last checkpoint.

    trained = open_trained(Path("runs/name"), "best"); trained.config["seq_len"]; trained.weights["embedding"]

Checksums are verified and no code in a file is run. settings.py makes the model of it (`trained_model`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from engine.checkpoint import check_parts, read_checkpoint
from engine.cli import BadInput
from engine.files import BEST, CHECKPOINT, TOKENIZER
from engine.identity import ADDED_LATER

Which = Literal["best", "last"]
FILES: dict[Which, str] = {"best": BEST, "last": CHECKPOINT}
PARTS = {"model": dict, "step": int, "config": dict}  # that both kinds of checkpoint have


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a run in memory: `config` as in config.json, settings that older versions lack filled in;
    `weights` by their name in the model, fp32 on the CPU, block matrices in banks (model.py)."""

    folder: Path
    path: Path
    step: int
    config: dict[str, Any]
    weights: dict[str, Tensor]

    @property
    def data(self) -> Path:
        """The folder of the shards that it was trained on, as the run named it; it may have moved."""
        return Path(self.config["data"])

    @property
    def tokenizer(self) -> Path:
        """Its tokenizer.json: an imported run's own, else that of its shards, if they are still there."""
        own = self.folder / TOKENIZER
        return own if own.exists() else self.data / TOKENIZER


def open_trained(folder: Path, which: Which = "best") -> Trained:
    """Read a run's best.pt or checkpoint.pt; BadInput if there is none, if it is damaged or cannot be read."""
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such run folder")
    path = folder / FILES[which]
    if not path.exists():
        other = next((name for name, file in FILES.items() if (folder / file).exists()), None)
        advice = f"use --checkpoint {other}" if other else "only a trained run has checkpoints"
        raise BadInput(f"{folder}: has no {path.name}; {advice}")
    contents = read_checkpoint(path, _check)
    return Trained(folder, path, contents["step"], ADDED_LATER | contents["config"], contents["model"])


def _check(contents: Any) -> None:
    """ValueError unless a checkpoint has what a reader needs."""
    check_parts(contents, PARTS)
    weights, config = contents["model"], contents["config"]
    if not all(isinstance(name, str) and isinstance(weight, Tensor) for name, weight in weights.items()):
        raise ValueError("its model is not named tensors")
    if not isinstance(weights.get("embedding"), Tensor) or any(
        weight.dtype != torch.float32 for weight in weights.values()
    ):
        raise ValueError("its weights are not those of a run")
    if not isinstance(config.get("data"), str) or type(config.get("vocab_size")) is not int:
        raise ValueError("its config is not that of a run")
