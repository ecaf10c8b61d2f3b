"""The pages for readers: their links, files, commands and flags exist, and the README stays short."""

import importlib
import re

import pytest

from engine.files import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "runs/records/README.md", *sorted(ROOT.glob("docs/*.md"))]
WITH_SUBCOMMANDS = ("data", "experiments", "bench.record")
OF_TORCHRUN = {"--standalone", "--nproc_per_node", "--max-restarts", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
COMMAND = re.compile(
    r"\b(?:python|torchrun)\b[^`\n|;#&]*?\s(?:(?P<file>\w+)\.py|-m (?P<module>bench\.\w+))(?P<words>[^`\n|;#&]*)"
)

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def headings(text):
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(text):
    """(module, words after it) of every command of this project, lines ending in a backslash joined."""
    found = COMMAND.finditer(text.replace("\\\n", " "))
    return [(match["module"] or match["file"], match["words"].split()) for match in found]


@pytest.fixture(scope="module")
def helps():
    return {}


def flags_of(module, subcommand, helps, run_main):
    """The flags that `--help` of a command prints."""
    key = (module, *subcommand)
    if key not in helps:
        main = importlib.import_module("corpus.commands" if module == "data" else module).main
        code, said, _ = run_main(main, *subcommand, "--help")
        assert code == 0, key
        helps[key] = set(FLAG.findall(said))
    return helps[key]


def test_the_readme_has_fewer_than_200_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


@by_page
def test_every_link_leads_to_a_file_and_a_heading(page):
    links = re.findall(r"\]\(([^)\s#]*)#?([^)\s]*)\)", page.read_text())
    for path, anchor in links:
        if path.startswith("http"):
            continue
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in headings(target.read_text()), f"{path}#{anchor}"


@by_page
def test_every_file_and_folder_that_is_named_exists(page):
    text = page.read_text()
    named = set(re.findall(r"(?<![\w/.])(?:[\w.-]+/)*[\w-]+\.py\b", text)) | set(re.findall(r"`([a-z]+/)`", text))
    named -= {"plots/", "wandb/"}  # of a run or a report
    assert [name for name in sorted(named) if "NAME" not in name and not (ROOT / name).exists()] == []


@by_page
def test_every_command_exists_and_knows_its_flags(page, helps, run_main, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for module, words in commands(page.read_text()):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
        flags = set(FLAG.findall(" ".join(words)))
        deep = module in WITH_SUBCOMMANDS or words[:1] in (["compare"], ["evaluate"])
        if flags or (deep and words):
            assert flags <= flags_of(module, words[:1] if deep else [], helps, run_main), (module, words)


def test_every_flag_in_the_text_belongs_to_a_command(helps, run_main, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    texts = [page.read_text() for page in PAGES]
    known = set(OF_TORCHRUN)
    for module, words in {(module, tuple(words)) for text in texts for module, words in commands(text)}:
        deep = module in WITH_SUBCOMMANDS or words[:1] in (("compare",), ("evaluate",))
        if module != "bench.tune" and (words or not deep):  # which has no flags
            known |= flags_of(module, words[:1] if deep else (), helps, run_main)
    assert set(FLAG.findall("\n".join(texts))) <= known


@pytest.mark.parametrize(
    ("line", "module", "flags"),
    [
        ("`python train.py --modle nano`", "train", ["--modle"]),
        ("torchrun --nproc_per_node=2 train.py --model nano --reusme   # again", "train", ["--model", "--reusme"]),
        ("until python train.py --resume; do sleep 10; done", "train", ["--resume"]),
        ("python -m bench.soak --minutes 30", "bench.soak", ["--minutes"]),
        ("python data.py text A \\\n  --shares 1", "data", ["--shares"]),
    ],
)
def test_a_command_is_found_with_its_flags(line, module, flags):
    ((found, words),) = commands(line)
    assert (found, FLAG.findall(" ".join(words))) == (module, flags)
