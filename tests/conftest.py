"""Small shards, a small model, and a way to run the commands inside the test process."""

import os
import random
import signal
import sys

import pytest
from hypothesis import settings

import train
from analysis import plots
from corpus import build
from engine.workers import Crew

if os.environ.get("PTX_CAPABILITY"):  # the kernels' tests on compiled code
    from tests.compiled import on_compiled_code, pytest_collection_finish, pytest_terminal_summary  # noqa: F401 (hooks)

settings.register_profile("repeatable", derandomize=True, deadline=None)  # the same examples on every machine
settings.load_profile("repeatable")

SMALL_MODEL = (
    *("--model", "nano", "--layers", "2", "--d-model", "32", "--heads", "2", "--kv-heads", "1", "--d-ff", "64"),
    *("--seq-len", "32", "--batch-tokens", "256", "--micro-batch", "4", "--eval-tokens", "512", "--device", "cpu"),
    *("--workers", "1", "--threads", "1"),
)


def random_documents(count: int, seed: int = 0) -> list[str]:
    """Distinct documents of words that repeat, so that there is something to learn."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(200)]
    return [f"{i} " + " ".join(rng.choices(words, k=rng.randint(20, 200))) for i in range(count)]


@pytest.fixture(autouse=True)
def no_fork(monkeypatch):
    """A training inside the test process must not fork it: workers are tested in processes of their own."""
    monkeypatch.setattr(Crew, "fork", lambda crew: pytest.fail("a test forked the process of the tests"))


@pytest.fixture(scope="session")
def shards_folder(tmp_path_factory):
    """Shards of 400 random documents, vocabulary 320."""
    folder = tmp_path_factory.mktemp("shards") / "small"
    documents = random_documents(400)
    build.build_shards(lambda: iter(documents), folder, source="test", vocab_size=320, val_fraction=0.1)
    return folder


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Call a command's main() with arguments; returns (exit code, stdout, stderr)."""
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    }

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        capsys.readouterr()
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def ask_to_stop():
    """What a user's Ctrl-C or a scheduler's SIGTERM does to this process."""
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def no_drawing(monkeypatch):
    """Figures are made but written as stubs: drawing them takes most of a report's time."""

    def save(figure, folder, stem, formats=("png", "svg"), png_dpi=plots.PNG_DPI):
        for suffix in formats:
            (folder / f"{stem}.{suffix}").write_bytes(b"\x89PNG" + 60 * b"\0")
        plots.plt.close(figure)

    monkeypatch.setattr(plots, "save", save)


@pytest.fixture
def before_step(monkeypatch):
    """before_step(3, action) calls `action` when 3 steps are done and the next begins (None: before every step);
    returns how to take that back."""
    multiplier = train.lr_multiplier

    def install(done, action):
        def watched(step, *rest):
            if done is None or step == done:
                action()
            return multiplier(step, *rest)

        monkeypatch.setattr(train, "lr_multiplier", watched)
        return lambda: monkeypatch.setattr(train, "lr_multiplier", multiplier)

    return install


@pytest.fixture
def train_small(run_main, shards_folder, tmp_path, monkeypatch):
    """Train the small model into tmp_path/NAME; returns (exit code, folder, stdout, stderr)."""

    def call(name, *arguments, data_folder=shards_folder, plots=False):
        if not plots:  # they take longer than the run
            monkeypatch.setattr(train, "draw_plots", lambda folder: None)
            monkeypatch.setattr(train, "write_samples", lambda folder, device: None)
        where = ("--data", data_folder, "--runs-dir", tmp_path, "--name", name)
        code, out, err = run_main(train.main, *SMALL_MODEL, *where, *arguments)
        return code, tmp_path / name, out, err

    return call
