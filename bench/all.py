"""Measures everything with one command, the most valuable first, within the given minutes; ends with a table.

    python -m bench.all [--minutes 10] [--out DIR]

Writes DIR/bench.json and DIR/README.md after every part. A part that fails, exceeds its time or lacks a package is
named and stops nothing. Works on a CPU at small sizes; needs no network. Exit code 1 where a kernel is wrong.

A row compares ours with a peer timed in the same run: `ratio` above 1 means that ours is better, `share` is how much of
the floor (the best this device allows) was reached. `met` is null where a goal is for another device.
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from bench import machine
from bench import record_pages as pages
from bench.harness import print_table
from engine import files
from engine.cli import AT_LEAST_1, POSITIVE, BadInput, check_limits, exit_with_a_sentence, make_folder
from engine.files import ROOT

Json = dict[str, Any]
TARGET, TARGET_RATE = "NVIDIA GeForce RTX 4090", 102_000  # tokens/s of the 88m model to beat there
SPECTRA_SECONDS, SPECTRA_RATIO = 8.0, 2.0  # of an event of the 88m model on two CPU cores
BLOCKED_SHARE, EXPERTS_RATIO = 0.01, 2.0
MUON_RATIO = 0.92  # of AdamW's tokens/s: the prior work's steady state was 9 % slower
LARGE_SPECTRA_SECONDS = 90.0  # an event of it and its SVDs take about 50 s on two idle cores
COMPILED_SECONDS = 300.0  # compiling six models for a CPU takes two minutes
SCIPY = ("scipy", "threadpoolctl")
MOST_OF_SHARE = 1.5  # a part may take so many times its share of the time left: later ones are worth less
TERMINATE_SECONDS = 5.0  # between asking a part to end and killing it
LEAST_SECONDS = 5.0  # no part is started with less


@dataclass(frozen=True)
class Arguments:
    """Measure everything there is on this machine."""

    minutes: Annotated[float, POSITIVE] = 10.0
    """Limit for everything together; a GPU needs 30 to fill the table."""
    threads: Annotated[int, AT_LEAST_1] | None = None
    """CPU threads of each part (default: as many as there are idle cores)."""
    out: Path | None = None
    """Folder for bench.json, README.md and parts/ (default: runs/bench-UTC time)."""


@dataclass(frozen=True)
class Plan:
    """What a part knows when it starts."""

    cuda: bool
    seconds: float
    """Until it is ended."""
    out: Path
    """A folder of its own."""
    results: dict[str, Json] = field(default_factory=dict)
    """Of the parts before it, by name."""


@dataclass(frozen=True)
class BenchmarkPart:
    """One command of the project that writes a JSON file at its end."""

    name: str
    module: str
    share: float
    """Of the time left, against the parts after it."""
    flags: Callable[[Plan], Sequence[object]]
    rows: Callable[[Json, bool], list[Json]]
    needs: tuple[str, ...] = ()
    """Packages without which it cannot run."""

    def command(self, plan: Plan, result: Path) -> list[str]:
        return ["-m", self.module, *map(str, self.flags(plan)), "--json", str(result)]


def row(
    figure: str,
    ours: float | None,
    unit: str = "",
    peer: float | None = None,
    peer_name: str | None = None,
    floor: float | None = None,
    goal: str = "-",
    met: bool | None = None,
    more_is_better: bool = False,
) -> Json:
    """A line of the table."""

    def against(other: float | None) -> float | None:
        if not ours or not other:
            return None
        return ours / other if more_is_better else other / ours

    found = {"figure": figure, "ours": ours, "unit": unit, "peer": peer, "peer_name": peer_name}
    return found | {"ratio": against(peer), "floor": floor, "share": against(floor), "goal": goal, "met": met}


def goal_of(cuda: bool, ratio: float, least: float = 1.0) -> Json:
    """The least ratio to the peer, a goal on a GPU only."""
    return {"goal": f"≥ {least:g}x{'' if cuda else ' (GPU only)'}", "met": ratio >= least if cuda else None}


def correct_rows(found: Json, cuda: bool) -> list[Json]:
    right, cases = found["right"], len(found["cases"])
    wrong = sorted({case["kernel"] for case in found["cases"] if not case["right"]})
    what = "kernels" if cuda else "PyTorch paths"  # of the same formulas; Triton's need a GPU
    name = f"{what} right against float64" + (f", wrong: {', '.join(wrong)}" if wrong else "")
    return [row(name, right, f"of {cases}", goal="all", met=right == cases)]


def of_mode(rows: Sequence[Json], memory: str) -> list[Json]:
    """CUDA graphs where they were captured, else eager: as a training step runs them."""
    modes = {r["mode"] for r in rows}
    return [r for r in rows if r["memory"] == memory and r["mode"] == ("graph" if "graph" in modes else "eager")]


def newton_schulz_rows(found: Json, cuda: bool) -> list[Json]:
    rows = []
    comparisons = (("cold", "reference", "torch.compile", "Newton-Schulz "), ("hot", "torch.bmm", "torch.bmm", ""))
    for memory, peer, peer_name, prefix in comparisons:
        chosen = of_mode(found["rows"], memory)
        for ours in (r for r in chosen if r["candidate"] == "ours"):
            us = ours["median_us"]
            for theirs in (r["median_us"] for r in chosen if r["group"] == ours["group"] and r["candidate"] == peer):
                floor = us * ours["share"] if "share" in ours else None
                wanted = goal_of(cuda, theirs / us)
                rows.append(row(prefix + ours["group"], us, "us", theirs, peer_name, floor, **wanted))
    return rows


def step_rows(found: Json, cuda: bool) -> list[Json]:
    by_name = {r["candidate"]: r for r in found["rows"] if r["group"].endswith("whole step")}
    ours, rows = by_name["ours"], []
    for name, words in (("reference", "stacked, compiled"), ("torch.optim.Muon", "torch.optim.Muon")):
        ms, peer_ms, light_ms = (us / 1e3 for us in (ours["median_us"], by_name[name]["median_us"], ours["light_us"]))
        figure = f"Muon's step, {ours['group'].split()[0]}"
        rows.append(row(figure, ms, "ms", peer_ms, words, light_ms, **goal_of(cuda, peer_ms / ms)))
    return rows


def train_rows(found: Json, cuda: bool) -> list[Json]:
    by_name = {r["candidate"]: r for r in found["rows"]}
    size = f"{found['model']}, {found['batch_tokens']:,} tokens a step"
    rows = []
    for optimizer, words in (("muon", "Muon"), ("adamw", "AdamW")):
        ours, peer = by_name[f"ours, {optimizer}"], by_name[f"baseline, {optimizer}"]["tokens_per_second"]
        speed = ours["tokens_per_second"]
        floor = speed / ours["light_share"] if ours["light_share"] else None
        shown = row(
            f"training with {words}, {size}", speed, "tokens/s", peer, "plain PyTorch", floor, more_is_better=True
        )
        rows.append(shown | goal_of(cuda, speed / peer))
    muon = by_name["ours, muon"]["tokens_per_second"]
    others = [name for name in by_name if name.startswith(("plain GPT", "nanoGPT", "ours, muon, compiled"))]
    others += [name for name in by_name if name.startswith("baseline") and name.endswith("compiled")]
    for name in others:  # on a CPU
        peer = by_name[name]["tokens_per_second"]
        rows.append(row(f"training with Muon, {size}", muon, "tokens/s", peer, name, more_is_better=True))
    speeds = [by_name[f"ours, {optimizer}"]["tokens_per_second"] for optimizer in ("muon", "adamw")]
    shown = row("training with Muon against AdamW", speeds[0], "tokens/s", speeds[1], "AdamW", more_is_better=True)
    rows.append(shown | goal_of(cuda, speeds[0] / speeds[1], MUON_RATIO))
    here = found["device"] == TARGET and found["model"] == "88m"
    best = max(r["tokens_per_second"] for name, r in by_name.items() if name.startswith("ours, muon"))
    goal = {"goal": f"≥ {TARGET_RATE:,} (RTX 4090)", "met": best >= TARGET_RATE if here else None}
    rows.append(row(f"training with Muon, {found['model']}, best kernels", best, "tokens/s", **goal))
    around = found["surroundings"]
    blocked = around["spectra_blocked_share"]
    goal = {
        "goal": f"< {BLOCKED_SHARE:.0%}{'' if cuda else ' (GPU only)'}",
        "met": blocked < BLOCKED_SHARE if cuda else None,
    }
    rows.append(row("training held up by spectra", 100 * blocked, "%", **goal))
    if around["loader_share"] is not None:
        rows.append(row("training waiting for a batch", 100 * around["loader_share"], "%"))
    return rows


def spectra_rows(found: Json, cuda: bool) -> list[Json]:
    ours, peer = (statistics.median(found["seconds"][key]) for key in ("eigenproblems", "svd"))
    figure = f"spectra event, {found['model']}, on the CPU"
    if found["model"] != "88m":
        return [row(figure, ours, "s", peer, "SVDs", goal="88m only")]
    met = ours <= SPECTRA_SECONDS and peer / ours >= SPECTRA_RATIO
    return [row(figure, ours, "s", peer, "SVDs", goal=f"≤ {SPECTRA_SECONDS:g} s and ≥ {SPECTRA_RATIO:g}x", met=met)]


def experts_rows(found: Json, cuda: bool) -> list[Json]:
    median = found["median_us"]
    wanted = goal_of(cuda, median["loop"] / median["grouped"], EXPERTS_RATIO)
    return [row(f"experts, {found['model']}", median["grouped"], "us", median["loop"], "loop", **wanted)]


def loader_rows(found: Json, cuda: bool) -> list[Json]:
    rows = []
    for figure, key, goal, unit, more in (
        ("loader", "loader_tokens_per_second", "loader_goal", "tokens/s", True),
        ("shard builder against encode_batch", "builder_ratio", "builder_goal", "x", True),
        ("first batch", "first_batch_seconds", "first_batch_goal", "s", False),
        ("loader's own memory", "loader_anonymous_mb", "loader_anonymous_goal", "MB", False),
    ):
        value, wanted = found.get(key), found.get(goal)
        if value is None or wanted is None:
            rows.append(row(figure, None, unit, goal="not measured"))
            continue
        met = value >= wanted if more else value < wanted
        rows.append(row(figure, value, unit, goal=f"{'≥' if more else '<'} {wanted:,g} {unit}", met=met))
    return rows


def speedrun_rows(found: Json, cuda: bool) -> list[Json]:
    muon, adamw = (found["figures"]["optimizers"][optimizer] for optimizer in ("muon", "adamw"))
    losses = [entry["best_val_loss"]["mean"] for entry in (muon, adamw)]
    size = f"{found['model']}, {found['tokens']:,} tokens"
    goal = {"goal": "one seed: see the records"}
    reached = muon["tokens_to_target"]["mean"]
    return [
        row(f"speedrun, loss with Muon, {size}", losses[0], "nats", losses[1], "AdamW", **goal),
        row("speedrun, tokens to AdamW's loss", reached, "", found["tokens"], "AdamW"),
    ]


def train_flags(plan: Plan) -> list[object]:
    """Rounds for half of the time: building, checking, spectra and loader take the rest. On a CPU compiled candidates
    only where there is time to compile them."""
    compiled = [] if plan.seconds >= COMPILED_SECONDS else ["--compile", "off"]
    small = ["--model", "nano", "--rounds", 5, "--steps", 1, *compiled]
    size = ["--model", "88m"] if plan.cuda else small
    return [*size, "--seconds", f"{plan.seconds / 2:.0f}"]


def spectra_flags(plan: Plan) -> list[object]:
    """The 88M model, whose goals are for a CPU, if there is time for its SVDs."""
    large = plan.cuda or plan.seconds >= LARGE_SPECTRA_SECONDS
    return ["--model", "88m" if large else "nano", "--repeats", 1 if large else 3]


def speedrun_flags(plan: Plan) -> list[object]:
    """With the speed that the part "training" measured, if it did."""
    words: list[object] = ["--seconds", f"{0.8 * plan.seconds:.0f}", "--out", plan.out / "speedrun"]
    rows = plan.results.get("training", {}).get("rows", [])
    rates = [r["tokens_per_second"] for r in rows if r["candidate"] in ("ours, muon", "ours, adamw")]
    return [*words, "--tokens-per-second", f"{min(rates):.0f}"] if rates else words


def parts(cuda: bool) -> list[BenchmarkPart]:
    """The most valuable first. Shares are about the time of each on an idle machine."""
    groups = ["--only", "groups", "products", *([] if cuda else ["--small"])]
    step = ["--only", "step", *([] if cuda else ["--small"])]
    experts = ["--repeats", 20 if cuda else 5]
    return [
        BenchmarkPart("kernels", "bench.correct", 2, lambda plan: [], correct_rows),
        BenchmarkPart("Newton-Schulz", "bench.newton_schulz", 3, lambda plan: groups, newton_schulz_rows),
        BenchmarkPart("optimizer step", "bench.newton_schulz", 2, lambda plan: step, step_rows),
        BenchmarkPart("training", "bench.train", 5, train_flags, train_rows, needs=SCIPY),
        BenchmarkPart("spectra", "bench.spectra", 3, spectra_flags, spectra_rows, needs=SCIPY),
        BenchmarkPart("experts", "bench.experts", 1, lambda plan: experts, experts_rows),
        BenchmarkPart("loader", "bench.data", 3, lambda plan: [], loader_rows, needs=("tokenizers", "psutil")),
        BenchmarkPart("speedrun", "bench.speedrun", 6, speedrun_flags, speedrun_rows, needs=(*SCIPY, "matplotlib")),
    ]


def rows_of(part: BenchmarkPart, done: Json, cuda: bool) -> list[Json]:
    """The table's rows of a part; one that gives the reason where there are no figures."""
    if done["result"] is None:
        return [row(part.name, None, goal=done["state"])]
    try:
        return part.rows(done["result"], cuda)
    except (KeyError, TypeError, IndexError, ValueError, ZeroDivisionError) as error:
        done["state"] = f"failed: its figures are not as expected ({type(error).__name__}: {error})"
        return [row(part.name, None, goal=done["state"])]


def free_threads(described: dict[str, Any]) -> int:
    """The number of idle cores: threads that wait for each other on a shared core take ten times as long."""
    return max(1, described["cores"] - round(described["busy_cores"] or 0))


def measure(part: BenchmarkPart, plan: Plan, number: int, environment: dict[str, str]) -> Json:
    """Run one part; its state, and its JSON where it wrote one."""
    stem = plan.out / f"{number:02}-{part.name.replace(' ', '-')}"
    done: Json = {"name": part.name, "state": "", "seconds": 0.0, "command": None, "result": None}
    missing = [package for package in part.needs if find_spec(package) is None]
    if find_spec(part.module) is None:
        return done | {"state": f"skipped: {part.module} is missing"}
    if missing:
        return done | {"state": f"skipped: needs {', '.join(missing)}"}
    if plan.seconds < LEAST_SECONDS:
        return done | {"state": f"not started: {plan.seconds:.0f} s left"}
    result, began = stem.with_suffix(".json"), time.monotonic()
    words = part.command(plan, result)
    done["command"] = " ".join(["python", *words])
    with stem.with_suffix(".txt").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
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
    return json.loads(json.dumps(done).replace(f"{ROOT}/", ""))  # no path of this machine


def end(process: subprocess.Popen[bytes]) -> None:
    """End a part and the processes it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(TERMINATE_SECONDS)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def last_line(path: Path, code: int) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else f"exit code {code}"


def write(out: Path, bench: Json) -> None:
    files.write_json(out / pages.BENCH, bench)
    text = pages.bench_page(pages.as_written(bench))
    files.write_whole(out / "README.md", lambda file: file.write(text.encode()))


@exit_with_a_sentence
def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    check_limits(a)
    deadline = time.monotonic() + 60 * a.minutes
    out = a.out or Path("runs") / time.strftime("bench-%Y%m%dT%H%M%SZ", time.gmtime())
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / pages.BENCH).exists())):
        raise BadInput(f"--out {out}: holds files that are not of a benchmark; choose another folder")
    folder = (out / "parts").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder, exist_ok=True)
    cuda = torch.cuda.is_available()
    described = machine.describe()
    threads = free_threads(described) if a.threads is None else a.threads
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    words = f"python -m bench.all --minutes {a.minutes:g}" + (f" --threads {a.threads}" if a.threads else "")
    words += f" --out {a.out}" if a.out else ""
    bench: Json = {"command": words, "minutes": a.minutes, "small_sizes": not cuda}
    bench |= {"machine": described, "threads": threads, "parts": [], "rows": []}
    print(f"{machine.label(described)}, threads: {threads}, torch {torch.__version__}, {a.minutes:g} minutes, {out}")
    if not cuda:
        print("on a CPU: small sizes; goals for a GPU are not judged")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    todo, results, stopped = parts(cuda), {}, False
    for number, part in enumerate(todo, start=1):
        left = deadline - time.monotonic()
        fair = left * part.share / sum(other.share for other in todo[number - 1 :])
        seconds = 0.0 if stopped else min(left, MOST_OF_SHARE * fair)
        done = measure(part, Plan(cuda, seconds, folder, results), number, environment)
        stopped = stopped or done["state"] == "stopped"
        if done["result"] is not None:
            results[part.name] = done["result"]
        bench["rows"] += rows_of(part, done, cuda)
        bench["parts"].append(done)
        write(out, bench)
        print(f"{part.name}: {done['state']}, {done['seconds']:.0f} s", flush=True)
    print()
    print_table([dict(zip(pages.BENCH_HEADER, pages.bench_cells(row), strict=True)) for row in bench["rows"]])
    print(f"\n{out / pages.BENCH}, {out / 'README.md'}; output of each part: {out / 'parts'}")
    return int(stopped or bench["rows"][0]["met"] is False or bench["parts"][0]["result"] is None)  # kernels come first


if __name__ == "__main__":
    sys.exit(main())
