"""The parts of bench.all: which command measures what, and which of its figures stand in the table, against which goal.

    for part in parts(cuda): part.command(plan); part.rows(json.loads(file.read_text()), cuda)

A row compares ours with a peer timed beside it; `ratio` above 1 says that ours is better, `share` is how much of the
floor (what this device allows at best) was reached. `met` is null where a goal is for another device.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]
TARGET, TARGET_RATE = "NVIDIA GeForce RTX 4090", 102_000  # tokens/s of the 88m model to beat there
SPECTRA_SECONDS, SPECTRA_RATIO = 8.0, 2.0  # of an event of the 88m model on two CPU cores
BLOCKED_SHARE, EXPERTS_RATIO = 0.01, 2.0
MUON_RATIO = 0.92  # of AdamW's tokens/s: the prior work's steady state was 9 % slower
LARGE_SPECTRA_SECONDS = 90.0  # an event of it and its SVDs take about 50 s on two idle cores
SCIPY = ("scipy", "threadpoolctl")


@dataclass(frozen=True)
class Plan:
    """What a part may know when it starts."""

    cuda: bool
    seconds: float
    """Until it is ended."""
    out: Path
    """A folder of its own."""
    results: dict[str, Json] = field(default_factory=dict)
    """Of the parts before it, by name."""


@dataclass(frozen=True)
class Part:
    """One command of the project with a JSON file at its end."""

    name: str
    module: str
    share: float
    """Of the time that is left, against the parts after it."""
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
    """A ratio to the peer that is asked for on a GPU."""
    return {"goal": f"≥ {least:g}x{'' if cuda else ' (GPU only)'}", "met": ratio >= least if cuda else None}


def correct_rows(found: Json, cuda: bool) -> list[Json]:
    right, cases = found["right"], len(found["cases"])
    wrong = sorted({case["kernel"] for case in found["cases"] if not case["right"]})
    what = "kernels" if cuda else "PyTorch paths"  # of the same formulas; Triton's need a GPU
    name = f"{what} right against float64" + (f", wrong: {', '.join(wrong)}" if wrong else "")
    return [row(name, right, f"of {cases}", goal="all", met=right == cases)]


def of_mode(rows: Sequence[Json], memory: str) -> list[Json]:
    """As graphs where they were captured, else eager: as a training step runs them."""
    modes = {r["mode"] for r in rows}
    return [r for r in rows if r["memory"] == memory and r["mode"] == ("graph" if "graph" in modes else "eager")]


def newton_schulz_rows(found: Json, cuda: bool) -> list[Json]:
    rows = []
    for memory, peer, words in (("cold", "reference", "Newton-Schulz"), ("hot", "torch.bmm", "")):
        chosen = of_mode(found["rows"], memory)
        for r in chosen:
            rivals = [o for o in chosen if o["group"] == r["group"] and o["candidate"] == peer]
            if r["candidate"] != "ours" or not rivals:
                continue
            floor = r["median_us"] * r["share"] if "share" in r else None
            wanted = goal_of(cuda, rivals[0]["median_us"] / r["median_us"])
            name = {"reference": "torch.compile", "torch.bmm": "torch.bmm"}[peer]
            rows.append(
                row(
                    f"{words} {r['group']}".strip(), r["median_us"], "us", rivals[0]["median_us"], name, floor, **wanted
                )
            )
    return rows


def step_rows(found: Json, cuda: bool) -> list[Json]:
    by_name = {r["candidate"]: r for r in found["rows"] if r["group"].endswith("whole step")}
    ours, rows = by_name["ours"], []
    for name, words in (("reference", "stacked, compiled"), ("torch.optim.Muon", "torch.optim.Muon")):
        peer = by_name[name]["median_us"] / 1e3
        wanted = goal_of(cuda, peer / (ours["median_us"] / 1e3))
        figure = f"Muon's step, {ours['group'].split()[0]}"
        rows.append(row(figure, ours["median_us"] / 1e3, "ms", peer, words, ours["light_us"] / 1e3, **wanted))
    return rows


def train_rows(found: Json, cuda: bool) -> list[Json]:
    by_name = {r["candidate"]: r for r in found["rows"]}
    size = f"{found['model']}, {found['batch_tokens']:,} tokens an update"
    rows = []
    for optimizer, words in (("muon", "Muon"), ("adamw", "AdamW")):
        ours, peer = by_name[f"ours, {optimizer}"], by_name[f"baseline, {optimizer}"]["tokens_per_second"]
        speed = ours["tokens_per_second"]
        floor = speed / ours["light_share"] if ours["light_share"] else None
        shown = row(
            f"training with {words}, {size}", speed, "tokens/s", peer, "plain PyTorch", floor, more_is_better=True
        )
        rows.append(shown | goal_of(cuda, speed / peer))
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
    """Rounds until half of the time is over: building, checking and what a run adds to a step take the rest."""
    small = ["--model", "nano", "--batch-tokens", 2048, "--rounds", 5, "--steps", 1, "--no-kernels"]
    size = ["--model", "88m"] if plan.cuda else small
    return [*size, "--seconds", f"{plan.seconds / 2:.0f}"]


def spectra_flags(plan: Plan) -> list[object]:
    """The 88M model, whose goals are for a CPU, where there is time for its SVDs."""
    large = plan.cuda or plan.seconds >= LARGE_SPECTRA_SECONDS
    return ["--model", "88m" if large else "nano", "--repeats", 1 if large else 3]


def speedrun_flags(plan: Plan) -> list[object]:
    """With the speed that was measured before, where there is one."""
    words: list[object] = ["--seconds", f"{0.8 * plan.seconds:.0f}", "--out", plan.out / "speedrun"]
    rows = plan.results.get("training", {}).get("rows", [])
    rates = [r["tokens_per_second"] for r in rows if r["candidate"] in ("ours, muon", "ours, adamw")]
    return [*words, "--tokens-per-second", f"{min(rates):.0f}"] if rates else words


def parts(cuda: bool) -> list[Part]:
    """The most valuable first. Shares are about what each takes on an idle machine."""
    shapes = [] if cuda else ["--small"]
    return [
        Part("kernels", "bench.correct", 2, lambda plan: [], correct_rows),
        Part(
            *("Newton-Schulz", "bench.newton_schulz", 3),
            lambda plan: ["--only", "groups", "products", *shapes],
            newton_schulz_rows,
        ),
        Part("optimizer step", "bench.newton_schulz", 2, lambda plan: ["--only", "step", *shapes], step_rows),
        Part("training", "bench.train", 5, train_flags, train_rows, needs=SCIPY),
        Part("spectra", "bench.spectra", 3, spectra_flags, spectra_rows, needs=SCIPY),
        Part("experts", "bench.experts", 1, lambda plan: ["--repeats", 20 if cuda else 5], experts_rows),
        Part("loader", "bench.data", 3, lambda plan: [], loader_rows, needs=("tokenizers",)),
        Part("speedrun", "bench.speedrun", 6, speedrun_flags, speedrun_rows, needs=(*SCIPY, "matplotlib")),
    ]


def rows_of(part: Part, done: Json, cuda: bool) -> list[Json]:
    """The table's lines of a part; one that says why where there are no figures."""
    if done["result"] is None:
        return [row(part.name, None, goal=done["state"])]
    try:
        return part.rows(done["result"], cuda)
    except (KeyError, TypeError, IndexError, ValueError, ZeroDivisionError) as error:
        done["state"] = f"failed: its figures are not as expected ({type(error).__name__}: {error})"
        return [row(part.name, None, goal=done["state"])]
