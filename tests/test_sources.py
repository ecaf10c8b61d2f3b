"""Sources over connections that break: no document is lost or repeated, and an absent hub ends the build."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from corpus import sources
from corpus.sources import TEXT
from engine.cli import BadInput
from tests.conftest import random_documents
from tests.hub import Hub
from tests.test_build import ROOT, documents_of


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on loopback and a command in its own process, since huggingface_hub reads the hub's address on import."""
    folder = tmp_path / "hub"
    folder.mkdir()

    def command(address, *words):
        script = "import sys, time; from corpus import commands; time.sleep = lambda _: None; sys.exit(commands.main())"
        env = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        words = [sys.executable, "-c", script, *map(str, words)]
        return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=200)

    return folder, command


def test_a_hub_that_drops_connections_loses_and_repeats_nothing(hub, tmp_path):
    import pandas

    folder, command = hub
    texts = random_documents(3000)
    pandas.DataFrame({"text": texts[:2000]}).to_parquet(folder / "a.parquet", row_group_size=100)
    pandas.DataFrame({"text": texts[2000:]}).to_parquet(folder / "b.parquet", row_group_size=100)
    with Hub(folder, drops=6) as server:
        done = command(server.address, "hf", "me/data", "--out", tmp_path / "s", "--vocab-size", 300)
        assert done.returncode == 0, done.stderr
        assert server.dropped == 6
    assert sorted(documents_of(tmp_path / "s")) == sorted(texts)


def test_a_hub_that_is_not_there_is_one_sentence(hub, tmp_path):
    _, command = hub
    done = command("http://127.0.0.1:9", "hf", "me/data", "--out", tmp_path / "s", "--vocab-size", 300)
    assert done.returncode == 2
    assert "cannot be reached" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("s*"))


class Flaky:
    """A dataset that raises a network error after every few rows."""

    def __init__(self, rows, every):
        self.rows, self.every, self.at = rows, every, 0

    def load_state_dict(self, state):
        self.at = state["at"]

    def state_dict(self):
        return {"at": self.at}

    def __iter__(self):
        for count, row in enumerate(self.rows[self.at :]):
            if count == self.every:
                raise ConnectionResetError("gone")
            self.at += 1
            yield {"text": row}


def test_rows_continue_where_the_connection_broke(monkeypatch):
    waits = []
    monkeypatch.setattr(sources.time, "sleep", waits.append)
    rows = [str(i) for i in range(40)]
    reader = sources.Rows(lambda: Flaky(rows, 7), TEXT, "flaky").open()
    read, places = [], []
    for row in reader:
        read.append(row)
        if len(read) % 5 == 0:
            places.append((len(read), reader.position()))
    assert read == rows
    assert waits == [1] * len(waits) != []
    for count, place in places:
        assert list(sources.Rows(lambda: Flaky(rows, 100), TEXT, "whole").open(place)) == rows[count:]


def test_a_connection_that_stays_lost_ends_after_growing_waits(monkeypatch):
    waits = []
    monkeypatch.setattr(sources.time, "sleep", waits.append)

    class Dead(Flaky):
        def __iter__(self):
            yield from super().__iter__()
            raise ConnectionResetError("gone")

    with pytest.raises(BadInput, match="connection lost"):
        list(sources.Rows(lambda: Dead(["a", "b"], 1), TEXT, "dead").open())
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    with pytest.raises(BadInput, match="cannot be reached"):
        list(sources.Rows(lambda: Dead([], 0), TEXT, "dead").open())


def test_datasets_are_opened_one_at_a_time():
    """When `datasets` opens several at once, tqdm's lock sometimes vanishes."""
    inside = []

    def load():
        inside.append(1)
        time.sleep(0.05)
        assert len(inside) == 1
        inside.pop()
        return Flaky(["a"], 9)

    readers = [sources.Rows(load, TEXT, "slow").open() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(list, readers)) == [["a"]] * 4


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?", "a::b"])
def test_a_folder_whose_name_datasets_takes_for_a_pattern_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "x.jsonl").write_text('{"text": "mine"}\n')
    with pytest.raises(BadInput, match=r"for a pattern; use python data\.py text"):
        sources.hub_dataset(str(tmp_path / name), None, "train", TEXT)


def test_a_cache_that_cannot_be_written_is_blamed(hub, tmp_path):
    (tmp_path / "home").touch()  # where HF_HOME is to be
    _, command = hub
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.jsonl").write_text('{"text": "mine"}\n')
    done = command("http://127.0.0.1:9", "hf", tmp_path / "data", "--out", tmp_path / "s", "--vocab-size", 300)
    assert done.returncode == 2
    assert "set HF_HOME to a folder that can be written" in done.stderr.splitlines()[-1]
