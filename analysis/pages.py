"""A report as HTML and as Markdown: one `Page` of headings, tables, figures and lists -> two files with the same words.

    write_pages(page, Path("runs/report"))

The templates are in templates/. The HTML file holds its style and, unless it is linked to them, its pictures; it
reads well on a phone and on a wide screen. Every string of a page is text: HTML escapes it always, Markdown by its own
filters.
"""

import base64
import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import jinja2

from engine import files


@dataclass(frozen=True)
class Table:
    """Cells as text; a long table scrolls in a box of its own unless it is `whole`."""

    kind: ClassVar = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    whole: bool = False

    @classmethod
    def of(cls, rows: Sequence[dict[str, str]], whole: bool = False) -> "Table":
        """From rows of column -> cell, at least one, all with the same columns."""
        return cls(list(rows[0]), [list(row.values()) for row in rows], whole)


@dataclass(frozen=True)
class Picture:
    """A figure of plots/ with its heading and how to read it."""

    kind: ClassVar = "picture"
    stem: str
    title: str
    how_to_read: str

    @property
    def alt(self) -> str:
        """A sentence for those who cannot see it."""
        return f"{self.title}. {self.how_to_read.split('. ')[0].rstrip('.')}."


@dataclass(frozen=True)
class Section:
    """A heading with sentences."""

    kind: ClassVar = "section"
    title: str
    sentences: Sequence[str]


@dataclass(frozen=True)
class Code:
    kind: ClassVar = "code"
    lines: Sequence[str]

    @property
    def fence(self) -> str:
        """Longer than any run of backticks in the code, so that nothing in it ends the code."""
        return "`" * max(3, *(1 + len(ticks) for line in self.lines for ticks in re.findall("`+", line)), 3)


@dataclass(frozen=True)
class Chapter:
    """A folded one opens on a click."""

    title: str
    items: Sequence[Table | Picture | Section | Code]
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
    chapters: Sequence[Chapter] = field(default_factory=list)
    links: Sequence[tuple[str, str]] = ()  # words and the name of another page in the same folder


def number(value: float, form: str, unit: str = "") -> str:
    """A cell: the value in this form, "-" where there is none."""
    return f"{value:{form}}{unit}" if math.isfinite(value) else "-"


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _slug(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())


def _plain(text: str) -> str:
    """Text that Markdown cannot take for a tag, on one line."""
    return html.escape(text, quote=False).replace("\n", " ")


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=lambda name: name == "page.html",
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {"slug": _slug, "plain": _plain, "cell": lambda text: _plain(text).replace("|", "\\|")}


def _shown_width(png: bytes) -> int:
    """CSS pixels of a PNG file, 100 to an inch of the figure; half of its own where it does not tell its resolution."""
    pixels, place = int.from_bytes(png[16:20], "big"), png.find(b"pHYs", 0, png.find(b"IDAT"))
    per_metre = int.from_bytes(png[place + 4 : place + 8], "big") if place > 0 else 0
    return round(pixels * 100 / (0.0254 * per_metre)) if per_metre else pixels // 2


def html_page(page: Page, plots: Path, refresh_seconds: float | None = None, linked: bool = False) -> str:
    """The whole file; with `refresh_seconds` a browser reloads it that often; `linked` leaves pictures in plots/."""

    def source(stem: str) -> tuple[int, str]:
        """Width in CSS pixels and an address: of the PNG file, or the content of PNG or SVG, whichever is smaller."""
        png = (plots / f"{stem}.png").read_bytes()
        width = _shown_width(png)
        if linked:
            return width, f"plots/{stem}.png"
        svg = (plots / f"{stem}.svg").read_bytes()
        kind, content = min(("png", png), ("svg+xml", svg), key=lambda pair: len(pair[1]))
        return width, f"data:image/{kind};base64,{base64.b64encode(content).decode()}"

    seconds = refresh_seconds and max(1, round(refresh_seconds))
    return TEMPLATES.get_template("page.html").render(page=page, source=source, refresh_seconds=seconds)


def markdown_page(page: Page) -> str:
    """The same words, with links to the pictures in plots/."""
    return TEMPLATES.get_template("page.md").render(page=page)


def write_pages(
    page: Page, out: Path, refresh_seconds: float | None = None, name: str = "report", linked: bool = False
) -> Path:
    """Write out/<name>.md and out/<name>.html around the pictures in out/plots; returns the path of the latter, which
    holds the pictures unless it is `linked` to them."""
    html_text = html_page(page, out / "plots", refresh_seconds, linked)
    texts = {f"{name}.md": markdown_page(page), f"{name}.html": html_text}
    for file_name, text in texts.items():
        files.write_whole(out / file_name, lambda file, text=text: file.write(text.encode()))
    return out / f"{name}.html"
