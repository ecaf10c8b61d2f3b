"""Shows a run while it trains, in TensorBoard, Weights & Biases or both: the lines of its files as scalars.

    live = LiveView(("wandb",), folder, config, last_step, say); live.write(line); live.close(summary, figures)

Both packages are optional (`--log`). A view that fails ends with one line, and the training continues.
"""

import contextlib
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine import files
from engine.cli import first_line

Say = Callable[[str], None]
SPECTRA_SHOWN = ("spectral_norm", "effective_rank", "stable_rank", "spectral_entropy", "left_alignment", "update_norm")
FINISH_SECONDS = 300.0  # for what is not sent yet at the end of a run
PROJECT = "muon-speedrun"  # in Weights & Biases, unless WANDB_PROJECT names another


class View(Protocol):
    """One place where scalars are shown; any method may raise anything."""

    def write(self, scalars: dict[str, float], step: int) -> None: ...

    def close(self, summary: dict[str, Any], figures: Sequence[Path]) -> None: ...


class LiveView:
    """Scalars named kind/key and spectra/key/projection, against steps, for every view that --log names. The loop and
    the spectra's worker both write."""

    def __init__(self, names: Sequence[str], folder: Path, config: dict[str, Any], last_step: int, say: Say) -> None:
        self.say, self.turn = say, threading.Lock()
        self.views: dict[str, View] = {}
        for name in names:
            with self._guarded(name):
                self.views[name] = VIEWS[name](folder, config, last_step, say)

    def write(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl: its numbers."""
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
        scalars = {f"{record['kind']}/{key}": numbers[key] for key in numbers if key not in ("step", "tokens", "layer")}
        self._scalars(scalars, record["step"])

    def write_spectra(self, lines: Sequence[dict[str, Any]]) -> None:
        """The lines of one spectra event: means over the layers, and experts, of each projection."""
        scalars = {}
        for key in SPECTRA_SHOWN:
            for name in dict.fromkeys(line["proj"] for line in lines):
                values = [line[key] for line in lines if line["proj"] == name and line[key] is not None]
                if values:
                    scalars[f"spectra/{key}/{name}"] = float(np.mean(values))
        self._scalars(scalars, lines[0]["step"])

    def close(self, summary: dict[str, Any], figures: Sequence[Path]) -> None:
        """Show the summary and the figures of a run that is over, and end."""
        self._each(lambda view: view.close(summary, figures))
        self.views.clear()

    def _scalars(self, scalars: dict[str, float], step: int) -> None:
        if scalars:
            self._each(lambda view: view.write(scalars, step))

    def _each(self, act: Callable[[View], None]) -> None:
        with self.turn:
            for name, view in tuple(self.views.items()):
                with self._guarded(name):
                    act(view)

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as failure:  # a live view is no reason to lose a run
            self.views.pop(name, None)
            self.say(f"--log {name} ends here: {type(failure).__name__}: {first_line(failure)}")


class TensorBoard:
    """Event files in the run's folder; a resumed run replaces what comes after `last_step`."""

    def __init__(self, folder: Path, config: dict[str, Any], last_step: int, say: Say) -> None:
        from torch.utils.tensorboard import SummaryWriter  # an optional package

        self.writer = SummaryWriter(str(folder), purge_step=last_step + 1)

    def write(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def close(self, summary: dict[str, Any], figures: Sequence[Path]) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases with its files in runs/<name>/wandb/; a resumed run continues it by the id in the run's
    folder. Sends the lines, config.json, summary.json and figures, no code and no environment.

    Spectra arrive later than the steps after them, where its own count of steps must rise; so every row carries ours.
    """

    def __init__(self, folder: Path, config: dict[str, Any], last_step: int, say: Say) -> None:
        import wandb  # an optional package

        kept = folder / files.WANDB_ID
        if not kept.exists():
            files.write_whole(kept, lambda file: file.write(f"{secrets.token_hex(4)}\n"), mode="w")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=folder.name,
            id=kept.read_text(encoding="utf-8").strip(),
            resume="allow",
            config=config,
            dir=folder,
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                x_save_requirements=False,
                x_disable_meta=True,  # command line, paths, hardware
                x_disable_stats=True,
                finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=True,
            ),
        )
        self.run.define_metric("*", step_metric="step")
        self.image = wandb.Image
        sent = f"offline; to send it: wandb sync {Path(self.run.dir).parent}" if self.run.offline else self.run.url
        say(f"wandb: {sent}")

    def write(self, scalars: dict[str, float], step: int) -> None:
        self.run.log({"step": step, **scalars})

    def close(self, summary: dict[str, Any], figures: Sequence[Path]) -> None:
        self.run.summary.update({key: value for key, value in summary.items() if value is not None})
        if figures:
            self.run.log({f"plots/{figure.stem}": self.image(str(figure)) for figure in figures})
        self.run.finish(exit_code=0 if summary.get("status") in ("finished", "stopped") else 1)


VIEWS: dict[str, Callable[[Path, dict[str, Any], int, Say], View]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
