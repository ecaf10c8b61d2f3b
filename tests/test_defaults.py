"""Defaults that depend on the model: a run gets what `train.py --help` says, unless a flag says otherwise."""

import dataclasses
import json
import re

import pytest

import train
from engine.cli import BadInput
from engine.defaults import Defaults
from engine.ranks import Rank
from settings import Settings, resolve
from tests.test_cpu import TOKENS

SAID = re.compile(r"\(default: ([^()]*); nano ([^()]*)\)")
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
OVERRIDES = {"lr": 0.3, "adamw_lr": 0.2, "momentum": 0.6, "beta1": 0.5, "batch_tokens": 4096, "eval_tokens": 2048}


def said_of(field, text):
    """The numbers that a flag's help names as defaults, of the large models and of nano."""
    words = re.sub(r"[\s│]+", " ", text)
    found = SAID.search(words, words.index(f" --{field.replace('_', '-')} ")).groups()
    return [[float(number.replace(",", "")) for number in NUMBER.findall(part)] for part in found]


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Defaults)])
def test_a_run_gets_the_defaults_that_the_help_names(field, run_main, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = run_main(train.main, "--help")[1]
    for model, numbers in zip(("88m", "nano"), said_of(field, text), strict=True):
        optimizers = ("muon", "adamw")
        given = [Settings(model=model, optimizer=name, device="cpu", data=TOKENS, workers=1) for name in optimizers]
        found = [getattr(resolve(one, Rank())[0], field) for one in given]
        assert found == (numbers if field == "lr" else numbers * 2), model


def test_a_flag_beats_the_default():
    assert set(OVERRIDES) == {f.name for f in dataclasses.fields(Defaults)}
    s, *_ = resolve(Settings(model="nano", device="cpu", data=TOKENS, workers=1, **OVERRIDES), Rank())
    assert {field: getattr(s, field) for field in OVERRIDES} == OVERRIDES


def test_a_resumed_run_keeps_what_it_began_with_unless_its_config_is_damaged(tmp_path):
    (tmp_path / "run").mkdir()
    given = Settings(model="nano", device="cpu", data=TOKENS, workers=1, runs_dir=tmp_path, name="run", resume=True)
    for recorded, wanted in ((OVERRIDES, OVERRIDES), (dict.fromkeys(OVERRIDES, "1"), {"momentum": 0.85, "beta1": 0.7})):
        (tmp_path / "run" / "config.json").write_text(json.dumps(recorded))
        s, *_ = resolve(given, Rank())
        assert {field: getattr(s, field) for field in wanted} == wanted
    s, *_ = resolve(dataclasses.replace(given, momentum=0.3), Rank())
    assert s.momentum == 0.3
    (tmp_path / "run" / "config.json").write_text('{"momentum": 5.0}')
    with pytest.raises(BadInput, match=r"--momentum 5\.0: must be at least 0 and below 1"):
        resolve(given, Rank())
