"""A report as HTML and as Markdown: one `Page` of headings, tables, figures and lists -> two files with the same words.

    html_page(page, folder); markdown_page(page)

The HTML file holds its pictures and its style and asks for nothing else; it reads well on a phone and on a wide screen.
"""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Table:
    """Cells as text; a long table scrolls in a box of its own unless it is `whole`."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    whole: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure of plots/ with its heading, a sentence for those who cannot see it and how to read it."""

    stem: str
    title: str
    alt: str
    how_to_read: str


@dataclass(frozen=True)
class Verse:
    """A heading with sentences."""

    title: str
    sentences: Sequence[str]


@dataclass(frozen=True)
class Code:
    lines: Sequence[str]


@dataclass(frozen=True)
class Part:
    """A chapter; a folded one opens on a click."""

    title: str
    items: Sequence[Table | Picture | Verse | Code]
    folded: bool = False


@dataclass(frozen=True)
class Page:
    """A report: the first screen, then chapters."""

    title: str
    headline: str
    lead: Sequence[str]
    tiles: Sequence[tuple[str, str]]
    summary: Table
    notes: Sequence[str]
    warnings: Sequence[str]
    parts: Sequence[Part] = field(default_factory=list)


STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: #1d2126;
  background: #fff; max-width: 68rem; margin: 0 auto; padding: 1.2rem 1rem 4rem; overflow-wrap: break-word; }
h1 { font-size: clamp(1.3rem, 1rem + 1.6vw, 1.9rem); line-height: 1.25; margin: 0.2rem 0 0.6rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 0.6rem; padding-top: 0.9rem; border-top: 1px solid #d5d9de; }
h3 { font-size: 1.05rem; margin: 1.8rem 0 0.3rem; }
p { margin: 0.45rem 0; max-width: 48rem; }
ul { padding-left: 1.2rem; margin: 0.4rem 0; } li { margin: 0.25rem 0; max-width: 48rem; }
.kicker { color: #59626d; font-size: 0.85rem; margin: 0; }
.warn { border-left: 4px solid #D55E00; background: #fff6f0; padding: 0.5rem 0.8rem; margin: 0.8rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 0.6rem; margin: 1rem 0; }
.tile { border: 1px solid #d5d9de; border-radius: 0.4rem; padding: 0.55rem 0.75rem; }
.tile b { display: block; font-size: 1.2rem; } .tile span { color: #59626d; font-size: 0.82rem; line-height: 1.3;
  display: block; }
.scroll { overflow: auto; max-height: 34rem; margin: 0.7rem 0; border: 1px solid #e3e6ea; border-radius: 0.3rem; }
.scroll.whole { max-height: none; }
table { border-collapse: collapse; font-size: 0.85rem; min-width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.32rem 0.7rem; text-align: left; white-space: nowrap; }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 14rem; }
.whole td { white-space: normal; } .whole td.long { min-width: 12rem; }
th { position: sticky; top: 0; background: #f2f4f6; } tr + tr td { border-top: 1px solid #e9ecef; }
figure { margin: 0.6rem 0 0; } .picture { overflow-x: auto; } img { display: block; max-width: 100%; height: auto; }
figcaption { color: #454d57; font-size: 0.93rem; max-width: 48rem; margin-top: 0.3rem; }
pre { font: 0.8rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; padding: 0.7rem; margin: 0; }
nav { display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; font-size: 0.9rem; margin: 1rem 0; } a { color: #005a8f; }
summary { cursor: pointer; font-size: 1.3rem; font-weight: 700; margin-top: 2rem; padding-top: 0.9rem;
  border-top: 1px solid #d5d9de; }
@media (max-width: 46rem) { img { max-width: none; width: 46rem !important; } }
@media print { .scroll { max-height: none; } details > * { display: block; } }
"""


def _slug(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())


def html_page(page: Page, plots: Path, refresh_seconds: float | None = None) -> str:
    """The whole file; with `refresh_seconds` a browser loads it again that often."""
    escape = html.escape
    refresh = f'<meta http-equiv="refresh" content="{max(1, round(refresh_seconds))}">' if refresh_seconds else ""
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}',
        f"<title>{escape(page.title)}</title><style>{STYLE}</style></head>\n<body>\n<header>",
        f'<p class="kicker">{escape(page.title)}</p>',
        f"<h1>{escape(page.headline)}</h1>",
        *(f"<p>{escape(sentence)}</p>" for sentence in page.lead),
    ]
    if page.tiles:
        tiles = "".join(f'<div class="tile"><b>{escape(b)}</b><span>{escape(s)}</span></div>' for b, s in page.tiles)
        parts.append(f'<div class="tiles">{tiles}</div>')
    parts += [_html_table(page.summary), _html_list(page.notes)]
    parts += [f'<p class="warn">{escape(warning)}</p>' for warning in page.warnings]
    links = "".join(f'<a href="#{_slug(part.title)}">{escape(part.title)}</a>' for part in page.parts)
    parts.append(f"<nav>{links}</nav></header>")
    for part in page.parts:
        inside = "\n".join(_html_item(item, plots) for item in part.items)
        heading, identity = escape(part.title), _slug(part.title)
        if part.folded:
            parts.append(f'<details id="{identity}"><summary>{heading}</summary>\n{inside}\n</details>')
        else:
            parts.append(f'<section><h2 id="{identity}">{heading}</h2>\n{inside}\n</section>')
    return "\n".join(parts) + "\n</body></html>\n"


def _html_item(item: Table | Picture | Verse | Code, plots: Path) -> str:
    if isinstance(item, Table):
        return _html_table(item)
    if isinstance(item, Verse):
        return f"<h3>{html.escape(item.title)}</h3>\n{_html_list(item.sentences)}"
    if isinstance(item, Code):
        return f'<div class="scroll"><pre>{html.escape(chr(10).join(item.lines))}</pre></div>'
    width, source = _embedded(plots, item.stem)
    return (
        f'<figure><h3>{html.escape(item.title)}</h3><div class="picture"><img alt="{html.escape(item.alt)}" '
        f'style="width:{width}px" src="{source}"></div>'
        f"<figcaption>{html.escape(item.how_to_read)}</figcaption></figure>"
    )


def _embedded(plots: Path, stem: str) -> tuple[int, str]:
    """Width in CSS pixels and a data address: of the PNG or the SVG file, whichever is smaller."""
    png, svg = (plots / f"{stem}.png").read_bytes(), (plots / f"{stem}.svg").read_bytes()
    width = int.from_bytes(png[16:20], "big") // 2  # PNG files are drawn at twice the size at which they are shown
    kind, content = min(("png", png), ("svg+xml", svg), key=lambda pair: len(pair[1]))
    return width, f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _html_list(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    return "<ul>" + "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        marks = [' class="long"' if tag == "td" and len(cell) > 60 else "" for cell in cells]
        inside = "".join(f"<{tag}{mark}>{html.escape(cell)}</{tag}>" for mark, cell in zip(marks, cells, strict=True))
        return f"<tr>{inside}</tr>"

    body = "\n".join(row(cells, "td") for cells in table.rows)
    kind = "scroll whole" if table.whole else "scroll"
    return f'<div class="{kind}"><table>\n{row(table.header, "th")}\n{body}\n</table></div>'


def markdown_page(page: Page) -> str:
    """The same words, with links to the pictures in plots/."""
    lines = [f"# {_plain(page.headline)}", "", *(f"{_plain(sentence)}\n" for sentence in page.lead)]
    lines += [_markdown_table(page.summary), ""]
    lines += [f"- {_plain(note)}" for note in page.notes] + [""]
    lines += [f"> {_plain(warning)}\n" for warning in page.warnings]
    for part in page.parts:
        lines += [f"## {_plain(part.title)}", ""]
        for item in part.items:
            if isinstance(item, Table):
                lines += [_markdown_table(item), ""]
            elif isinstance(item, Verse):
                lines += [
                    f"### {_plain(item.title)}",
                    "",
                    *(f"- {_plain(sentence)}" for sentence in item.sentences),
                    "",
                ]
            elif isinstance(item, Code):
                fence = _fence(item.lines)
                lines += [fence, *item.lines, fence, ""]
            else:
                picture = f"![{_plain(item.alt)}](plots/{item.stem}.png)"
                lines += [f"### {_plain(item.title)}", "", picture, "", _plain(item.how_to_read), ""]
    return "\n".join(lines)


def _markdown_table(table: Table) -> str:
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join("| " + " | ".join(_markdown_cell(cell) for cell in line) + " |" for line in lines)


def _fence(lines: Sequence[str]) -> str:
    """Longer than any run of backticks in the code, so that nothing in it ends the code."""
    return "`" * max(3, *(1 + len(ticks) for line in lines for ticks in re.findall("`+", line)), 3)


def _plain(text: str) -> str:
    return html.escape(text, quote=False).replace("\n", " ")


def _markdown_cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")
