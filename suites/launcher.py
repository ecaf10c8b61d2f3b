"""Runs of a suite as processes: which are done, which wait, and as many side by side as there are GPUs or cores.

    run_here(jobs, free_slots(None)); jobs[0].state()

One process per run, each `train.py --resume`, so that an interrupted run goes on where it was. The process inherits a
lock: where a launcher was killed and its runs live on, the next one waits for them and starts no second writer.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine import files
from engine.cli import BadInput

MOST_DEATHS = 3  # of a run's process without a word, after which it is not started again
BAD_INPUT = 2  # the exit code that no second try mends
OVER = ("finished", "failed")
DEATH = "-- ended without a summary, exit code "
POLL_SECONDS = 0.5
TRAIN = files.ROOT / "train.py"


@dataclass(frozen=True)
class Job:
    """One run of train.py; `flags` are its settings but for folder and name."""

    name: str
    flags: tuple[str, ...]
    updates: int
    tokens: int
    runs_dir: Path

    @property
    def folder(self) -> Path:
        return self.runs_dir / self.name

    @property
    def log(self) -> Path:
        """What the process says, and, in a line of its own, each time it died without a word."""
        return self.runs_dir / "logs" / f"{self.name}.txt"

    @property
    def lock(self) -> Path:
        return self.runs_dir / "logs" / f"{self.name}.lock"

    def command(self) -> list[str]:
        where = ("--runs-dir", str(self.runs_dir), "--name", self.name)
        return [sys.executable, str(TRAIN), *self.flags, *where, "--resume", "--no-plots"]

    def summary(self) -> dict[str, Any]:
        path = self.folder / files.SUMMARY
        return files.load_json(path) if path.exists() else {}

    def state(self) -> str:
        """finished, failed (and not to be tried again unasked), started (to be resumed) or waiting."""
        status = self.summary().get("status")
        if status in OVER:
            return status
        codes = self.deaths()
        if len(codes) >= MOST_DEATHS or BAD_INPUT in codes:
            return "failed"
        return "started" if self.folder.exists() else "waiting"

    def reason(self) -> str:
        """Why a failed run failed."""
        if reason := self.summary().get("reason"):
            return reason
        if BAD_INPUT in self.deaths():
            said = [line for line in self._said() if line.startswith("error: ")]
            return said[-1].removeprefix("error: ") if said else f"bad input; {self.log} has what it said"
        return f"its process died {len(self.deaths())} times without a word; {self.log} has what it said"

    def deaths(self) -> list[int]:
        """Exit codes of the processes that ended without a summary."""
        return [int(line.removeprefix(DEATH)) for line in self._said() if line.startswith(DEATH)]

    def _said(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines() if self.log.exists() else []

    def updates_done(self) -> int:
        """As far as metrics.jsonl tells; reads only its end."""
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
        """Let a failed run be tried again."""
        (self.folder / files.SUMMARY).unlink(missing_ok=True)
        self.log.unlink(missing_ok=True)


@contextlib.contextmanager
def _held(path: Path) -> Iterator[int | None]:
    """The file descriptor of a lock on `path`, None where another process holds it. A child that inherits it goes on
    holding it after this process has let go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def start(job: Job, environment: dict[str, str]) -> subprocess.Popen[bytes] | None:
    """The run's process, or None where another process is at this run already."""
    with _held(job.lock) as lock:
        if lock is None:
            return None
        with job.log.open("ab") as said:
            return subprocess.Popen(
                job.command(),
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                pass_fds=(lock,),
                start_new_session=True,  # Ctrl-C reaches the launcher alone, which asks each run to stop
            )


def is_held(job: Job) -> bool:
    """Whether some process is at this run."""
    if not job.lock.exists():
        return False
    with job.lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def note_death(job: Job, code: int) -> None:
    """Count an end that says nothing: no verdict in the summary, and nobody sent it a signal to stop."""
    status = job.summary().get("status")
    well = status in OVER or code in (-signal.SIGTERM, -signal.SIGINT) or (code == 0 and status == "stopped")
    if not well:
        with job.log.open("a") as said:
            said.write(f"{DEATH}{code}\n")


def free_slots(jobs: int | None) -> list[dict[str, str]]:
    """An environment for each run that can train at once: one per free GPU; without a GPU one per core, each with one
    thread. At most `jobs` of them, where given."""
    gpus = _free_gpus()
    if gpus is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        slots = [{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}] * cores
    elif not gpus:
        raise BadInput("every GPU has more than a tenth of its memory taken; wait, or choose by CUDA_VISIBLE_DEVICES")
    else:
        slots = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]
    if jobs is None:
        return slots
    if jobs < 1:
        raise BadInput(f"--jobs {jobs}: must be at least 1")
    return [slots[i % len(slots)] for i in range(jobs)]


def _free_gpus() -> list[str] | None:
    """The GPUs with at most a tenth of their memory taken, or those that CUDA_VISIBLE_DEVICES names; None without one.
    Asks nvidia-smi, which creates no context on them."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") is None or allowed == "":
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
    """Somebody asked the launcher to stop; every run has stopped and can go on later."""


@dataclass(frozen=True)
class Later:
    """What a suite has to train after these jobs, as far as it is known: for the time left."""

    runs: int = 0
    tokens: int = 0


def run_here(jobs: Sequence[Job], slots: Sequence[dict[str, str]], later: Later = Later()) -> None:
    """Train every job that is not over, in order, as many at once as there are slots; Interrupted after Ctrl-C or
    SIGTERM, once each has written its checkpoint."""
    waiting = [job for job in jobs if job.state() not in OVER]
    running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}  # by slot
    asked: list[int] = []  # signals to stop; the second kills
    told: set[tuple[int, bool]] = set()  # processes that have been sent one

    def ask(signal_number: int, frame: object) -> None:
        asked.append(signal_number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    progress = Progress(jobs, later)
    try:
        while (waiting and not asked) or running:
            for slot, (job, process) in list(running.items()):
                kill = len(asked) > 1
                if asked and (process.pid, kill) not in told:
                    told.add((process.pid, kill))
                    process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
                code = process.poll()
                if code is not None:
                    del running[slot]
                    if not kill:
                        note_death(job, code)
                    if job.state() not in OVER and not asked:
                        waiting.insert(0, job)
                    progress.ended(job)
            elsewhere = []
            for slot in range(len(slots)):
                while slot not in running and waiting and not asked:
                    job = waiting.pop(0)
                    if job.state() in OVER:
                        progress.ended(job)  # by a process that outlived an earlier launcher
                        continue
                    process = start(job, slots[slot])
                    if process is None:
                        elsewhere.append(job)
                        continue
                    running[slot] = job, process
            waiting += elsewhere
            progress.show(len(running))
            time.sleep(POLL_SECONDS)
    finally:
        progress.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        raise Interrupted


class Progress:
    """How far all the suites are, in training tokens, with the time left; without a terminal a line per run."""

    def __init__(self, jobs: Sequence[Job], later: Later) -> None:
        self.jobs, self.later = {job.name: job for job in jobs}, later
        self.over = {job.name for job in jobs if job.state() in OVER}
        tokens = sum(job.tokens for job in jobs) + later.tokens
        self.began, self.already = time.monotonic(), self._tokens()
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=tokens, initial=self.already, unit="tok", unit_scale=True, dynamic_ncols=True)

    def _tokens(self) -> int:
        done = (1.0 if name in self.over else job.updates_done() / job.updates for name, job in self.jobs.items())
        return round(sum(share * job.tokens for share, job in zip(done, self.jobs.values(), strict=True)))

    def ended(self, job: Job) -> None:
        state = job.state()
        if state in OVER:
            self.over.add(job.name)
        loss = job.summary().get("final_val_loss")
        words = f"validation loss {loss:.4f}" if state == "finished" and loss is not None else ""
        words = job.reason() if state == "failed" else words
        more = f", then {self.later.runs} more" if self.later.runs else ""
        line = f"[{len(self.over)}/{len(self.jobs)}{more}] {job.name}: {state}{', ' * bool(words)}{words}{self._left()}"
        if self.bar is not None:
            self.bar.write(line)
        else:
            print(line, flush=True)

    def _left(self) -> str:
        if self.bar is not None:
            return ""
        total, done = sum(job.tokens for job in self.jobs.values()) + self.later.tokens, self._tokens()
        if done <= self.already or done >= total:
            return ""
        minutes = (time.monotonic() - self.began) * (total - done) / (done - self.already) / 60
        return f"; about {minutes:.0f} minutes left"

    def show(self, running: int) -> None:
        if self.bar is not None:
            self.bar.n = self._tokens()
            self.bar.set_postfix_str(f"{len(self.over)} of {len(self.jobs)} runs over, {running} at work")

    def close(self) -> None:
        if self.bar is not None:
            self.show(0)
            self.bar.close()


def train_once(job: Job) -> int:
    """What a scheduler's job does: train one run to its end, after any other process that is at it; its exit code."""
    while job.state() not in OVER:
        process = start(job, {})
        if process is not None:
            code = process.wait()
            note_death(job, code)
            return code
        time.sleep(POLL_SECONDS)
    return 0


def submit(jobs: Sequence[Job], cluster: str, partition: str | None, hours: float, later: Later = Later()) -> None:
    """Every job that is not over as one job of an existing scheduler, through submitit; waits for all of them."""
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
    except RuntimeError as refusal:  # no such scheduler on this machine
        raise BadInput(f"--submit {cluster}: {refusal}") from None
    slurm = {"slurm_partition": partition} if partition else {}
    executor.update_parameters(timeout_min=round(60 * hours), gpus_per_node=1 if cluster == "slurm" else 0, **slurm)
    with executor.batch():
        submitted = [executor.submit(train_once, job) for job in waiting]
    print(f"{len(submitted)} jobs on {cluster}: {submitted[0].job_id} and on; logs in {executor.folder}", flush=True)
    progress, left = Progress(jobs, later), dict(zip(submitted, waiting, strict=True))
    try:
        while left:
            for task in [task for task in left if task.done()]:
                progress.ended(left.pop(task))
            progress.show(len(left))
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        print("the jobs go on without this command; run it again to follow them", file=sys.stderr)
        raise Interrupted from None
    finally:
        progress.close()
