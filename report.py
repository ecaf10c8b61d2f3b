"""Runs -> one report: report.html (self-contained), report.md and plots/.

    python report.py runs/my-muon runs/my-adamw --out runs/my-report

Reads only the runs' folders, finished or not, and takes a few seconds; it needs no torch and no network.
"""

import base64
import html
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

import plots
from cli import BadInput, exit_with_a_sentence, make_folder
from stats import Run, first_reaching, load_run, t_interval


@dataclass(frozen=True)
class Arguments:
    """Compare training runs in one page."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders to show."""
    out: Path = Path("runs/report")
    """Folder for report.html, report.md and plots/; an earlier report there is replaced."""


@dataclass(frozen=True)
class Section:
    """A figure with its file stem and how to read it."""

    stem: str
    title: str
    how_to_read: str


CURVES = Section(
    "loss_curves",
    "Loss and accuracy",
    "Lower loss and higher accuracy are better. The left column asks what each optimizer learns from the same tokens, "
    "the right column what it learns in the same time; the clock leaves out compilation, validation and checkpoints.",
)
SPECTRA = (
    Section(
        "spectral_norm_by_depth",
        "Spectral norm against depth",
        "The largest factor by which a projection can stretch its input. The dotted line is where training began.",
    ),
    Section(
        "spectral_entropy_heatmap",
        "Spectral entropy, layer by layer",
        "1 means that all singular values are equal, small values that a few directions carry the matrix. Shapes "
        "differ already at initialisation, so compare colours down a column, not across.",
    ),
    Section(
        "effective_rank_heatmap",
        "Effective rank, layer by layer",
        "The number of directions that a matrix uses, between 1 and its smaller side. A dark band that spreads would "
        "be rank collapse.",
    ),
    Section(
        "left_alignment_heatmap",
        "Alignment, layer by layer",
        "How far the update pushes along the weight's own five strongest output directions. Muon's update has nearly "
        "equal singular values, so its top five directions are nearly arbitrary: read it against chance.",
    ),
    Section(
        "left_alignment_over_time",
        "Alignment over time",
        "The same, averaged over layers. At the dotted line an update is no more aligned with the weight than two "
        "random subspaces would be.",
    ),
    Section(
        "effective_rank_over_time",
        "Effective rank over time",
        "Averaged over layers; the band spans the lowest to the highest layer. The dotted line is the value of the "
        "random initial weights, which depends on the shape alone.",
    ),
    Section(
        "singular_value_spectrum",
        "Singular values",
        "Every singular value of one layer, largest first. A flat line is an orthogonal matrix.",
    ),
)
TABLE_COLUMNS = (
    "run",
    "folder",
    "status",
    "learning rate",
    "updates",
    "tokens",
    "last val. loss",
    "best val. loss",
    "val. accuracy",
    "tokens/s",
    "training time",
)


def table_row(run: Run, label: str) -> list[str]:
    """The cells of `TABLE_COLUMNS` for one run."""
    steps, tokens = (int(run.train[key][-1]) if run.train else 0 for key in ("step", "tokens"))
    seconds = float(run.train["step_ms"].sum()) / 1e3 if run.train else 0.0
    return [
        label,
        run.name,
        run.status,
        f"{run.config.get('lr', math.nan):g} / {run.config.get('adamw_lr', math.nan):g}",
        f"{steps:,} of {run.config['steps']:,}",
        f"{tokens:,}",
        f"{run.val['val_loss'][-1]:.4f}",
        f"{np.nanmin(run.val['val_loss']):.4f}",
        f"{100 * run.val['val_accuracy'][-1]:.2f} %",
        f"{tokens / seconds:,.0f}" if seconds else "-",
        f"{seconds:.1f} s",
    ]


def findings(runs: Sequence[Run]) -> list[str]:
    """Sentences that say who won, by how much and at what cost, with what they rest on.

    Only finished runs of like settings are compared; an interval needs two seeds or more.
    """
    careful = [f"Careful: {run.name} is {run.status}, so it is left out of the comparison." for run in _open(runs)]
    runs = [run for run in runs if run.status == "finished"]
    for key in ("data_fingerprint", "model", "steps", "batch_tokens", "seq_len", "eval_tokens"):
        if len({run.config.get(key) for run in runs}) > 1:
            return [f"Careful: these runs differ in {key}, so their losses do not compare.", *careful]
    groups: dict[tuple, list[Run]] = {}
    for run in {run.path.resolve(): run for run in runs}.values():
        groups.setdefault((run.optimizer, run.config.get("lr"), run.config.get("adamw_lr")), []).append(run)
    sentences, means = [], {}
    for (optimizer, lr, _), members in groups.items():
        name = plots.OPTIMIZER_NAMES.get(optimizer, optimizer)
        if sum(key[0] == optimizer for key in groups) > 1:
            name += f" at {lr:g}"
        losses = {run.config["seed"]: float(run.val["val_loss"][-1]) for run in members}  # a repeated seed is no sample
        mean, low, high = t_interval(list(losses.values()))
        means[name] = (mean, members)
        spread = "single seed" if len(losses) < 2 else f"{len(losses)} seeds, 95 % [{low:.4f}, {high:.4f}]"
        sentences.append(f"{name}: final validation loss {mean:.4f} ({spread}).")
    if len(means) == 2:
        (better, (best, leaders)), (worse, (other, _)) = sorted(means.items(), key=lambda item: item[1][0])
        sentence = f"{better} ends {other - best:.4f} nats below {worse}"
        if any("single seed" in s for s in sentences):
            sentence += "; one seed each, so no statement about chance"
        sentences.append(sentence + ".")
        leader = min(leaders, key=lambda run: run.val["val_loss"][-1])
        updates = first_reaching(leader.val["step"], leader.val["val_loss"], other)
        seconds = first_reaching(leader.val["train_seconds"], leader.val["val_loss"], other)
        if updates is not None and seconds is not None:
            sentences.append(
                f"{better} is at {worse}'s final loss after about {math.ceil(updates)} of {leader.config['steps']} "
                f"updates, {seconds:.0f} s of training."
            )
    return sentences + careful


def _open(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.status != "finished"]


def check_out(out: Path) -> None:
    """BadInput where a report would be mixed with something else."""
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out}: is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "report.html").exists():
        raise BadInput(f"--out {out}: holds something that is no report; choose another folder")


def draw(runs: Sequence[Run], folder: Path) -> list[Section]:
    """Save every figure the runs have data for as folder/<stem>.png; returns what was drawn."""
    figures = [(CURVES, plots.loss_curves(runs))]
    watched = [run for run in runs if run.spectra]
    if watched:
        drawn = (
            plots.spectral_norm_by_depth(watched),
            plots.metric_heatmap(watched, "spectral_entropy"),
            plots.metric_heatmap(watched, "effective_rank"),
            plots.metric_heatmap(watched, "left_alignment"),
            plots.metric_over_time(watched, "left_alignment"),
            plots.metric_over_time(watched, "effective_rank"),
            plots.singular_value_spectrum(watched),
        )
        figures += zip(SPECTRA, drawn, strict=True)
    make_folder(folder, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for section, figure in figures:
        figure.savefig(folder / f"{section.stem}.png")
        plots.plt.close(figure)
    return [section for section, _ in figures]


def provenance_rows(runs: Sequence[Run]) -> list[list[str]]:
    keys = sorted({key for run in runs for key in run.config})
    return [[key, *(str(run.config.get(key)) for run in runs)] for key in keys]


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-size: 0.85rem; } th, td { padding: 0.25rem 0.7rem; text-align: left; }
th { border-bottom: 2px solid #888; } td { border-bottom: 1px solid #ddd; } img { max-width: 100%; }
.scroll { overflow-x: auto; } .reading { color: #555; } li { margin: 0.2rem 0; }
"""


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    return f'<div class="scroll"><table>\n{row(header, "th")}\n{body}\n</table></div>'


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def write_report(runs: Sequence[Run], out: Path) -> Path:
    """Draw the figures and write both pages; returns the path of report.html."""
    sections = draw(runs, out / "plots")
    names = plots.labels(runs)
    title = " and ".join(names) if len(names) <= 3 else f"{len(names)} runs"
    rows = [table_row(run, label) for run, label in zip(runs, names, strict=True)]
    facts, provenance = findings(runs), provenance_rows(runs)

    parts = [f"<h1>{html.escape(title)}</h1>", "<ul>", *(f"<li>{html.escape(s)}</li>" for s in facts), "</ul>"]
    parts.append(_html_table(TABLE_COLUMNS, rows))
    for section in sections:
        image = base64.b64encode((out / "plots" / f"{section.stem}.png").read_bytes()).decode()
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{image}">')
        parts.append(f'<p class="reading">{html.escape(section.how_to_read)}</p>')
    parts += ["<h2>Settings and provenance</h2>", _html_table(["", *names], provenance)]
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    page = f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>\n'
    (out / "report.html").write_text(page + "\n".join(parts) + "\n</body></html>\n", encoding="utf-8")

    text = [f"# {title}", "", *(f"- {s}" for s in facts), "", _markdown_table(TABLE_COLUMNS, rows), ""]
    for section in sections:
        image = f"![{section.title}](plots/{section.stem}.png)"
        text += [f"## {section.title}", "", image, "", section.how_to_read, ""]
    text += ["## Settings and provenance", "", _markdown_table(["", *names], provenance), ""]
    (out / "report.md").write_text("\n".join(text), encoding="utf-8")
    return out / "report.html"


@exit_with_a_sentence
def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    if not arguments.runs:
        raise BadInput("report.py: name at least one run folder")
    check_out(arguments.out)
    runs = [load_run(path) for path in arguments.runs]
    for run in runs:
        if not run.val:
            raise BadInput(f"{run.path}: has logged no validation yet")
    page = write_report(runs, arguments.out)
    for sentence in findings(runs):
        print(sentence)
    print(f"report: {page}")


if __name__ == "__main__":
    sys.exit(main())
