"""Writes run folders without training: every number in them is known."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

PROJECTION_SHAPES = {"q": (8, 8), "k": (4, 8), "v": (4, 8), "o": (8, 8), "up": (16, 8), "down": (8, 16)}
GATE = {"gate": (16, 8)}  # of swiglu alone


def effective_rank(singular_values) -> float:
    """Independent of metrics.py: exp of the entropy of s / sum s."""
    p = np.asarray(singular_values, dtype=float)
    p = p[p > 0] / p.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def spectral_line(step: int, layer: int, proj: str, s, alignment: float | None, **more) -> dict:
    s = np.asarray(s, dtype=float)
    q = s**2 / (s**2).sum()
    entropy = -(q[q > 0] * np.log(q[q > 0])).sum()
    line = {"step": step, "tokens": 64 * step, "layer": layer, "proj": proj, "singular_values": s.tolist()}
    line |= {"spectral_norm": float(s[0]), "spectral_entropy": float(entropy / math.log(len(s)))}
    line |= {"entropy": math.log(effective_rank(s)), "effective_rank": effective_rank(s)}
    line |= {"stable_rank": float((s**2).sum() / s[0] ** 2), "weight_norm": float(np.linalg.norm(s))}
    line |= {"left_alignment": alignment, "right_alignment": alignment}
    line |= {"left_alignment_chance": 0.6, "right_alignment_chance": 0.6, "orthogonality_error": 0.5}
    of_step = {"grad_norm": 0.1, "update_norm": 0.2, "update_effective_rank": 7.0}
    return line | (of_step if step else dict.fromkeys(of_step)) | more


def momentum_of(r: int, layer: int, step: int) -> dict:
    s = 2.0 ** -np.arange(r)
    values = {"momentum_stable_rank": float((s**2).sum()), "momentum_effective_rank": effective_rank(s)}
    values |= {"momentum_below_range": float(np.mean(s / np.linalg.norm(s) < 0.05)), "momentum_range": 0.05}
    values["momentum_singular_values"] = ((1 + layer) * s).tolist()
    return values if step else dict.fromkeys(values)


def write_run(
    folder: Path,
    *,
    final: float = 3.0,
    steps: int = 10,
    done: int | None = None,
    status: str | None = "finished",
    reason: str | None = None,
    spectra: bool = True,
    layers: int = 3,
    step_ms: float = 2000.0,
    gap: bool = False,
    by_token: bool = False,
    momentum: bool = False,
    decay: float = 0.02,
    experts: int = 0,
    projections: Iterable[str] = tuple(PROJECTION_SHAPES),
    **settings,
) -> Path:
    """A run whose loss falls linearly from 5 to `final` over `steps`; `done` of them; spectra every 5.

    Singular values are (1, .., 1) x (1 + 0.1 step) but for the smaller half, which shrinks by `decay` a step. With
    `by_token` the loss of decile d = 0 .. 9 is the run's times 0.55 + 0.1 d, a token has 4 bytes, and the unigram loss
    is 4.5. With `momentum` its singular values are 1, 1/2, 1/4, .. (times 1, 2, 3, .. by layer), its range 0.05,
    and Muon's Newton-Schulz leaves 0.1, 0.2, .. by layer.
    """
    done = steps if done is None else done
    folder.mkdir(parents=True)
    flags = {"model": "nano", "optimizer": "muon", "tokens": 64 * steps, "batch_tokens": 64, "seq_len": 32, "seed": 0}
    flags |= {"lr": 0.02, "adamw_lr": 0.005, "nesterov": True, "schedule": "linear", "eval_tokens": 512}
    derived = {"data_fingerprint": "f00d", "vocab_size": 320, "steps": steps, "params": 1000, "device_name": "cpu"}
    derived |= {"unigram_val_loss": 4.5, "bytes_per_token": 4.0} if by_token else {}
    derived |= {"world_size": 1, "git_commit": "c0ffee", "torch_version": "2.13.0"}
    extra = {key: settings.pop(key) for key in list(settings) if key in derived}
    config = flags | settings | derived | extra
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    seconds = step_ms / 1e3
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(done + 1):
            loss = 5 + (final - 5) * step / steps
            val = {"kind": "val", "step": step, "tokens": 64 * step, "val_loss": loss, "val_accuracy": 0.01 * step}
            if by_token:
                val["val_bpb"] = loss / 4 / math.log(2)
                val["val_loss_by_decile"] = [loss * (0.55 + 0.1 * decile) for decile in range(10)]
            file.write(json.dumps(val | {"train_seconds": seconds * step}) + "\n")
            if step < done:
                train = {"kind": "train", "step": step + 1, "tokens": 64 * (step + 1), "train_loss": loss}
                train |= {"grad_norm": 1.0, "lr": 0.02 * (1 - step / steps), "adamw_lr": 0.005, "step_ms": step_ms}
                file.write(json.dumps(train | {"tokens_per_second": 64 / seconds, "mfu": None}) + "\n")
            for layer in range(layers if experts else 0):
                shares = [1.0 + (expert == layer) for expert in range(experts)]
                file.write(json.dumps({"kind": "experts", "step": step, "layer": layer, "utilization": shares}) + "\n")
    if spectra:
        rng = np.random.default_rng(flags["seed"])
        with (folder / "manifold_stats.jsonl").open("w", encoding="utf-8") as file:
            for step in sorted({*range(0, done + 1, 5), done}):
                for layer in range(layers):
                    for proj in projections:
                        r = min((PROJECTION_SHAPES | GATE)[proj])
                        s = (1 + 0.1 * step) * np.where(np.arange(r) < r // 2, 1.0, max(0.0, 1 - decay * step))
                        more = {"update_gap": None if step == 0 else 0.01} if gap else {}
                        more |= momentum_of(r, layer, step) if momentum else {}
                        if momentum and step and config["optimizer"] == "muon":
                            more["ns_residual"] = 0.1 * (1 + layer)
                        aligned = None if step == 0 else float(rng.uniform(0.4, 0.9))
                        file.write(json.dumps(spectral_line(step, layer, proj, s, aligned, **more)) + "\n")
    if status:
        summary = {"status": status, "reason": reason, "train_seconds": seconds * done, "peak_memory_bytes": 2**30}
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder
