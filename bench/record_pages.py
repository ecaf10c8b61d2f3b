"""Records as numbers, tables and pages: what a record's runs say, and every text that is generated from it.

    figures = figures_of(runs); text = record_page(record); text = fill(text, "performance", performance(folder))

Numbers come from the runs' files alone, texts from the JSON alone, so that neither can drift from its source: a check
makes both again and compares. Reads only runs/records; needs no torch.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.runs import Run, optimizer_name
from analysis.stats import SIGNIFICANT, STEADY, Difference, difference, first_reaching, p_words, t_interval
from bench import machine
from engine import files
from engine.cli import BadInput

RECORD, BENCH, CORPORA, PRIOR = "record.json", "bench.json", "corpora.json", "prior.json"
TRACKS = {"2m": "2M", "time-to-loss": "time to loss"}
PLOTS = ("loss_curves", "optimizer_comparison", "effective_rank_over_time", "spectral_norm_by_depth")
BUDGET = 2_015_232  # tokens of the track 2m, the prior work's 123 updates of 16,384
LEAST_SEEDS = 3
FIGHT_RECORD = "nano-fight"  # the record whose findings the README begins with
FIGHT_SENTENCES = 7  # the verdict, the ways to win, and what their tests hold for
SHOWN = ("driver", "sm_clock_mhz", "memory_clock_mhz", "power_limit_watts", "cpu_mhz", "busy_cores")
MARK = "<!-- figures: {name} -->"
END = "<!-- end of figures -->"

Json = dict[str, Any]


def figures_of(runs: Sequence[Run]) -> Json:
    """Per optimizer and seed: losses, speed, and tokens and seconds to the target, AdamW's mean final loss.

    The time at which a run reaches the target is linear between validations, null where it never does.
    """
    by_optimizer: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.config["seed"]):
        by_optimizer.setdefault(run.optimizer, []).append(run)
    target = _mean([run.final_loss for run in by_optimizer.get("adamw", [])])
    found: Json = {"target_loss": target, "optimizers": {}}
    for optimizer, members in sorted(by_optimizer.items(), reverse=True):
        columns: Json = {"seeds": [run.config["seed"] for run in members]}
        columns["best_val_loss"] = _column([float(run.val["val_loss"].min()) for run in members])
        columns["final_val_loss"] = _column([run.final_loss for run in members])
        columns["final_val_accuracy"] = _column([float(run.val["val_accuracy"][-1]) for run in members])
        for key in ("train_seconds", "tokens_per_second", "step_ms", "memory_bytes"):
            columns[key] = _column([getattr(run, key) for run in members])
        columns["effective_rank_kept"] = _column([rank_kept(run) for run in members])
        for key, column in (("tokens_to_target", "tokens"), ("seconds_to_target", "train_seconds")):
            columns[key] = _column([_reached(run, column, target) for run in members])
        times = [run.step_ms for run in members]
        columns["slowest_over_fastest"] = max(times) / min(times)
        found["optimizers"][optimizer] = columns
    if {"muon", "adamw"} <= by_optimizer.keys():
        test = contrast(found, "muon", found, "adamw")
        keys = ("difference", "low", "high", "p_value")
        found["muon_minus_adamw"] = {key: _finite(getattr(test, key)) for key in keys}
    return found


def rank_kept(run: Run) -> float:
    """The effective rank at the end as a share of that at the start, mean over matrices; NaN without spectra."""
    shares = [
        (grid[:, -1] / grid[:, 0]).ravel() for _, grid in (run.grid(p, "effective_rank") for p in run.projections())
    ]
    return float(np.concatenate(shares).mean()) if shares else math.nan


def _reached(run: Run, column: str, target: float | None) -> float:
    if target is None:
        return math.nan
    reached = first_reaching(run.val[column], run.val["val_loss"], target)
    return math.nan if reached is None else reached


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean(values: Sequence[float]) -> float | None:
    return _finite(sum(values) / len(values)) if values else None


def _column(values: Sequence[float]) -> Json:
    """Values by seed with mean and 95 % interval; a mean only where no value is missing."""
    mean, low, high = map(_finite, t_interval(values))
    return {"by_seed": [_finite(value) for value in values], "mean": mean, "low": low, "high": high}


def contrast(a: Json, one: str, b: Json, other: str) -> Difference:
    """The difference of the best losses of two entries."""
    sides = a["optimizers"][one], b["optimizers"][other]
    return difference(*(dict(zip(side["seeds"], side["best_val_loss"]["by_seed"], strict=True)) for side in sides))


def same_figures(a: Any, b: Any) -> bool:
    """Equal but for the last digits, which another NumPy may round differently."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_figures(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_figures, a, b))
    if isinstance(a, int | float) and isinstance(b, int | float) and type(a) is not bool and type(b) is not bool:
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
    return a == b and type(a) is type(b)


def read_all(folder: Path, name: str) -> list[tuple[str, Json]]:
    """Folder name and contents of every record (or benchmark) below `folder`, GPUs and large models first."""
    found = [(path.parent.name, files.load_json(path)) for path in sorted(folder.glob(f"*/{name}"))]
    return sorted(found, key=lambda item: (item[1]["machine"]["device"] == "cpu", -item[1].get("params", 0)))


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def with_interval(column: Json, digits: int = 4) -> str:
    if column["low"] is None:
        return f"{column['mean']:.{digits}f}"
    return f"{column['mean']:.{digits}f} ({column['low']:.{digits}f} to {column['high']:.{digits}f})"


def steady(entry: Json) -> bool:
    return entry["slowest_over_fastest"] <= STEADY


def seconds_cell(entry: Json, key: str = "train_seconds") -> str:
    """A mean time; where seeds of one setting took unlike times, their machine was not free, and it says so."""
    mean = entry[key]["mean"]
    return "not by every seed" if mean is None else f"{mean:,.1f} s" + ("" if steady(entry) else " (machine not free)")


def loss_rows(record: Json) -> list[list[str]]:
    rows = []
    for optimizer, entry in record["figures"]["optimizers"].items():
        rows.append([optimizer_name(optimizer), with_interval(entry["best_val_loss"])])
        rows[-1] += [f"{entry['final_val_loss']['mean']:.4f}", f"{100 * entry['final_val_accuracy']['mean']:.2f} %"]
        rows[-1] += [seconds_cell(entry), f"{entry['tokens_per_second']['mean']:,.0f}", str(len(entry["seeds"]))]
    return rows


LOSS_HEADER = ("optimizer", "best validation loss (95 %)", "final", "accuracy", "training time", "tokens/s", "seeds")
TIME_HEADER = ("optimizer", "budget", "loss to reach", "tokens to it", "training time to it", "tokens saved", "seeds")


def time_rows(record: Json) -> list[list[str]]:
    """AdamW sets the target with its whole budget; another optimizer has the tokens and seconds to it."""
    figures, budget, rows = record["figures"], record["tokens"], []
    for optimizer, entry in figures["optimizers"].items():
        if optimizer == "adamw":
            tokens, seconds = float(budget), seconds_cell(entry)
        else:
            tokens, seconds = entry["tokens_to_target"]["mean"], seconds_cell(entry, "seconds_to_target")
        shown, saved = (
            ("not by every seed", "-") if tokens is None else (f"{tokens:,.0f}", f"{percent(1 - tokens / budget)}")
        )
        saved = "sets the loss" if optimizer == "adamw" else saved
        cells = [
            optimizer_name(optimizer),
            f"{budget:,}",
            f"{figures['target_loss']:.4f}",
            shown,
            seconds,
            saved,
            str(len(entry["seeds"])),
        ]
        rows.append(cells)
    return rows


def difference_sentence(record: Json) -> str:
    """Whose best loss is lower, by how much, and whether that may be chance."""
    found = record["figures"]["muon_minus_adamw"]
    words = "below" if found["difference"] < 0 else "above"
    sentence = f"Muon's best validation loss is {abs(found['difference']):.3f} nats {words} AdamW's"
    if found["p_value"] is None:
        return sentence
    low, high = found["low"], found["high"]
    if found["difference"] < 0:
        low, high = -high, -low
    test = contrast(record["figures"], "muon", record["figures"], "adamw").test
    tie = "" if found["p_value"] < SIGNIFICANT else ": a tie"
    return f"{sentence} (95 % interval {low:.3f} to {high:.3f}, {p_words(found['p_value'])}, {test}{tie})"


def time_sentence(record: Json) -> str:
    entries = record["figures"]["optimizers"]
    tokens = entries["muon"]["tokens_to_target"]["mean"]
    if tokens is None:
        return "Not every seed of Muon reaches AdamW's final loss"
    sentence = f"Muon reaches AdamW's final loss after {percent(tokens / record['tokens'])} of the tokens"
    if not all(map(steady, entries.values())):
        return sentence
    share = entries["muon"]["seconds_to_target"]["mean"] / entries["adamw"]["train_seconds"]["mean"]
    return f"{sentence} and {percent(share)} of the time"


def title(record: Json) -> str:
    return f"{record['model']}, {record['tokens']:,} tokens, {machine.label(record['machine'])}"


def record_page(record: Json) -> str:
    """The README of a record's folder."""
    described = record["machine"]
    parts = [
        f"# {title(record)}",
        f"{difference_sentence(record)}. {time_sentence(record)}. [Report](report.md).",
        f"Corpus: {record['corpus']}, fingerprint `{record['data_fingerprint']}`. Batches of "
        f"{record['batch_tokens']:,} tokens, sequences of {record['seq_len']:,}, the first "
        f"{record['eval_tokens']:,} validation tokens.",
    ]
    if "2m" in record["tracks"]:
        parts += ["## 2M", table(LOSS_HEADER, loss_rows(record))]
    if "time-to-loss" in record["tracks"]:
        parts += ["## Time to loss", table(TIME_HEADER, time_rows(record))]
    if not all(map(steady, record["figures"]["optimizers"].values())):
        parts.append(f"The steps of one seed took over {STEADY} times as long as another's: compare losses, not times.")
    facts = [f"{key} {described[key]}" for key in SHOWN if described.get(key) is not None]
    versions = f"Python {described['python_version']}, torch {described['torch_version']}"
    parts += [
        "## How it was made",
        f"{described['date']}, {', '.join([machine.label(described), *facts, versions])}.",
        f"```\ngit checkout {record['git_commit']}\n{record['corpus_command']}\n{record['command']}\n```",
        "Each run's folder holds its settings, metrics, log and summary, and its spectra with five digits, packed. "
        "`python -m bench.record check` on this folder makes every figure here again from them.",
    ]
    return "\n\n".join(parts) + "\n"


def entries(records: Sequence[tuple[str, Json]]) -> list[tuple[str, Json, str]]:
    return [(name, record, optimizer) for name, record in records for optimizer in record["figures"]["optimizers"]]


def ranked(rivals: Sequence[tuple[str, Json, str]]) -> list[tuple[str, Json, str]]:
    """Best loss first; those that tie with the best of what is left stand together, the quicker one first."""
    left, order = sorted(rivals, key=lambda entry: _best(entry)["mean"]), []
    while left:
        _, leader, optimizer = left[0]
        tied = [left[0]]
        for entry in left[1:]:
            p_value = contrast(leader["figures"], optimizer, entry[1]["figures"], entry[2]).p_value
            tied += [entry] if p_value >= SIGNIFICANT else []
        quickest = sorted(tied, key=lambda entry: (not steady(_entry(entry)), _entry(entry)["train_seconds"]["mean"]))
        order += quickest
        left = [entry for entry in left if not any(entry is one for one in tied)]
    return order


def soonest(entry: tuple[str, Json, str]) -> tuple[bool, float]:
    """Mean seconds to AdamW's final loss; AdamW itself takes all of its time, who never gets there comes last, and
    before him those whose times do not count."""
    found = _entry(entry)
    mean = found["train_seconds" if entry[2] == "adamw" else "seconds_to_target"]["mean"]
    return not steady(found) or mean is None, math.inf if mean is None else mean


def _entry(entry: tuple[str, Json, str]) -> Json:
    return entry[1]["figures"]["optimizers"][entry[2]]


def _best(entry: tuple[str, Json, str]) -> Json:
    return _entry(entry)["best_val_loss"]


def record_tables(folder: Path) -> str:
    """Both tracks by device and model, then what others published."""
    records = read_all(folder, RECORD)
    arenas: dict[tuple[str, ...], list[tuple[str, Json]]] = {}
    for name, record in records:
        key = (machine.label(record["machine"]), record["model"], record["corpus"], str(record["tokens"]))
        arenas.setdefault(key, []).append((name, record))
    start = ("device", "model", "corpus")
    tables = {}
    for track in TRACKS:
        rows = []
        for key, members in arenas.items():
            rivals = entries([item for item in members if track in item[1]["tracks"]])
            rivals = ranked(rivals) if track == "2m" else sorted(rivals, key=soonest)
            for name, record, optimizer in rivals:
                cells = dict(
                    zip(
                        record["figures"]["optimizers"],
                        (loss_rows if track == "2m" else time_rows)(record),
                        strict=True,
                    )
                )
                rows.append([*key[:3], *cells[optimizer], f"[{name}]({name}/README.md)"])
        if not any(record["machine"]["device"] != "cpu" and track in record["tracks"] for _, record in records):
            width = len(start) + len(LOSS_HEADER if track == "2m" else TIME_HEADER)
            rows.insert(0, ["RTX 4090", "88m", "-", "no GPU was at hand yet", *["-"] * (width - 4), "-"])
        tables[track] = table((*start, *(LOSS_HEADER if track == "2m" else TIME_HEADER), "record"), rows)
    return "\n\n".join(
        ["### 2M", tables["2m"], "### Time to loss", tables["time-to-loss"], "### Prior art", *prior_art(folder)]
    )


def prior_art(folder: Path) -> list[str]:
    prior = files.load_json(folder / PRIOR)
    rows = [
        [row["device"], row["model"], row["optimizer"], f"{row['tokens']:,}", row["loss"], row["time"], row["corpus"]]
        for row in prior["rows"]
    ]
    header = ("device", "model", "optimizer", "tokens", "validation loss", "time", "corpus")
    return [prior["about"], table(header, rows)]


BENCH_HEADER = ("figure", "ours", "peer", "ratio", "floor", "of it", "goal", "met")


def bench_page(bench: Json) -> str:
    """The README of a folder of bench.all."""
    described = bench["machine"]
    small = " Small sizes, as a CPU allows." if described["device"] == "cpu" else ""
    parts = [
        f"# Benchmarks, {machine.label(described)}",
        f"`{bench['command']}`, {described['date']}, commit {bench_commit(bench)}, torch {described['torch_version']}, "
        f"{described['busy_cores']} cores busy with other work at the start, threads: {bench['threads']}.{small}",
        bench_table(bench),
        "A ratio above 1 says that ours is better than the peer. The floor is what the machine allows at best.",
        table(("part", "state", "seconds"), [[p["name"], p["state"], f"{p['seconds']:.0f}"] for p in bench["parts"]]),
    ]
    return "\n\n".join(parts) + "\n"


def bench_commit(bench: Json) -> str:
    return str(bench["machine"]["git_commit"])[:12]


def bench_cells(row: Json) -> list[str]:
    ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}x"
    share = "-" if row["share"] is None else f"{row['share']:.1%}"
    met = {True: "yes", False: "**no**", None: "-"}[row["met"]]
    peer = "-" if row["peer"] is None else f"{amount(row['peer'])} ({row['peer_name']})"
    ours = "-" if row["ours"] is None else f"{amount(row['ours'])} {row['unit']}".strip()
    floor = "-" if row["floor"] is None else amount(row["floor"])
    return [row["figure"], ours, peer, ratio, floor, share, row["goal"], met]


def amount(value: float) -> str:
    """Three or more significant digits without an exponent; a count as it is."""
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def bench_table(bench: Json) -> str:
    return table(BENCH_HEADER, [bench_cells(row) for row in bench["rows"]])


GOAL_HEADER = ("figure", "ours", "peer", "goal", "met")


def goal_table(bench: Json) -> str:
    """The rows that have a goal on this machine, met or not."""
    kept = [BENCH_HEADER.index(column) for column in GOAL_HEADER]
    cells = [bench_cells(row) for row in bench["rows"] if row["met"] is not None]
    return table(GOAL_HEADER, [[line[i] for i in kept] for line in cells])


def headline(folder: Path) -> str:
    """The first screen of the project's README: the best record's two pictures and what they say."""
    records = read_all(folder, RECORD)
    if not records:
        return "No record yet: `python -m bench.record make` makes one."
    name, record = records[0]
    where = f"runs/records/{name}"
    pictures = [
        f"![Muon against AdamW: validation loss and accuracy]({where}/plots/loss_curves.png)",
        f"![Effective rank of every projection under both]({where}/plots/effective_rank_over_time.png)",
    ]
    seeds = len(record["figures"]["optimizers"]["muon"]["seeds"])
    say = f"The pictures show other runs, of the default settings: {record['model']}, {record['tokens']:,} tokens, "
    say += f"{seeds} seeds each, on {machine.label(record['machine'])}. There, "
    say += f"{difference_sentence(record)}. {time_sentence(record)}. {rank_sentence(record)}"
    return "\n\n".join([*pictures, *fight(folder), f"{say} [Full report]({where}/report.md)."])


def fight(folder: Path) -> list[str]:
    """What the published fair fight found, in its own first sentences; none where there is none."""
    path = folder / FIGHT_RECORD / files.FINDINGS
    if not path.exists():
        return []
    verdict, *ways = files.load_json(path)["fair-fight"][:FIGHT_SENTENCES]
    said = "\n".join(f"- {sentence}" for sentence in ways)
    return [f"{verdict} From [the fair fight](runs/records/{FIGHT_RECORD}/report.md), both tuned alike:\n\n{said}"]


def rank_sentence(record: Json) -> str:
    kept = {name: entry["effective_rank_kept"]["mean"] for name, entry in record["figures"]["optimizers"].items()}
    if None in kept.values():
        return ""
    shares = f"{percent(kept['muon'])} of their effective rank under Muon, {percent(kept['adamw'])} under AdamW"
    return f"The weights keep {shares}."


def performance(folder: Path) -> str:
    """Section of the project's README: the goals of every machine that was measured."""
    parts, benches = [], read_all(folder, BENCH)
    for name, bench in benches:
        described = bench["machine"]
        parts += [
            f"**{machine.label(described)}**, {described['date']}, commit {bench_commit(bench)}, `{bench['command']}`:",
            goal_table(bench),
            f"All {len(bench['rows'])} figures: [runs/records/{name}](runs/records/{name}/README.md).",
        ]
    if not benches:
        parts.append("No table yet: `python -m bench.all --out runs/records/NAME` makes one.")
    if all(bench["machine"]["device"] == "cpu" for _, bench in benches):
        parts.append("There is no GPU table yet.")
    return "\n\n".join(parts)


def fill(text: str, name: str, body: str) -> str:
    """`text` with the part between the marks of `name` replaced; BadInput if the marks are missing."""
    mark = MARK.format(name=name)
    pattern = re.compile(f"{re.escape(mark)}.*?{re.escape(END)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise BadInput(f"README.md: the marks {mark} … {END} must be there once")
    return pattern.sub(lambda _: f"{mark}\n{body}\n{END}", text)


def generated(root: Path) -> dict[Path, str]:
    """Every file with generated figures, as it must be: the project's README, that of the records, each record's."""
    records = root / "runs" / "records"
    readme, table_file = root / "README.md", records / "README.md"
    text = fill(readme.read_text(encoding="utf-8"), "headline", headline(records))
    made = {readme: fill(text, "performance", performance(records))}
    made[table_file] = fill(table_file.read_text(encoding="utf-8"), "records", record_tables(records))
    made |= {records / name / "README.md": record_page(record) for name, record in read_all(records, RECORD)}
    return made | {records / name / "README.md": bench_page(bench) for name, bench in read_all(records, BENCH)}


def as_written(value: Json) -> Json:
    """What a JSON file will give back."""
    return json.loads(json.dumps(value, allow_nan=False))
