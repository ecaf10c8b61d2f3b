"""The benchmark of a training next to other work: what it prints and writes; its figures are no test's affair."""

import json

import psutil

from bench import busy


def test_it_trains_in_turns_and_leaves_no_busy_process_behind(run_main, tmp_path):
    embedded = {"--data": "tests/data/before/tokens"}
    words = [word for pair in embedded.items() for word in pair]
    file = tmp_path / "busy.json"
    code, out, _ = run_main(busy.main, "--tokens", 2048, "--rounds", 1, "--json", file, *words)
    assert code == 0
    assert out.splitlines()[-1].startswith("keeps ")
    found = json.loads(file.read_text())
    assert found["kept"] == found["shared"][0] / found["alone"][0] > 0
    assert not [p for p in psutil.process_iter(["cmdline"]) if "while True: pass" in (p.info["cmdline"] or [])]


def test_a_training_that_is_refused_is_one_sentence(run_main, tmp_path):
    code, _, err = run_main(busy.main, "--tokens", 2048, "--data", tmp_path)
    assert code == 2
    assert err.startswith(f"error: {tmp_path}")
