"""Everything that is measured, by one command: the most valuable first, cut to fit the minutes, a table at the end.

    python -m bench.all [--minutes 10] [--out DIR]

Writes DIR/bench.json and DIR/README.md after every part. A part that fails, is cut or lacks a package is named and
stops nothing. Works on a CPU at small sizes; needs no network. Exit code 1 where a kernel is wrong.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import tyro

from bench import machine
from bench import record_pages as pages
from bench.parts import Part, Plan, parts, rows_of
from engine import files
from engine.cli import BadInput, exit_with_a_sentence, make_folder
from engine.files import ROOT

GENEROUS = 1.5  # times its share of what is left that a part may take: the later ones are worth less
END_SECONDS = 5.0  # between asking a part to end and ending it
LEAST_SECONDS = 5.0  # no part is started with less


@dataclass(frozen=True)
class Arguments:
    """Measure everything there is on this machine."""

    minutes: float = 10.0
    """What all of it may take; a GPU that is to fill the table wants 30."""
    threads: int | None = None
    """CPU threads of each part (default: as many as there are cores without other work)."""
    out: Path | None = None
    """Folder for bench.json, README.md and parts/ (default: runs/bench-UTC time)."""


def free_threads(described: dict[str, Any]) -> int:
    """Cores that nobody else uses: threads that wait for one another on a shared core take ten times as long."""
    return max(1, described["cores"] - round(described["busy_cores"] or 0))


def measure(part: Part, plan: Plan, number: int, environment: dict[str, str]) -> dict[str, Any]:
    """Run one part; how it went, and its JSON where it wrote one."""
    stem = plan.out / f"{number:02}-{part.name.replace(' ', '-')}"
    done: dict[str, Any] = {"name": part.name, "state": "", "seconds": 0.0, "command": None, "result": None}
    missing = [package for package in part.needs if find_spec(package) is None]
    if find_spec(part.module) is None:
        return done | {"state": f"skipped: {part.module} is not here"}
    if missing:
        return done | {"state": f"skipped: needs {', '.join(missing)}"}
    if plan.seconds < LEAST_SECONDS:
        return done | {"state": f"not started: {plan.seconds:.0f} s left"}
    result, began = stem.with_suffix(".json"), time.monotonic()
    words = part.command(plan, result)
    done["command"] = " ".join(["python", *words])
    with stem.with_suffix(".txt").open("wb") as said:
        streams = {"stdout": said, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=environment, start_new_session=True, **streams
        )
        try:
            code = process.wait(plan.seconds)
            done["state"] = "done" if code == 0 else f"failed: {last_line(stem.with_suffix('.txt'), code)}"
        except subprocess.TimeoutExpired:
            end(process)
            done["state"] = f"cut after {plan.seconds:.0f} s"
        except KeyboardInterrupt:
            end(process)
            done["state"] = "stopped"
    done["seconds"] = time.monotonic() - began
    if result.exists():
        try:
            done["result"] = files.load_json(result)
        except BadInput as fault:
            done["state"] = f"failed: {fault}"
    elif done["state"] == "done":
        done["state"] = "failed: it wrote no figures"
    return json.loads(json.dumps(done).replace(f"{ROOT}/", ""))  # where this copy lies is nobody's business


def end(process: subprocess.Popen[bytes]) -> None:
    """End a part and what it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(END_SECONDS)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def last_line(path: Path, code: int) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else f"exit code {code}"


def write(out: Path, bench: dict[str, Any]) -> None:
    files.write_json(out / pages.BENCH, bench)
    text = pages.bench_page(pages.as_written(bench))
    files.write_whole(out / "README.md", lambda file: file.write(text.encode()))


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table, aligned for a terminal."""
    cells = [list(pages.BENCH_HEADER), *map(pages.bench_cells, rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@exit_with_a_sentence
def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    if not 0 < a.minutes < float("inf"):
        raise BadInput(f"--minutes {a.minutes}: must be a positive number")
    if a.threads is not None and a.threads < 1:
        raise BadInput(f"--threads {a.threads}: must be at least 1")
    deadline = time.monotonic() + 60 * a.minutes
    out = a.out or Path("runs") / time.strftime("bench-%Y%m%dT%H%M%SZ", time.gmtime())
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / pages.BENCH).exists())):
        raise BadInput(f"--out {out}: holds something that is no benchmark; choose another folder")
    folder = (out / "parts").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder, exist_ok=True)
    cuda = torch.cuda.is_available()
    described = machine.describe()
    threads = free_threads(described) if a.threads is None else a.threads
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    words = f"python -m bench.all --minutes {a.minutes:g}" + (f" --threads {a.threads}" if a.threads else "")
    words += f" --out {a.out}" if a.out else ""
    bench: dict[str, Any] = {"command": words, "minutes": a.minutes, "small_sizes": not cuda}
    bench |= {"machine": described, "threads": threads, "parts": [], "rows": []}
    print(f"{machine.label(described)}, threads: {threads}, torch {torch.__version__}, {a.minutes:g} minutes, {out}")
    if not cuda:
        print("a CPU: small sizes, and goals of a GPU are not judged")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    todo, results, stopped = parts(cuda), {}, False
    for number, part in enumerate(todo, start=1):
        left = deadline - time.monotonic()
        fair = left * part.share / sum(other.share for other in todo[number - 1 :])
        seconds = 0.0 if stopped else min(left, GENEROUS * fair)
        done = measure(part, Plan(cuda, seconds, folder, results), number, environment)
        stopped = stopped or done["state"] == "stopped"
        if done["result"] is not None:
            results[part.name] = done["result"]
        bench["rows"] += rows_of(part, done, cuda)
        bench["parts"].append(done)
        write(out, bench)
        print(f"{part.name}: {done['state']}, {done['seconds']:.0f} s", flush=True)
    print()
    show(bench["rows"])
    print(f"\n{out / pages.BENCH}, {out / 'README.md'}; what each part said: {out / 'parts'}")
    return int(stopped or bench["rows"][0]["met"] is False or bench["parts"][0]["result"] is None)  # kernels come first


if __name__ == "__main__":
    sys.exit(main())
