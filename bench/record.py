"""Records of the speedrun: train one, check one, and bring every text with figures up to date.

    python -m bench.record make 2m time-to-loss --model nano --seeds 0 1 2 --out runs/records/nano-2-cores
    python -m bench.record check runs/records/nano-2-cores      python -m bench.record figures

`make` trains one run after another (nano, six runs: half an hour on two idle cores) and continues where it was stopped;
both tracks come from the same runs. `check` trusts nothing that it can compute: exit code 1 and a line for each fault.
"""

import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import report
from analysis.pages import markdown_page
from analysis.report_figures import draw
from analysis.runs import Run, group_seeds, load_run
from bench import machine
from bench import record_pages as pages
from bench.all import parts, rows_of
from bench.record_pages import BENCH, BUDGET, CORPORA, LEAST_SEEDS, PLOTS, RECORD
from engine import files, identity
from engine.cli import BadInput, Count, exit_with_a_sentence, make_folder
from engine.defaults import defaults_of
from engine.files import ROOT
from model import SIZES
from suites import launcher
from suites.suite import OPTIMIZERS

KEPT = (files.CONFIG, files.METRICS, files.SUMMARY, files.LOG)
MOST_BYTES = 4 * 2**20  # of a record's folder: every clone carries it


@dataclass(frozen=True)
class Make:
    """Train Muon and AdamW with every seed and keep what they leave behind as a record."""

    out: Path
    """Folder of the record, below runs/records; must not exist yet."""
    tracks: tyro.conf.Positional[tuple[Literal["2m", "time-to-loss"], ...]] = ("2m", "time-to-loss")
    """Tracks that these runs compete in."""
    model: str = "88m"
    """Named size."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of both optimizers, at least three."""
    tokens: Count = BUDGET
    """Training tokens of every run; the track 2m has its own number."""
    data: Path | None = None
    """Folder of token shards (default: the embedded shards that suit the model)."""
    spectra_every: int | None = None
    """Steps between spectra events (default: as train.py); a record must stay small."""
    runs_dir: Path = Path("runs")
    """Where the runs are trained, with checkpoints, in RUNS_DIR/record-NAME; to be removed afterwards."""


@dataclass(frozen=True)
class Check:
    """Verify records: files, figures, fingerprint, losses, commit."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of records, or of benchmarks that bench.all wrote."""


@dataclass(frozen=True)
class Figures:
    """Write README.md, runs/records/README.md and every record's README again from the JSON files."""

    check: bool = False
    """Write nothing; exit code 1 where a file is not up to date."""
    reports: bool = False
    """Write every record's report.md and plots again too, as the report's code of today has them."""


Command = (
    Annotated[Make, tyro.conf.subcommand("make")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Figures, tyro.conf.subcommand("figures")]
)


def make(a: Make) -> int:
    """Train what is missing, then write the record in one piece."""
    from corpus.shards import open_shards
    from engine.defaults import default_data
    from engine.ranks import Rank
    from settings import Settings, resolve

    if a.out.exists():
        raise BadInput(f"--out {a.out}: exists; a record is made anew or not at all")
    if not files.is_safe_name(a.out.name):
        raise BadInput(f"--out {a.out}: its name must be letters, digits, '.', '_' and '-'")
    if len(set(a.seeds)) < max(LEAST_SEEDS, len(a.seeds)):
        raise BadInput(f"--seeds {' '.join(map(str, a.seeds))}: at least {LEAST_SEEDS} different ones")
    if "2m" in a.tracks and a.tokens != BUDGET:
        raise BadInput(f"--tokens {a.tokens}: the track 2m has {BUDGET:,}")
    if a.spectra_every == 0:
        raise BadInput("--spectra-every 0: a record holds spectra")
    commit = identity.provenance()["git_commit"]
    if commit is None or commit.endswith("+"):
        raise BadInput(
            "the source tree has uncommitted changes or no commit: a record must be repeatable, commit first"
        )
    data = a.data or default_data(a.model)
    flags = ["--model", a.model, "--tokens", str(a.tokens), "--data", str(data)]
    flags += [] if a.spectra_every is None else ["--spectra-every", str(a.spectra_every)]
    corpus = corpus_of(a.out.parent, open_shards(data).fingerprint)
    settings, *_ = resolve(Settings(model=a.model, tokens=a.tokens, data=data, spectra_every=a.spectra_every), Rank())
    where = a.runs_dir / f"record-{a.out.name}"
    jobs = [
        launcher.Job(
            name=f"{a.model}-{optimizer}-{seed}",
            flags=(*flags, "--optimizer", optimizer, "--seed", str(seed)),
            steps=math.ceil(a.tokens / settings.batch_tokens),
            tokens=a.tokens,
            runs_dir=where,
        )
        for seed in a.seeds
        for optimizer in OPTIMIZERS
    ]
    make_folder(where, exist_ok=True)
    described = begun(where, commit, command_of(a, data))
    try:
        launcher.run_here(jobs, [{}])
    except launcher.Interrupted:
        print(f"{where}: stopped; run the same command to continue")
        return 0
    failed = [job for job in jobs if job.state() != "finished"]
    if failed:
        raise BadInput(f"{failed[0].folder}: {failed[0].reason()}; no record was written")
    write_record(a.out, [job.folder for job in jobs], a.tracks, described, corpus, command_of(a, data))
    faults = check(a.out)
    print("\n".join(faults) or (a.out / "README.md").read_text(encoding="utf-8"))
    print(f"{a.out}: {len(faults)} faults; now `make readme-figures`, then commit; {where} can go")
    return int(bool(faults))


def begun(where: Path, commit: str, command: str) -> dict[str, Any]:
    """The machine as it was before the first run; BadInput where another commit or command began these runs."""
    path = where / "machine.json"
    if not path.exists():
        files.write_json(path, machine.describe() | {"command": command})
    described = files.load_json(path)
    if described.pop("command", None) != command:
        raise BadInput(f"{where}: was begun by another command; repeat that one or remove the folder")
    if described["git_commit"] != commit:
        raise BadInput(f"{where}: was begun by commit {described['git_commit']}; check that out or remove the folder")
    return described


def command_of(a: Make, data: Path) -> str:
    """The command that makes this record again, whatever the defaults will be."""
    words = ["python", "-m", "bench.record", "make", *a.tracks, "--model", a.model, "--tokens", str(a.tokens)]
    words += ["--data", str(data), "--seeds", *map(str, a.seeds), "--out", str(a.out)]
    return shlex.join(words + ([] if a.spectra_every is None else ["--spectra-every", str(a.spectra_every)]))


def corpus_of(folder: Path, fingerprint: str) -> dict[str, Any]:
    """What the records' list says of this corpus; BadInput where it is not in it."""
    corpora = files.load_json(folder / CORPORA)
    if fingerprint not in corpora:
        raise BadInput(
            f"{folder / CORPORA}: knows no corpus with fingerprint {fingerprint}; add its name and the command that "
            "builds it, so that others can race on it"
        )
    return corpora[fingerprint]


def write_record(
    out: Path,
    folders: Sequence[Path],
    tracks: Sequence[str],
    described: dict[str, Any],
    corpus: dict[str, Any],
    command: str,
) -> None:
    """Copy what counts of the runs, draw, compute, and rename the whole folder into place."""
    part = out.with_name(f"{out.name}.tmp")
    if part.exists():
        shutil.rmtree(part)
    make_folder(part)
    for folder in folders:
        (part / folder.name).mkdir()
        for name in KEPT:
            shutil.copyfile(folder / name, part / folder.name / name)
        if (folder / files.SPECTRA).exists():
            spectra = map(files.rounded, files.read_jsonl(folder / files.SPECTRA))
            files.pack(spectra, part / folder.name / files.SPECTRA)
    runs = [load_run(part / folder.name) for folder in folders]
    write_report(part, runs)
    config = runs[0].config
    record = {"tracks": list(tracks), "command": command, "git_commit": config["git_commit"], "machine": described}
    record |= {key: config[key] for key in ("model", "params", "batch_tokens", "seq_len", "eval_tokens")}
    record |= {"tokens": runs[0].budget, "data_fingerprint": config["data_fingerprint"]}
    record |= {"corpus": corpus["name"], "corpus_command": corpus["command"]}
    record |= {"runs": [folder.name for folder in folders], "figures": pages.figures_of(runs)}
    files.write_json(part / RECORD, record)
    (part / "README.md").write_text(pages.record_page(pages.as_written(record)), encoding="utf-8")
    part.rename(out)


def check(folder: Path) -> list[str]:
    """Everything that is wrong with a record or a benchmark, in sentences."""
    try:
        if (folder / BENCH).exists():
            return check_bench(folder, files.load_json(folder / BENCH))
        return check_record(folder, files.load_json(folder / RECORD))
    except BadInput as fault:
        return [str(fault)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return [f"{folder}: its JSON has not the form of a record ({type(error).__name__}: {error})"]


def check_bench(folder: Path, bench: dict[str, Any]) -> list[str]:
    """A benchmark: its table once more from what its parts found, and its page from the table."""
    known, cuda, rows = {part.name: part for part in parts(not bench["small_sizes"])}, not bench["small_sizes"], []
    for done in bench["parts"]:
        rows += rows_of(known[done["name"]], done, cuda)
    if not pages.same_figures(bench["rows"], rows):
        return [f"{folder / BENCH}: its table is not what its parts found"]
    return [*check_page(folder, pages.bench_page(bench)), *check_commit(folder, {bench["machine"]["git_commit"]})]


def check_record(folder: Path, record: dict[str, Any]) -> list[str]:
    faults = [f"{folder / name}: is missing" for name in ("report.md", "README.md") if not (folder / name).exists()]
    wanted = [folder / name / file for name in record["runs"] for file in (*KEPT, files.SPECTRA + files.PACKED)]
    faults += [f"{path}: is missing" for path in wanted if not path.exists()]
    if faults:
        return faults
    for link in re.findall(r"\]\(([^)]*\.png)\)", (folder / "report.md").read_text(encoding="utf-8")):
        faults += [] if (folder / link).exists() else [f"{folder / link}: is missing"]
    runs = [load_run(folder / name) for name in record["runs"]]
    faults += [fault for run in runs for fault in check_run(run)]
    faults += check_rules(folder, record, runs)
    if not faults:
        if not pages.same_figures(record["figures"], pages.as_written(pages.figures_of(runs))):
            faults.append(f"{folder / RECORD}: its figures are not those of its runs")
        faults += check_page(folder, pages.record_page(record))
    commits = {run.config.get("git_commit") for run in runs} | {record["git_commit"]}
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        faults.append(f"{folder}: {size:,} bytes, a record has at most {MOST_BYTES:,}")
    return faults + check_commit(folder, commits)


def check_run(run: Run) -> list[str]:
    """One run: finished, every step with its loss, and a summary that agrees with its lines."""
    if run.status != "finished" or not run.val or not run.train:
        return [f"{run.path}: is not a finished run"]
    steps, faults = int(run.config["steps"]), []
    if list(run.train["step"]) != list(range(1, steps + 1)) or int(run.val["step"][-1]) != steps:
        faults.append(f"{run.path / files.METRICS}: lacks a step from 1 to {steps}")
    for columns, key in ((run.train, "train_loss"), (run.val, "val_loss"), (run.val, "val_accuracy")):
        if not all(map(math.isfinite, columns[key])):
            faults.append(f"{run.path / files.METRICS}: has a {key} that is not finite")
    for key, value in (("final_val_loss", run.val["val_loss"][-1]), ("best_val_loss", run.val["val_loss"].min())):
        if not pages.same_figures(run.summary.get(key), float(value)):
            faults.append(f"{run.path / files.SUMMARY}: its {key} is not that of {files.METRICS}")
    if run.summary["train_seconds"] < run.val["train_seconds"][-1]:
        faults.append(f"{run.path / files.SUMMARY}: its train_seconds are fewer than {files.METRICS} has")
    return faults


def check_rules(folder: Path, record: dict[str, Any], runs: Sequence[Run]) -> list[str]:
    """The rules of the speedrun, as runs/records/README.md has them."""
    faults = []
    groups = group_seeds(runs)
    optimizers = sorted(group.optimizer for group in groups)
    if optimizers != sorted(OPTIMIZERS):
        return [f"{folder}: its runs are {' and '.join(optimizers)}; one setting of {' and one of '.join(OPTIMIZERS)}"]
    seeds = [sorted(run.config["seed"] for run in group.runs) for group in groups]
    if seeds[0] != seeds[1] or len(set(seeds[0])) < LEAST_SEEDS or len(set(seeds[0])) < len(seeds[0]):
        faults.append(f"{folder}: its seeds are {seeds[0]} and {seeds[1]}; the same {LEAST_SEEDS} or more for both")
    for key in ("model", "batch_tokens", "seq_len", "eval_tokens", "data_fingerprint", "params"):
        if {run.config.get(key) for run in runs} != {record[key]}:
            faults.append(f"{folder}: {key} differs between its runs and {RECORD}")
    if {run.budget for run in runs} != {record["tokens"]} or ("2m" in record["tracks"] and record["tokens"] != BUDGET):
        faults.append(f"{folder}: {record['tokens']:,} tokens; the track 2m has {BUDGET:,}, and all its runs the same")
    if not record["tracks"] or not set(record["tracks"]) <= set(pages.TRACKS):
        faults.append(f"{folder}: its tracks are {record['tracks']}")
    wanted = standard(record["model"])
    for key, value in wanted.items():
        if record[key] != value:
            faults.append(f"{folder}: {key} is {record[key]}, and of this model {value}")
    model = "nano" if record["machine"]["device"] == "cpu" else "88m"
    if record["model"] != model:
        faults.append(f"{folder}: is of {record['model']}; here the race is {model}'s")
    devices = {run.config["device_name"] for run in runs}
    if devices != {record["machine"]["device"]}:
        faults.append(f"{folder}: its runs are of {', '.join(sorted(devices))}, not of {record['machine']['device']}")
    corpus = corpus_of(folder.parent, record["data_fingerprint"])
    if (corpus["name"], corpus["command"]) != (record["corpus"], record["corpus_command"]):
        faults.append(f"{folder}: calls its corpus otherwise than {CORPORA} does")
    return faults


def standard(model: str) -> dict[str, int]:
    """What train.py sets for a model and a record must keep."""
    suited = defaults_of(model)
    return {"batch_tokens": suited.batch_tokens, "eval_tokens": suited.eval_tokens, "seq_len": SIZES[model].seq_len}


def check_page(folder: Path, wanted: str) -> list[str]:
    found = (folder / "README.md").read_text(encoding="utf-8") if (folder / "README.md").exists() else ""
    return [] if found == wanted else [f"{folder / 'README.md'}: is not what its JSON gives; run make readme-figures"]


def check_commit(folder: Path, commits: set[str | None]) -> list[str]:
    """One commit of this repository, without other changes; a clone without its history is recognised."""
    if len(commits) != 1 or None in commits or not all(re.fullmatch("[0-9a-f]{40}", str(c)) for c in commits):
        return [
            f"{folder}: was made by {', '.join(sorted(map(str, commits)))}; a record needs one commit without changes"
        ]
    commit = commits.pop()
    if _git("cat-file", "-e", f"{commit}^{{commit}}") == "":
        return []
    if _git("rev-parse", "--is-shallow-repository") != "false":
        print(f"{folder}: commit {commit} not looked for, this copy has no history")
        return []
    return [f"{folder}: its commit {commit} does not exist here"]


def _git(*words: str) -> str | None:
    """What git says, None where it fails."""
    try:
        done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def write_report(folder: Path, runs: Sequence[Run]) -> None:
    """A record's report.md with its plots."""
    page = report.build_page(runs, draw(runs, folder / "plots", only=PLOTS))
    text = markdown_page(page)
    files.write_whole(folder / "report.md", lambda file: file.write(text.encode()))


def write_figures(a: Figures) -> int:
    """Bring the generated files up to date, or say which are not."""
    for path in sorted((ROOT / "runs" / "records").glob(f"*/{RECORD}")) if a.reports else ():
        names = files.load_json(path)["runs"]
        write_report(path.parent, [load_run(path.parent / name) for name in names])
    stale = {path: text for path, text in pages.generated(ROOT).items() if not _holds(path, text)}
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)}: {'is not up to date; run make readme-figures' if a.check else 'written'}")
        if not a.check:
            files.write_whole(path, lambda file, text=text: file.write(text.encode()))
    return int(a.check and bool(stale))


def _holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


@exit_with_a_sentence
def main() -> int:
    command = tyro.cli(Command, description=__doc__, config=(tyro.conf.ConsolidateSubcommandArgs,))
    if isinstance(command, Make):
        return make(command)
    if isinstance(command, Figures):
        return write_figures(command)
    if not command.folders:
        raise BadInput("check: name at least one folder of a record")
    faults = [fault for folder in command.folders for fault in check(folder)]
    print("\n".join(faults) or f"{', '.join(map(str, command.folders))}: nothing wrong")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
