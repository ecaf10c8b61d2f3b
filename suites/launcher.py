"""Train the runs of a suite as processes: one at a time on each free GPU, or on each core without a GPU.

    run_here(jobs, free_slots(None)); jobs[0].state()

A run is one process, `train.py --resume`, so an interrupted run continues where it was; without a GPU a fork of one
that has imported PyTorch. It inherits a lock: if a launcher was killed and its runs are still alive, the next launcher
waits for them instead of starting them twice.
"""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine import files
from engine.cli import BadInput
from engine.cores import own_cores
from suites.forked import Fork, Forks

MOST_DEATHS = 3  # exits of a run without a summary, after which it is not started again
BAD_INPUT = 2  # the exit code that a second try cannot change
OVER = ("finished", "failed")
DEATH = "-- ended without a summary, exit code "
POLL_SECONDS = 0.5
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # the environment of a run without a GPU
TRAIN = files.ROOT / "train.py"
NOT_FINITE = re.compile(r"step \d+: loss ")  # begins the reason of a run that diverged (train.py)


def diverged(summary: Mapping[str, Any]) -> bool:
    """Whether a run ended at a loss or gradient that is not finite; other failures say nothing about its settings."""
    return summary.get("status") == "failed" and bool(NOT_FINITE.match(summary.get("reason") or ""))


@dataclass(frozen=True)
class Job:
    """One run of train.py; `flags` are its settings except folder and name."""

    name: str
    flags: tuple[str, ...]
    steps: int
    tokens: int
    runs_dir: Path
    seconds: float = math.nan  # on one idle core, as far as that is known
    weight_bytes: int = 0  # of best.pt

    @property
    def folder(self) -> Path:
        return self.runs_dir / self.name

    @property
    def log(self) -> Path:
        """The output of the process, and a line for each exit without a summary."""
        return self.runs_dir / "logs" / f"{self.name}.txt"

    @property
    def lock(self) -> Path:
        return self.runs_dir / "logs" / f"{self.name}.lock"

    def arguments(self) -> list[str]:
        return [*self.flags, "--runs-dir", str(self.runs_dir), "--name", self.name, "--resume", "--no-plots"]

    def command(self) -> list[str]:
        return [sys.executable, str(TRAIN), *self.arguments()]

    def summary(self) -> dict[str, Any]:
        path = self.folder / files.SUMMARY
        return files.load_json(path) if path.exists() else {}

    def state(self) -> str:
        """finished, failed (not tried again without --retry), started (to be resumed) or waiting."""
        status = self.summary().get("status")
        if status in OVER:
            return status
        codes = self.deaths()
        if len(codes) >= MOST_DEATHS or BAD_INPUT in codes:
            return "failed"
        return "started" if self.folder.exists() else "waiting"

    @property
    def diverged(self) -> bool:
        return diverged(self.summary())

    def reason(self) -> str:
        """Why a failed run failed."""
        if reason := self.summary().get("reason"):
            return reason
        if BAD_INPUT in self.deaths():
            errors = [line for line in self._log_lines() if line.startswith("error: ")]
            return errors[-1].removeprefix("error: ") if errors else f"bad input; see {self.log}"
        return f"the process exited {len(self.deaths())} times without a summary; see {self.log}"

    def drop_checkpoint(self) -> None:
        """Delete the checkpoint of a finished run that has best.pt: nothing continues from it any more."""
        if self.state() == "finished" and (self.folder / files.BEST).exists():
            for name in (files.CHECKPOINT, files.PREVIOUS_CHECKPOINT):
                (self.folder / name).unlink(missing_ok=True)

    def deaths(self) -> list[int]:
        """Exit codes of the run's processes that ended without a summary."""
        return [int(line.removeprefix(DEATH)) for line in self._log_lines() if line.startswith(DEATH)]

    def _log_lines(self) -> list[str]:
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []

    def steps_done(self) -> int:
        """The last step in metrics.jsonl; reads only the end of the file."""
        path = self.folder / files.METRICS
        if not path.exists():
            return 0
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").splitlines()
        for line in reversed(lines):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return int(json.loads(line)["step"])
        return 0

    def forget(self) -> None:
        """Delete the verdict of a failed run, so that it is tried again."""
        (self.folder / files.SUMMARY).unlink(missing_ok=True)
        self.log.unlink(missing_ok=True)


@contextlib.contextmanager
def _held(path: Path) -> Iterator[int | None]:
    """The file descriptor of a lock on `path`, None if another process holds it. A child process that inherits the
    descriptor keeps the lock after this process has closed it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        yield descriptor if files.lock(descriptor, path) else None
    finally:
        os.close(descriptor)


def start(job: Job, environment: dict[str, str], forks: Forks | None = None) -> subprocess.Popen[bytes] | Fork | None:
    """Start the run's process, a fork where there are `forks`; None if another process trains this run already, a
    launcher's or one started by hand."""
    with _held(job.lock) as lock:
        if lock is None or _trains_by_itself(job):
            return None
        with job.log.open("ab") as log:
            if forks is not None:
                return forks.start(job.arguments(), log.fileno(), lock)
            return subprocess.Popen(
                job.command(),
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(lock,),
                start_new_session=True,  # Ctrl-C reaches the launcher only, which then stops each run
            )


def _trains_by_itself(job: Job) -> bool:
    """Whether a process that no launcher started trains this run: it has locked log.txt (engine/run_folder.py)."""
    log = job.folder / files.LOG
    if not log.exists():
        return False
    with _held(log) as lock:
        return lock is None


def is_held(job: Job) -> bool:
    """Whether some process trains this run."""
    if job.lock.exists():
        with _held(job.lock) as lock:
            if lock is None:
                return True
    return _trains_by_itself(job)


def note_death(job: Job, code: int) -> None:
    """Count an exit without a verdict in the summary, unless a signal stopped the run."""
    status = job.summary().get("status")
    expected = status in OVER or code in (-signal.SIGTERM, -signal.SIGINT) or (code == 0 and status == "stopped")
    if not expected:
        with job.log.open("a", encoding="utf-8") as log:
            log.write(f"{DEATH}{code}\n")


def free_slots(jobs: int | None) -> list[dict[str, str]]:
    """The environment of each run that can train at the same time: one per free GPU; without a GPU one per core, each
    with one thread. `jobs` overrides their number."""
    gpus = _free_gpus()
    if gpus is None:
        slots = [ONE_THREAD] * len(own_cores())
    elif not gpus:
        raise BadInput("every GPU has more than a tenth of its memory in use; wait, or set CUDA_VISIBLE_DEVICES")
    else:
        slots = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]
    return slots if jobs is None else [slots[i % len(slots)] for i in range(jobs)]


def _free_gpus() -> list[str] | None:
    """The GPUs with at most a tenth of their memory in use, or those that CUDA_VISIBLE_DEVICES names; None if there are
    none. Runs nvidia-smi, which creates no CUDA context."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") is None or allowed in ("", "-1"):
        return None
    if allowed is not None:
        return [name.strip() for name in allowed.split(",")]
    query = ("nvidia-smi", "--query-gpu=uuid,memory.used,memory.total", "--format=csv,noheader,nounits")
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    if answer.returncode:
        return None
    free = []
    for line in answer.stdout.splitlines():
        uuid, used, total = (cell.strip() for cell in line.split(","))
        if float(used) <= 0.1 * float(total):
            free.append(uuid)
    return free


class Interrupted(Exception):
    """A signal stopped the launcher; every run has stopped and can be resumed."""


@dataclass(frozen=True)
class LaterStages:
    """Runs and tokens of the stages after this one, as far as they are known: for the estimate of the time left."""

    runs: int = 0
    tokens: int = 0
    seconds: float = 0.0  # on one idle core


def run_here(
    jobs: Sequence[Job],
    slots: Sequence[dict[str, str]],
    later: LaterStages = LaterStages(),
    keep_checkpoints: bool = True,
) -> None:
    """Train every job that is not over, in order, one per slot at a time; Interrupted after Ctrl-C or SIGTERM, when
    each run has written its checkpoint. A second signal kills the runs. Without `keep_checkpoints` finished runs keep
    best.pt alone."""
    waiting = [job for job in jobs if job.state() not in OVER]
    running: dict[int, tuple[Job, subprocess.Popen[bytes] | Fork]] = {}  # by slot
    sent: set[tuple[int, signal.Signals]] = set()  # (process id, signal) passed on to the runs
    with contextlib.ExitStack() as stack:
        stops = stack.enter_context(_received(signal.SIGINT, signal.SIGTERM))
        progress = stack.enter_context(contextlib.closing(SuiteProgress(jobs, later)))
        forks = None
        if waiting and ONE_THREAD in slots:
            forks = stack.enter_context(contextlib.closing(Forks(TRAIN, ONE_THREAD)))

        def ended(job: Job) -> None:
            if not keep_checkpoints:
                job.drop_checkpoint()
            progress.ended(job)

        if not keep_checkpoints:
            for job in jobs:  # some finished under an earlier launcher
                job.drop_checkpoint()
        while (waiting and not stops) or running:
            stop = signal.SIGKILL if len(stops) > 1 else signal.SIGTERM
            for slot, (job, process) in list(running.items()):
                if stops and (process.pid, stop) not in sent:
                    sent.add((process.pid, stop))
                    process.send_signal(stop)
                code = process.poll()
                if code is None:
                    continue
                del running[slot]
                if stop != signal.SIGKILL:
                    note_death(job, code)
                if job.state() not in OVER and not stops:
                    waiting.insert(0, job)
                ended(job)
            elsewhere = []  # runs that another process trains: look again later
            for slot in range(len(slots)):
                while slot not in running and waiting and not stops:
                    job = waiting.pop(0)
                    if job.state() in OVER:
                        ended(job)  # finished by a process that outlived an earlier launcher
                    elif (process := start(job, slots[slot], forks)) is None:
                        elsewhere.append(job)
                    else:
                        running[slot] = job, process
            waiting += elsewhere
            progress.show(len(running))
            time.sleep(POLL_SECONDS)
    if stops:
        raise Interrupted


@contextlib.contextmanager
def _received(*signals: signal.Signals) -> Iterator[list[int]]:
    """A list of these signals as they come, which do nothing else meanwhile."""
    received: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in signals}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class SuiteProgress:
    """A progress bar over the training tokens of all stages; without a terminal a line per run with the time left."""

    def __init__(self, jobs: Sequence[Job], later: LaterStages) -> None:
        self.jobs, self.later = {job.name: job for job in jobs}, later
        self.over = {job.name for job in jobs if job.state() in OVER}
        self.total = sum(job.tokens for job in self.jobs.values()) + later.tokens
        self.began, self.done_before = time.monotonic(), self._tokens_done()
        self.bar = None
        if sys.stderr.isatty():
            options = {"unit": "tok", "unit_scale": True, "dynamic_ncols": True}
            self.bar = tqdm(total=self.total, initial=self.done_before, **options)

    def _tokens_done(self) -> int:
        jobs = self.jobs.values()
        return round(sum(j.tokens * (1.0 if j.name in self.over else j.steps_done() / j.steps) for j in jobs))

    def ended(self, job: Job) -> None:
        """Report a run whose process has ended."""
        state, detail = job.state(), ""
        if state in OVER:
            self.over.add(job.name)
        loss = job.summary().get("final_val_loss")
        if state == "failed":
            detail = f", {job.reason()}"
        elif state == "finished" and loss is not None:
            detail = f", validation loss {loss:.4f}"
        more = f", then {self.later.runs} more" if self.later.runs else ""
        line = f"[{len(self.over)}/{len(self.jobs)}{more}] {job.name}: {state}{detail}"
        if self.bar is not None:
            self.bar.write(line)
        else:
            print(line + self._time_left(), flush=True)

    def _time_left(self) -> str:
        done = self._tokens_done()
        if done <= self.done_before or done >= self.total:
            return ""
        seconds_per_token = (time.monotonic() - self.began) / (done - self.done_before)
        return f"; about {seconds_per_token * (self.total - done) / 60:.0f} minutes left"

    def show(self, running: int) -> None:
        if self.bar is not None:
            self.bar.n = self._tokens_done()
            self.bar.set_postfix_str(f"{len(self.over)} of {len(self.jobs)} runs over, {running} running")

    def close(self) -> None:
        if self.bar is not None:
            self.show(0)
            self.bar.close()


def train_once(job: Job, keep_checkpoints: bool) -> int:
    """The job of a scheduler: train one run to its end, once no other process trains it; returns the exit code."""
    while job.state() not in OVER:
        process = start(job, {})
        if process is not None:
            code = process.wait()
            note_death(job, code)
            if not keep_checkpoints:
                job.drop_checkpoint()
            return code
        time.sleep(POLL_SECONDS)
    return 0


def submit(
    jobs: Sequence[Job],
    cluster: str,
    partition: str | None,
    hours: float,
    later: LaterStages = LaterStages(),
    keep_checkpoints: bool = True,
) -> None:
    """Hand every job that is not over to an existing scheduler, through submitit, and wait for all of them."""
    try:
        import submitit
    except ModuleNotFoundError:
        raise BadInput("--submit needs the package submitit: pip install submitit") from None
    waiting = [job for job in jobs if job.state() not in OVER]
    if not waiting:
        return
    here = str(TRAIN.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    try:
        executor = submitit.AutoExecutor(folder=waiting[0].runs_dir / "logs" / cluster, cluster=cluster)
    except RuntimeError as refusal:  # the machine has no such scheduler
        raise BadInput(f"--submit {cluster}: {refusal}") from None
    slurm = {"slurm_partition": partition} if partition else {}
    executor.update_parameters(timeout_min=round(60 * hours), gpus_per_node=1 if cluster == "slurm" else 0, **slurm)
    with executor.batch():
        submitted = [executor.submit(train_once, job, keep_checkpoints) for job in waiting]
    print(
        f"{len(submitted)} jobs on {cluster}, the first is {submitted[0].job_id}; logs in {executor.folder}", flush=True
    )
    progress, left = SuiteProgress(jobs, later), dict(zip(submitted, waiting, strict=True))
    try:
        while left:
            for task in [task for task in left if task.done()]:
                progress.ended(left.pop(task))
            progress.show(len(left))
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        print("the jobs continue without this command; run it again to follow them", file=sys.stderr)
        raise Interrupted from None
    finally:
        progress.close()
