"""A live view in TensorBoard beside the JSONL files, for those who have it: train.py --log tensorboard.

    writer = TensorBoard(folder); writer.write(record); tensorboard --logdir runs

The records are those of metrics.jsonl; of the spectra it shows each projection's mean over layers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SPECTRA_SHOWN = ("spectral_norm", "effective_rank", "stable_rank", "spectral_entropy", "left_alignment", "update_norm")


class TensorBoard:
    """Scalars named kind/key and spectra/key/projection, against updates; a resumed run continues after `last_step`."""

    def __init__(self, folder: Path, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # where it is used: few have the package

        self.writer = SummaryWriter(str(folder), purge_step=last_step + 1)

    def write(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if isinstance(value, int | float) and key not in ("step", "tokens", "layer"):
                self.writer.add_scalar(f"{record['kind']}/{key}", value, record["step"])

    def write_spectra(self, lines: Sequence[dict[str, Any]]) -> None:
        for name in dict.fromkeys(line["proj"] for line in lines):
            for key in SPECTRA_SHOWN:
                values = [line[key] for line in lines if line["proj"] == name and line[key] is not None]
                if values:
                    self.writer.add_scalar(f"spectra/{key}/{name}", np.mean(values), lines[0]["step"])

    def close(self) -> None:
        self.writer.close()
