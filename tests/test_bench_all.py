"""The whole-machine benchmark: no part stops the rest, goals are judged where they apply, wrong kernels are named."""

import dataclasses
import json
import os
import re
import sys
from pathlib import Path

import psutil
import pytest
import torch

from bench import all as bench_all
from bench import correct, machine, record, record_pages
from bench import speedrun as short
from bench.all import BenchmarkPart, Plan
from engine import defaults
from tests.test_record import in_this_process


class Script(BenchmarkPart):
    """A part that runs Python words; {out} in them is its JSON file."""

    def command(self, plan, result):
        return ["-c", self.flags(plan).replace("{out}", str(result))]


def script(name, words, module="bench.correct", needs=(), share=1.0):
    rows = lambda found, cuda: [bench_all.row(name, found["value"])]  # noqa: E731 (it needs the name)
    return Script(name, module, share, lambda plan: words, rows, needs)


WRITES = "import json; json.dump({'value': 2.5}, open('{out}', 'w'))"


def run_parts(run_main, monkeypatch, tmp_path, *chosen, minutes=1.0):
    monkeypatch.setattr(bench_all, "LEAST_SECONDS", 1.0)
    for module in (bench_all, record):
        monkeypatch.setattr(module, "parts", lambda cuda: list(chosen))
    code, out, _ = run_main(bench_all.main, "--minutes", minutes, "--out", tmp_path / "out")
    return code, out, json.loads((tmp_path / "out" / "bench.json").read_text())


def test_a_part_that_fails_is_cut_or_lacks_something_stops_nothing(run_main, monkeypatch, tmp_path):
    code, out, bench = run_parts(
        run_main,
        monkeypatch,
        tmp_path,
        script("good", WRITES),
        script("broken", "print('first'); raise SystemExit('the reason')"),
        script("silent", "pass"),
        script("absent", WRITES, module="bench.not_there"),
        script("poor", WRITES, needs=("json", "no_such_package")),
        script("odd", "open('{out}', 'w').write('{}')"),
        script("nan", "open('{out}', 'w').write('{\"value\": NaN}')"),
        script("late but whole", WRITES + "; import time; time.sleep(60)"),
        script("says where it is", f"raise SystemExit({str(bench_all.ROOT / 'here.py')!r})"),
        script("last", WRITES, share=4.0),
        minutes=0.3,
    )
    states = {done["name"]: done["state"] for done in bench["parts"]}
    assert code == 0
    assert states["good"] == states["last"] == "done"
    assert states["broken"] == "failed: the reason"
    assert states["silent"] == "failed: it wrote no figures"
    assert states["absent"] == "skipped: bench.not_there is missing"
    assert states["poor"] == "skipped: needs no_such_package"
    assert states["odd"].startswith("failed: its figures are not as expected (KeyError")
    assert states["nan"].startswith("failed: ")
    assert states["late but whole"].startswith("cut after ")
    table = {row["figure"]: row for row in bench["rows"]}
    assert table["good"]["ours"] == table["late but whole"]["ours"] == 2.5
    assert table["absent"]["goal"] == states["absent"]
    assert str(bench_all.ROOT) not in (tmp_path / "out" / "bench.json").read_text()
    for row in bench["rows"]:
        assert f"\n{row['figure']} " in out
    wrong = bench_all.row("kernels", 1, met=False)
    monkeypatch.setattr(bench_all, "rows_of", lambda part, done, cuda: [wrong])
    assert run_parts(run_main, monkeypatch, tmp_path, script("good", WRITES))[0] == 1
    assert run_parts(run_main, monkeypatch, tmp_path, script("no figures", "pass"))[0] == 1
    assert bench["machine"]["device"] == "cpu" or torch.cuda.is_available()
    assert {"driver", "torch_version", "git_commit", "date", "sm_clock_mhz"} <= bench["machine"].keys()


def test_what_is_known_is_written_before_the_next_part_starts(run_main, monkeypatch, tmp_path):
    looks = f"found = __import__('json').load(open({str(tmp_path / 'out' / 'bench.json')!r})); "
    looks += "assert found['rows'][0]['ours'] == 2.5 and found['parts'][0]['state'] == 'done'; "
    looks += f"assert '| first |' in open({str(tmp_path / 'out' / 'README.md')!r}).read(); "
    *_, bench = run_parts(run_main, monkeypatch, tmp_path, script("first", WRITES), script("second", looks + WRITES))
    assert [done["state"] for done in bench["parts"]] == ["done", "done"]
    faults = record.check(tmp_path / "out")  # but for the commit, which may have changes while one works on this
    assert all("one commit without changes" in fault for fault in faults)
    whole = (tmp_path / "out" / "bench.json").read_text()
    assert whole.count('"ours": 2.5') == 2
    (tmp_path / "out" / "bench.json").write_text(whole.replace('"ours": 2.5', '"ours": 9.5', 1))
    assert "its table is not what its parts found" in record.check(tmp_path / "out")[0]
    (tmp_path / "out" / "bench.json").write_text(whole)
    text = (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "out" / "README.md").write_text(text.replace("2.50", "2.51"))
    assert "is not what its JSON gives" in record.check(tmp_path / "out")[0]


def test_without_time_nothing_is_started_and_with_little_the_later_parts_are_not(run_main, monkeypatch, tmp_path):
    sleeps = script("sleeps", "import time; time.sleep(60)")
    *_, bench = run_parts(run_main, monkeypatch, tmp_path, sleeps, script("never", WRITES), minutes=0.06)
    for done, state in zip(bench["parts"], ("cut after ", "not started: "), strict=True):
        assert done["state"].startswith(state)
    code, _, err = run_main(bench_all.main, "--minutes", 0, "--out", tmp_path / "other")
    assert (code, err) == (2, "error: --minutes 0.0: must be a positive number\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert "holds files that are not of a benchmark" in run_main(bench_all.main, "--out", tmp_path / "mine")[2]
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_cores_that_others_use_get_no_threads(run_main, monkeypatch, tmp_path):
    described = {"cores": 8, "busy_cores": 2.6}
    assert bench_all.free_threads(described) == 5
    assert bench_all.free_threads(described | {"busy_cores": 0.2}) == 8
    assert bench_all.free_threads(described | {"busy_cores": None}) == 8
    assert bench_all.free_threads(described | {"cores": 2}) == 1
    monkeypatch.setattr(bench_all, "free_threads", lambda described: 3)
    counts = "import os, json; json.dump({'value': int(os.environ['OMP_NUM_THREADS'])}, open('{out}', 'w'))"
    *_, bench = run_parts(run_main, monkeypatch, tmp_path, script("threads", counts))
    assert bench["rows"][0]["ours"] == bench["threads"] == 3


def test_work_on_our_own_cores_is_counted(monkeypatch):
    percents = [100.0, 0.0, 100.0, 50.0]  # of all cores of the machine
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: percents if percpu else 62.5)
    for ours, busy in (({0, 1, 2, 3}, 2.5), ({1, 3}, 0.5), ({2}, 1.0), ({4}, None)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, ours=ours: ours)
        assert machine.busy_cores() == busy
        assert machine.cores() == len(ours)


def test_a_machine_is_described_and_what_cannot_be_learned_is_null(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    described = machine.describe()
    assert {"driver", "sm_clock_mhz", "cpu", "cpu_mhz", "cores", "busy_cores", "git_commit"} <= described.keys()
    assert described["cores"] == len(os.sched_getaffinity(0))
    assert 0 <= described["busy_cores"] <= described["cores"]
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    assert found is None or described["cpu"] == found[1]
    assert machine.label(described) == f"{described['cores']} CPU cores ({described['cpu']})"
    monkeypatch.setattr(machine, "_installed", lambda package: None)
    monkeypatch.setitem(sys.modules, "psutil", None)  # not installed
    assert machine.busy_cores() is machine.cpu_mhz() is None


def test_rows_compare_the_right_way_round():
    faster = bench_all.row("time", 2.0, "us", peer=3.0, floor=1.0)
    assert (faster["ratio"], faster["share"]) == (1.5, 0.5)
    slower = bench_all.row("rate", 2.0, "tokens/s", peer=4.0, floor=8.0, more_is_better=True)
    assert (slower["ratio"], slower["share"]) == (0.5, 0.25)
    nothing = bench_all.row("lacking", None, peer=4.0, floor=8.0)
    assert (nothing["ratio"], nothing["share"]) == (None, None)
    cells = record_pages.bench_cells(bench_all.row("x", 1234.5, "us", 0.01234, "theirs", 20.0, "≥ 1x", False))
    assert cells == ["x", "1,234 us", "0.0123 (theirs)", "0.00x", "20.0", "1.6%", "≥ 1x", "**no**"]


def training(device, model, muon, plain):
    names = ("ours, muon", "ours, adamw", "baseline, muon", "baseline, adamw")
    rows = [
        {"candidate": name, "tokens_per_second": rate, "light_share": 0.5}
        for name, rate in zip(names, (muon, 110_000.0, plain, 100_000.0), strict=True)
    ]
    around = {"spectra_blocked_share": 0.004, "loader_share": None}
    return {"device": device, "model": model, "batch_tokens": 16_384, "rows": rows, "surroundings": around}


def test_goals_are_judged_on_the_machine_they_are_for_and_only_there():
    found = training("NVIDIA GeForce RTX 4090", "88m", 103_000.0, 90_000.0)
    rows = {row["figure"].split(",")[-1].strip(): row for row in bench_all.train_rows(found, cuda=True)}
    assert (rows["best kernels"]["ours"], rows["best kernels"]["met"]) == (103_000, True)
    slower = training("NVIDIA GeForce RTX 4090", "88m", 101_000.0, 90_000.0)
    assert bench_all.train_rows(slower, cuda=True)[3]["met"] is False
    assert bench_all.train_rows(training("NVIDIA H200", "88m", 900_000.0, 9e4), cuda=True)[3]["met"] is None
    assert rows["training held up by spectra"]["met"] is True
    assert rows["training with Muon against AdamW"]["met"] is True  # 103 / 110 = 0.936
    muon = bench_all.train_rows(found, cuda=True)[0]
    assert (muon["ratio"], muon["floor"], muon["met"]) == (pytest.approx(103 / 90), 206_000, True)
    assert {row["met"] for row in bench_all.train_rows(training("cpu", "nano", 9e3, 9e3), cuda=False)} == {None}
    seconds = {"eigenproblems": [7.0, 9.0, 7.5], "svd": [16.0, 16.0, 16.0]}
    assert bench_all.spectra_rows({"model": "88m", "seconds": seconds}, cuda=False)[0]["met"] is True
    assert bench_all.spectra_rows({"model": "nano", "seconds": seconds}, cuda=False)[0]["met"] is None
    slow = seconds | {"eigenproblems": [8.5, 8.5, 8.5]}
    assert bench_all.spectra_rows({"model": "88m", "seconds": slow}, cuda=False)[0]["met"] is False
    experts = {"model": "moe-79m", "median_us": {"grouped": 10.0, "loop": 19.0}}
    assert [bench_all.experts_rows(experts, cuda)[0]["met"] for cuda in (True, False)] == [False, None]
    loader = {
        "loader_tokens_per_second": 7.6e6,
        "loader_goal": 7.5e6,
        "first_batch_seconds": 1.0,
        "first_batch_goal": 1.0,
    }
    assert [row["met"] for row in bench_all.loader_rows(loader, cuda=False)] == [True, None, False, None]


def test_a_wrong_kernel_is_named_and_one_that_cannot_run_too(run_main, monkeypatch, tmp_path):
    true = correct.gram
    chosen = [case for case in correct.cases(torch.device("cpu")) if case.name in ("gram", "matmul_add")]
    monkeypatch.setattr(correct, "cases", lambda device: chosen)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_main(correct.main)[0] == 0
    monkeypatch.setattr(correct, "gram", lambda X: 1.0001 * true(X))

    def refuses(*tensors):
        raise RuntimeError("no such instruction\non this device")

    monkeypatch.setattr(correct, "matmul_add", refuses)
    code, out, _ = run_main(correct.main, "--json", tmp_path / "cases.json")
    assert code == 1
    assert out.count("WRONG") == 4
    assert "error no such instruction of" in out
    found = json.loads((tmp_path / "cases.json").read_text())
    row = bench_all.correct_rows(found, cuda=False)[0]
    assert (row["ours"], row["met"]) == (0, False)
    assert row["figure"].endswith("wrong: gram, matmul_add")


def test_every_kernel_is_right_here():
    rows = [correct.measure(case) for case in correct.cases(torch.device("cpu"))]
    assert {row["kernel"] for row in rows if row["right"]} == {row["kernel"] for row in rows}
    assert len({row["kernel"] for row in rows}) == 10
    assert all(row["right"] for row in rows)


def test_the_short_speedrun_trains_both_and_counts_its_time(run_main, monkeypatch, tmp_path, shards_folder):
    said = []

    def run(file, *words):
        said.append(words)
        job = type("Job", (), {"command": lambda self: ["python", "train.py", *map(str, words)]})()
        in_this_process([job], [{}])

    monkeypatch.setattr(short, "run", run)
    monkeypatch.setattr(short, "shards_for", lambda model, out: shards_folder)
    monkeypatch.setattr(short.report, "write_report", lambda runs, out, only: out / "report.html")
    monkeypatch.setattr(defaults, "SMALL", dataclasses.replace(defaults.SMALL, batch_tokens=256))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ("--model", "nano", "--seconds", 90, "--tokens-per-second", 80, "--out", tmp_path)
    code, out, _ = run_main(short.main, *words, "--json", tmp_path / "short.json")
    assert code == 0
    assert "AdamW" in out
    assert [words[words.index("--optimizer") + 1] for words in said] == ["muon", "adamw"]
    found = json.loads((tmp_path / "short.json").read_text())
    assert found["tokens"] == 6 * 256  # 80 tokens/s for half of the 40 s that starts and report leave
    rows = bench_all.speedrun_rows(found, cuda=False)
    muon = found["figures"]["optimizers"]["muon"]["best_val_loss"]["mean"]
    assert (rows[0]["ours"], rows[0]["met"]) == (muon, None)  # so few tokens rank nobody


def test_every_part_names_a_module_that_is_there_or_the_loader(tmp_path):
    for cuda in (True, False):
        for part in bench_all.parts(cuda):
            words = part.command(Plan(cuda, 100.0, tmp_path), tmp_path / "x.json")
            assert words[:2] == ["-m", part.module]
            assert words[-2:] == ["--json", str(tmp_path / "x.json")]
            assert part.module == "bench.data" or bench_all.find_spec(part.module)
