"""One run: settings -> data -> model -> optimizer -> loop -> runs/<name>/.

    python train.py --model nano --optimizer muon
    torchrun --standalone --nproc_per_node=1 train.py --model 88m --optimizer muon

The clock (train_seconds) runs over updates and their spectra; compilation, warm-up, validation and checkpoints are off.
"""

import math
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

import runfiles
from cli import BadInput, exit_with_a_sentence, make_folder
from data import Loader, Shards, TokenStream, validation_batches
from metrics import JsonlWriter, SpectraRecorder, cut_jsonl, finite
from model import ModelConfig, Transformer
from optim import build_optimizers, lr_factor, set_lr
from settings import NOT_IN_HASH, Rank, Settings, resolve

WARMUP_UPDATES = 2  # untimed; the second runs with optimizer state in place
COMPILE_CACHE = Path(__file__).resolve().parent / ".cache" / "inductor"

# Dense bf16 peak in FLOP/s with fp32 accumulation, without sparsity (vendor data sheets), by the device's name.
PEAK_BF16_FLOPS = {
    "NVIDIA GeForce RTX 3090": 71.2e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


class TrainingFailed(RuntimeError):
    """The run cannot go on; the message is the reason that summary.json records."""


class Stopwatch:
    """Adds up the seconds between start and stop; the device's queue is drained at both ends.

    Used as a context it does the reverse: what happens inside is off the clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.total, self.started = device, 0.0, None

    def start(self) -> None:
        self._drain()
        self.started = time.perf_counter()

    def stop(self) -> None:
        self._drain()
        self.total, self.started = self.seconds(), None

    def __enter__(self) -> None:
        self.stop()

    def __exit__(self, *error: object) -> None:
        self.start()

    def seconds(self) -> float:
        return self.total + (time.perf_counter() - self.started if self.started is not None else 0.0)

    def _drain(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Output:
    """What rank 0 says: to the terminal, around the progress bar if there is one, and to log.txt."""

    def __init__(self, speaks: bool) -> None:
        self.speaks, self.log, self.bar = speaks, None, None

    def say(self, line: str, terminal: bool = True) -> None:
        if not self.speaks:
            return
        if terminal and self.bar is not None:
            self.bar.write(line)
        elif terminal:
            print(line, flush=True)
        if self.log is not None:
            self.log.write(line + "\n")
            self.log.flush()

    def start_bar(self, done: int, total: int) -> None:
        if self.speaks and sys.stderr.isatty():
            self.bar = tqdm(initial=done, total=total, unit="update")

    def line(self, values: dict[str, Any], terminal: bool = True) -> None:
        """A line of `key:value` pairs."""
        self.say(" ".join(f"{key}:{value}" for key, value in values.items() if value is not None), terminal)


class Run:
    """The state of one training run, and its loop."""

    def __init__(self, s: Settings, config: ModelConfig, shards: Shards, rank: Rank) -> None:
        self.s, self.rank, self.shards = s, rank, shards
        self.folder = s.runs_dir / s.name
        self.out = Output(speaks=rank.index == 0)
        self.device = torch.device(s.device, rank.local) if s.device == "cuda" else torch.device("cpu")
        self.updates = math.ceil(s.tokens / s.batch_tokens)
        torch.manual_seed(s.seed)
        self.model = Transformer(config, shards.vocab_size)  # on the CPU first: the same weights on every device
        self.model.to(self.device).compute_dtype = torch.bfloat16 if s.precision == "bf16" else torch.float32
        self.forward = torch.compile(self.model, dynamic=False) if s.compile == "on" else self.model
        muon = ("momentum", "nesterov", "ns_steps", "ns_coefficients", "ns_method", "lr_scale")
        self.optimizers = build_optimizers(
            self.model,
            s.optimizer,
            lr=s.lr,
            adamw_lr=s.adamw_lr,
            weight_decay=s.weight_decay,
            betas=(s.beta1, s.beta2),
            adam_eps=s.adam_eps,
            **{key: getattr(s, key) for key in muon},
        )
        self.loader = Loader(
            TokenStream(shards, "train"),
            s.batch_tokens // s.seq_len,
            s.seq_len,
            s.seed,
            rank=rank.index,
            world_size=rank.count,
            pin_memory=s.device == "cuda",
            say=self.out.say,
        )
        self.val_stream = TokenStream(shards, "val")
        self.step, self.watch = 0, Stopwatch(self.device)
        self.signalled = self.stop_asked = False  # a signal reached this rank; all ranks agreed to stop
        self.began, self.earlier_wall_seconds = time.perf_counter(), 0.0
        self.metrics = self.spectra = self.loaded = None  # opened with the folder, the first two by rank 0 only
        self.config = self.describe()
        self.last_val: dict[str, float | None] = {"val_loss": None, "val_accuracy": None}
        self.best_val_loss, self.last_train_loss = math.inf, None
        peak = PEAK_BF16_FLOPS.get(self.device_name())
        self.flops_share = self.model.flops_per_token(s.seq_len) / (peak * rank.count) if peak else None

    def train(self) -> str:
        """Run from the current step to the end or to a signal; returns the summary's status."""
        s = self.s
        self.warm_up()
        if self.loaded is not None:
            self.load(self.loaded)
            self.out.say(f"{self.folder}: resuming at step {self.step} of {self.updates}")
        self.out.start_bar(self.step, self.updates)
        self.watch.start()
        if self.loaded is None:
            self.spectra_event()
            with self.watch:
                self.validate()
        while self.step < self.updates and not self.stop_asked:
            event = s.spectra_every and self.is_event(self.step + 1, s.spectra_every)
            before = self.watch.seconds()
            stats = self.update(event)
            self.step += 1
            if event:
                self.spectra_event()
            self.log_step(stats, self.watch.seconds() - before)
            if self.is_event(self.step, s.eval_every):
                with self.watch:
                    self.validate()
            if self.step % s.checkpoint_every == 0 and self.step < self.updates:
                with self.watch:
                    self.checkpoint()
        self.watch.stop()
        self.checkpoint()
        return "finished" if self.step == self.updates else "stopped"

    def is_event(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.updates

    def update(self, keep_for_spectra: bool) -> dict[str, float]:
        """One optimizer step on one global batch; raises TrainingFailed before it touches a weight."""
        s = self.s
        factor = lr_factor(self.step, self.updates, s.schedule, s.warmup, s.min_lr)
        set_lr(self.optimizers, factor)
        if s.dropout:  # masks depend on (seed, step, rank) alone, so a resumed run draws the same ones
            torch.manual_seed(int(np.random.SeedSequence([s.seed, self.step, self.rank.index]).generate_state(1)[0]))
        loss = self.forward_backward(next(self.loader))
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        train_loss, norm = torch.stack((loss, grad_norm)).tolist()
        if not (math.isfinite(train_loss) and math.isfinite(norm)):
            bad = [name for name, p in self.model.named_parameters() if not p.grad.isfinite().all()]
            raise TrainingFailed(
                f"step {self.step + 1}: loss {train_loss}, gradient norm {norm}"
                + (f"; not finite in {', '.join(bad)}" if bad else "")
            )
        if keep_for_spectra and self.spectra is not None:
            self.spectra.before_update()
        if s.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), s.grad_clip, grad_norm)
        self.optimizer_step()
        return {
            "train_loss": train_loss,
            "grad_norm": norm,
            "lr": s.lr * factor,
            "adamw_lr": s.adamw_lr * factor,
        }

    def forward_backward(self, batch: Tensor) -> Tensor:
        """Gradients of the mean loss over the global batch, accumulated over micro-batches and summed over ranks.

        Returns that loss. A stop asked of any rank becomes known to all.
        """
        micro_batches = batch.to(self.device, non_blocking=True).long().split(self.s.micro_batch)
        total = torch.zeros((), device=self.device)
        for rows in micro_batches:
            loss = self.forward(rows[:, :-1], rows[:, 1:]) / (len(micro_batches) * self.rank.count)
            loss.backward()
            total += loss.detach()
        if self.rank.count > 1:
            shared = torch.stack((total, total.new_tensor(float(self.signalled))))
            for tensor in (shared, *(p.grad for p in self.model.parameters())):
                dist.all_reduce(tensor)
            total, self.stop_asked = shared[0], bool(shared[1])
        else:
            self.stop_asked = self.signalled
        return total

    def ask_to_stop(self, signal_number: int, frame: object) -> None:
        """Finish the step, then stop; a second signal stops at once."""
        self.signalled = True
        signal.signal(signal_number, signal.SIG_DFL)

    def optimizer_step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def warm_up(self) -> None:
        """Untimed updates on random tokens, so that compilation and first launches are off the clock; all undone.

        Runs before a checkpoint is loaded: there is no optimizer state yet to keep.
        """
        weights = [p.detach().clone() for p in self.model.parameters()]
        cpu_rng, cuda_rng = torch.get_rng_state(), torch.cuda.get_rng_state_all()
        set_lr(self.optimizers, 1e-3)
        for _ in range(WARMUP_UPDATES):
            self.forward_backward(torch.randint(self.shards.vocab_size, (self.s.micro_batch, self.s.seq_len + 1)))
            self.optimizer_step()
        with torch.no_grad():
            for p, weight in zip(self.model.parameters(), weights, strict=True):
                p.copy_(weight)
        for optimizer in self.optimizers:
            optimizer.state.clear()
        torch.set_rng_state(cpu_rng)
        torch.cuda.set_rng_state_all(cuda_rng)

    def spectra_event(self) -> None:
        if self.spectra is not None and self.s.spectra_every:
            self.spectra.record(self.step, self.step * self.s.batch_tokens)

    @torch.no_grad()
    def validate(self) -> None:
        """Mean loss and next-token accuracy over the first --eval-tokens validation tokens, shared out over ranks."""
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, correct, tokens
        batches = validation_batches(self.val_stream, self.s.eval_tokens, self.s.seq_len, self.s.micro_batch)
        for i, batch in enumerate(batches):
            if i % self.rank.count != self.rank.index:
                continue
            rows = torch.from_numpy(batch).to(self.device).long()
            targets = rows[:, 1:].flatten()
            logits = self.model(rows[:, :-1]).flatten(0, 1).float()
            sums[0] += F.cross_entropy(logits, targets, reduction="sum")
            sums[1] += (logits.argmax(dim=-1) == targets).sum()
            sums[2] += len(targets)
        if self.rank.count > 1:
            dist.all_reduce(sums)
        self.model.train()
        loss, accuracy = (sums[:2] / sums[2]).tolist()
        self.last_val = {"val_loss": finite(loss), "val_accuracy": accuracy}
        if loss < self.best_val_loss:
            self.best_val_loss = loss
            if self.step and self.rank.index == 0:
                best = {"model": self.model.state_dict(), "step": self.step, "config": self.config} | self.last_val
                runfiles.save_checkpoint(self.folder, best, runfiles.BEST)
        self.write({"kind": "val", **self.progress(), **self.last_val, "train_seconds": finite(self.watch.total)})
        self.out.line(
            {
                "step": f"{self.step}/{self.updates}",
                "val_loss": f"{loss:.4f}",
                "val_accuracy": f"{accuracy:.4f}",
                "train_seconds": f"{self.watch.total:.1f}",
            }
        )

    def log_step(self, stats: dict[str, float], seconds: float) -> None:
        self.last_train_loss = stats["train_loss"]
        tokens_per_second = self.s.batch_tokens / seconds
        mfu = None if self.flops_share is None else tokens_per_second * self.flops_share
        speed = {"step_ms": finite(1e3 * seconds), "tokens_per_second": finite(tokens_per_second), "mfu": mfu}
        self.write({"kind": "train", **self.progress(), **{k: finite(v) for k, v in stats.items()}, **speed})
        if self.out.bar is not None:
            self.out.bar.update()
            self.out.bar.set_postfix_str(f"loss {stats['train_loss']:.4f}, {tokens_per_second:,.0f} tok/s")
        if self.is_event(self.step, self.s.log_every):
            self.out.line(  # on a terminal the bar shows them
                {
                    "step": f"{self.step}/{self.updates}",
                    "train_loss": f"{stats['train_loss']:.4f}",
                    "grad_norm": f"{stats['grad_norm']:.3f}",
                    "lr": f"{stats['lr']:.5f}",
                    "step_ms": f"{1e3 * seconds:.1f}",
                    "tok/s": f"{tokens_per_second:.0f}",
                    "mfu": None if mfu is None else f"{mfu:.3f}",
                },
                terminal=self.out.bar is None,
            )

    def progress(self) -> dict[str, int]:
        return {"step": self.step, "tokens": self.step * self.s.batch_tokens}

    def write(self, record: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(record)

    def open_folder(self) -> bool:
        """Create the run's folder, or load its last checkpoint; False if the run is finished already."""
        if self.folder.exists():
            if not self.s.resume:
                raise BadInput(f"--name {self.s.name}: {self.folder} exists; choose another name, or add --resume")
            if any(self.folder.iterdir()) and not (self.folder / runfiles.CONFIG).exists():
                raise BadInput(f"--name {self.s.name}: {self.folder} is no run's folder; choose another name")
            self.loaded = runfiles.load_checkpoint(self.folder, self.out.say, set_aside=self.rank.index == 0)
        if self.s.resume and self.loaded is None:
            self.out.say(f"{self.folder}: no checkpoint to resume from, starting at the beginning")
        if self.loaded is not None:
            self.check_same_run(self.loaded["config"])
            if self.loaded["step"] >= self.updates:
                self.out.say(f"{self.folder}: finished already, at step {self.loaded['step']}; nothing to do")
                return False
            self.step = self.loaded["step"]
        if self.rank.count > 1:
            dist.barrier()  # every rank has looked before rank 0 creates
        if self.rank.index == 0:
            make_folder(self.folder, exist_ok=self.s.resume)
            (self.folder / runfiles.SUMMARY).unlink(missing_ok=True)  # of the part before
            last_step = -1 if self.loaded is None else self.step
            for name in (runfiles.METRICS, runfiles.SPECTRA):
                cut_jsonl(self.folder / name, last_step)
            runfiles.write_json(self.folder / runfiles.CONFIG, self.config)
            self.out.log = (self.folder / runfiles.LOG).open("a", encoding="utf-8")
            self.metrics = JsonlWriter(self.folder / runfiles.METRICS)
            self.spectra = SpectraRecorder(self.model, self.folder / runfiles.SPECTRA)
        return True

    def describe(self) -> dict[str, Any]:
        """config.json: every resolved setting under its flag's name, and where the run comes from."""
        flags = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self.s).items()}
        identity = flags | {"data_fingerprint": self.shards.fingerprint, "vocab_size": self.shards.vocab_size}
        return {
            **identity,
            "steps": self.updates,
            "params": self.model.parameter_count(),
            "matmul_params": self.model.matmul_parameter_count(),
            "flops_per_token": self.model.flops_per_token(self.s.seq_len),
            "world_size": self.rank.count,
            "device_name": self.device_name(),
            "config_hash": runfiles.config_hash(identity, NOT_IN_HASH),
            **runfiles.provenance(),
        }

    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def check_same_run(self, old: dict[str, Any]) -> None:
        if old["config_hash"] != self.config["config_hash"]:
            keys = [*vars(self.s), "data_fingerprint", "vocab_size"]
            changed = [key for key in keys if key not in NOT_IN_HASH and old.get(key) != self.config[key]]
            said = ", ".join(f"{key} was {old.get(key)}, is {self.config[key]}" for key in changed)
            raise BadInput(f"--resume {self.s.name}: its settings differ ({said}); repeat them or choose another name")

    def checkpoint(self) -> None:
        """Write everything that the rest of the run depends on, from rank 0."""
        if self.rank.index != 0:
            return
        cuda_rng = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        contents = {
            "model": self.model.state_dict(),
            "optimizer": [optimizer.state_dict() for optimizer in self.optimizers],
            **self.progress(),
            "loader": self.loader.state_dict(),
            "rng": {"torch": torch.get_rng_state(), "cuda": cuda_rng},
            "config": self.config,
            "clock": {"train_seconds": self.watch.total, "wall_seconds": self.wall_seconds()},
            "losses": {"best_val_loss": self.best_val_loss, "train_loss": self.last_train_loss, **self.last_val},
        }
        runfiles.save_checkpoint(self.folder, contents)

    def load(self, contents: dict[str, Any]) -> None:
        """Take up a checkpoint, after which the run goes on as if it had never stopped."""
        self.model.load_state_dict(contents["model"])
        for optimizer, state in zip(self.optimizers, contents["optimizer"], strict=True):
            optimizer.load_state_dict(state)
        self.step = contents["step"]
        self.loader.load_state_dict(contents["loader"])
        self.watch.total = contents["clock"]["train_seconds"]
        self.earlier_wall_seconds = contents["clock"]["wall_seconds"]
        losses = contents["losses"]
        self.best_val_loss, self.last_train_loss = losses["best_val_loss"], losses["train_loss"]
        self.last_val = {key: losses[key] for key in self.last_val}
        torch.set_rng_state(contents["rng"]["torch"])
        if self.device.type == "cuda" and contents["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(contents["rng"]["cuda"], self.device)

    def wall_seconds(self) -> float:
        return self.earlier_wall_seconds + time.perf_counter() - self.began

    def summarize(self, status: str, reason: str | None) -> None:
        """summary.json, whatever way the run ended."""
        if self.rank.index != 0:
            return
        tokens, seconds = self.step * self.s.batch_tokens, self.watch.seconds()
        speed = tokens / seconds if tokens and seconds else None
        if self.device.type == "cuda":
            peak_memory_bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        summary = {
            "status": status,
            "reason": reason,
            "final_train_loss": self.last_train_loss,
            "final_val_loss": self.last_val["val_loss"],
            "best_val_loss": finite(self.best_val_loss),
            "final_val_accuracy": self.last_val["val_accuracy"],
            "tokens": tokens,
            "steps": self.step,
            "train_seconds": seconds,
            "wall_seconds": self.wall_seconds(),
            "tokens_per_second": speed,
            "mfu": speed * self.flops_share if speed and self.flops_share else None,
            "peak_memory_bytes": peak_memory_bytes,
            **{key: self.config[key] for key in ("params", "data_fingerprint", "config_hash")},
        }
        runfiles.write_json(self.folder / runfiles.SUMMARY, summary)


def join_ranks(device: str) -> Rank:
    """This process's place among those torchrun started; a process of its own otherwise."""
    env = os.environ
    rank = Rank(int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0)))
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        if rank.local >= torch.cuda.device_count():
            raise BadInput(f"--nproc_per_node: more ranks than the {torch.cuda.device_count()} GPUs of this machine")
        torch.cuda.set_device(rank.local)
    if rank.count > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return rank


@exit_with_a_sentence
def main() -> int:
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(COMPILE_CACHE))
    torch.set_float32_matmul_precision("high")
    given = tyro.cli(Settings, description=__doc__)
    rank = join_ranks(given.device)
    try:
        return run_training(Run(*resolve(given, rank), rank))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_training(run: Run) -> int:
    """The run from opening its folder to its summary; returns the exit code."""
    if not run.open_folder():
        return 0
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, run.ask_to_stop)
    try:
        status = run.train()
    except TrainingFailed as failure:
        run.summarize("failed", str(failure))
        run.out.say(f"failed: {failure}")
        return 1
    except BaseException as error:
        run.summarize("failed", f"{type(error).__name__}: {error}")
        raise
    finally:
        run.loader.close()
    run.summarize(status, None if status == "finished" else f"signal after step {run.step}")
    if status == "finished" and run.rank.index == 0:
        draw_plots(run.folder)
    which = "final" if status == "finished" else "last"  # a stopped run does not validate again
    run.out.say(f"{run.folder}: {status} after {run.step} updates, {which} validation loss {run.last_val['val_loss']}")
    return 0


def draw_plots(folder: Path) -> None:
    """runs/<name>/plots/*.png, where Matplotlib is installed: a training box may do without."""
    try:
        from report import draw
        from stats import load_run
    except ModuleNotFoundError as missing:
        print(f"no plots: {missing.name} is not installed; python report.py draws them elsewhere")
        return
    draw([load_run(folder)], folder / "plots")


if __name__ == "__main__":
    sys.exit(main())
