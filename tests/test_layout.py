"""Imports point one way: kernels <- engine <- corpus, analysis <- the files in the root <- suites, bench, tests."""

import ast
import subprocess

import pytest

from engine.files import ROOT

ROOT_FILES = frozenset(path.stem for path in ROOT.glob("*.py"))
FOLDERS = ("kernels", "engine", "corpus", "analysis", "suites", "ptx", "exported", "bench", "tests")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "engine": {"engine", "kernels"},
    "corpus": {"corpus", "engine"},
    "analysis": {"analysis", "engine"},
    "suites": {"suites", "analysis", "engine", "model", "settings"},
    "ptx": {"ptx"},
    "exported": set(),
    "root": {*ROOT_FILES, "kernels", "engine", "corpus", "analysis"},
    "bench": {*ROOT_FILES, "kernels", "engine", "corpus", "analysis", "suites", "ptx", "bench"},
}
COMMANDS_OF_SUITES = {"experiments"}  # the one file in the root that imports suites/
WITHOUT_TORCH = ("analysis", "engine/cli.py", "engine/files.py", "engine/identity.py", "report.py")


def imported(source: str) -> set[str]:
    """Every module that a file imports by an absolute name, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
    return found


def wrong_imports(path: str, source: str) -> set[str]:
    """The modules of this project that `path`, relative to the root, must not import."""
    place = path.split("/")[0] if "/" in path else "root"
    allowed = MAY_IMPORT[place] | ({"suites"} if path.removesuffix(".py") in COMMANDS_OF_SUITES else set())
    ours = {module for module in imported(source) if module.split(".")[0] in ROOT_FILES.union(FOLDERS)}
    return {module for module in ours if module.split(".")[0] not in allowed}


def project_files() -> list[str]:
    listed = subprocess.run(("git", "ls-files", "*.py"), cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for path in listed.stdout.splitlines() if not path.startswith("tests/") and (ROOT / path).exists()]


def test_every_import_follows_the_direction_rule():
    wrong = {path: wrong_imports(path, (ROOT / path).read_text()) for path in project_files()}
    assert {path: modules for path, modules in wrong.items() if modules} == {}


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("kernels/symmetric.py", "from engine.files import ROOT"),
        ("kernels/symmetric.py", "import kernels_extra, model"),
        ("engine/step.py", "from model import Transformer"),
        ("corpus/build.py", "    import data"),
        ("analysis/plots.py", "import report"),
        ("analysis/plots.py", "from suites import results"),
        ("suites/report.py", "def f():\n    import train"),
        ("train.py", "from bench import machine"),
        ("model.py", "from suites.catalog import SUITES"),
        ("bench/fuzz.py", "from tests.conftest import SMALL_MODEL"),
        ("ptx/launch.py", "from kernels import symmetric"),
        ("ptx/launch.py", "import bench.cycles"),
        ("exported/modeling_muon_speedrun.py", "from model import ACTIVATIONS"),
    ],
)
def test_a_wrong_import_is_found(path, line):
    source = line if line.startswith("def") else f"if True:\n    {line.strip()}"
    assert wrong_imports(path, source)


def test_the_root_holds_the_files_of_the_layout():
    eight = {"train", "settings", "model", "optim", "data", "metrics", "report", "experiments"}
    assert eight <= ROOT_FILES <= eight | {"sample", "export"}


@pytest.mark.parametrize("folder", ["kernels", "ptx"])
def test_what_can_be_used_alone_imports_itself_by_relative_names(folder):
    for path in (ROOT / folder).glob("*.py"):
        assert folder not in {module.split(".")[0] for module in imported(path.read_text())}, path


def test_reports_start_without_torch():
    """Read by ast what a report's files import, and what those import, and find no torch."""
    waiting = [path for path in project_files() if path.startswith(WITHOUT_TORCH)]
    assert len(waiting) > 10
    seen = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for module in imported((ROOT / path).read_text()):
            assert module.split(".")[0] != "torch", path
            inside = (module.replace(".", "/") + ".py", f"{module.split('.')[0]}.py")
            waiting += [file for file in inside if (ROOT / file).exists()]


def test_every_text_file_is_utf_8_whatever_the_locale():
    """Path.read_text, write_text and open without an encoding follow the locale; only bytes and sockets need none."""
    bare = []
    for path in project_files():
        for call in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func).rpartition(".")[2]
            words = [word.value for word in call.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
            text = name in ("read_text", "write_text") or (name == "open" and set(words) & {"r", "w", "a", "x"})
            if text and "encoding" not in {keyword.arg for keyword in call.keywords}:
                bare.append(f"{path}:{call.lineno}")
    assert bare == []
