"""What a CPU is prepared for, which cores are free, and when compiling pays."""

import json
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch

from engine import compiling, cores, cpu
from engine.cli import BadInput
from engine.files import ROOT
from engine.ranks import Rank
from kernels.matmul_add import matmul_add_reference
from settings import Settings, chosen_kernels, chosen_workers, config_before, resolve

TOKENS = ROOT / "tests" / "data" / "before" / "tokens"


@pytest.fixture
def idle(monkeypatch):
    """Four cores that nobody uses; returns how to keep some of them busy."""
    shares = [0.0] * 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(cores, "_quota", lambda: float("inf"))
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds, percpu: list(shares))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return lambda *busy: shares.__setitem__(slice(0, len(busy)), busy)


def test_free_cores_are_those_allowed_and_not_busy(idle, monkeypatch):
    assert cores.free_cores() == 4
    idle(100.0, 30.0, 10.0)
    assert cores.free_cores() == 3
    idle(100.0, 100.0, 100.0, 100.0)
    assert cores.free_cores() == 1
    idle(0.0, 0.0, 0.0, 0.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert cores.free_cores() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "none")
    monkeypatch.setattr(cores, "_quota", lambda: 2.5)
    assert cores.free_cores() == 2
    monkeypatch.setattr(cores, "_quota", lambda: 0.5)
    assert cores.free_cores() == 1
    monkeypatch.setattr(cores, "_quota", lambda: float("inf"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 3}, raising=False)
    idle(100.0, 0.0, 100.0, 0.0)  # others work where this process may not
    assert cores.free_cores() == 2


def test_a_busy_moment_is_looked_at_again(idle, monkeypatch):
    looks = [[90.0] * 4, [0.0] * 4]
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds, percpu: looks.pop(0))
    assert cores.free_cores() == 4
    assert not looks


def test_the_quota_is_the_least_of_the_group_and_those_around_it(tmp_path):
    own = tmp_path / "cgroup"
    inner = tmp_path / "root" / "outer" / "inner"
    inner.mkdir(parents=True)
    own.write_text("0::/outer/inner\n")
    assert cores._quota(tmp_path / "root", own) == float("inf")
    (inner / "cpu.max").write_text("max 100000\n")
    assert cores._quota(tmp_path / "root", own) == float("inf")
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    assert cores._quota(tmp_path / "root", own) == 1.5
    (inner / "cpu.max").write_text("50000 100000\n")
    assert cores._quota(tmp_path / "root", own) == 0.5
    assert cores._quota(tmp_path / "root", tmp_path / "absent") == float("inf")


@pytest.fixture
def products():
    before = torch.backends.mkldnn.matmul.fp32_precision
    yield torch.backends.mkldnn.matmul
    torch.backends.mkldnn.matmul.fp32_precision = before


def test_onednn_multiplies_only_where_it_is_exact(products, monkeypatch):
    products.fp32_precision = "ieee"
    cpu._multiply_by_onednn()
    assert cpu.product_error() < cpu.EXACT  # whatever was chosen
    products.fp32_precision = "ieee"
    monkeypatch.setattr(cpu, "product_error", lambda: 2e-3)  # of a CPU that rounds to bf16
    cpu._multiply_by_onednn()
    assert products.fp32_precision == "ieee"


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("beta", [0.0, 1.0, -2.0])
def test_sums_with_products_are_right_by_either_library(products, alpha, beta):
    """PyTorch's batched product by oneDNN is wrong at alpha 0, as the cubic Newton-Schulz polynomial has it."""
    A, B, C = (torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    exact = alpha * A.double() @ B.double() + beta * C.double()
    for precision in ("ieee", "bf16"):
        products.fp32_precision = precision
        torch.testing.assert_close(matmul_add_reference(A, B, C, alpha, beta).double(), exact, rtol=0, atol=2e-5)


def test_only_amd_with_avx512_leaves_half(tmp_path, monkeypatch):
    amd, intel = tmp_path / "amd", tmp_path / "intel"
    amd.write_text("vendor_id\t: AuthenticAMD\n")
    intel.write_text("vendor_id\t: GenuineIntel\n")
    for capability, wanted in (("AVX512", True), ("AVX2", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert cpu.mkl_leaves_half(amd) is wanted
        assert not cpu.mkl_leaves_half(intel)
        assert not cpu.mkl_leaves_half(tmp_path / "absent")


@pytest.mark.parametrize(
    ("flags", "rank", "before", "free", "wanted"),
    [
        ({}, Rank(), {}, 4, (4, 1)),
        ({"batch_tokens": 768}, Rank(), {}, 4, (3, 1)),  # three sequences
        ({"batch_tokens": 256}, Rank(), {}, 4, (1, 4)),  # one sequence: threads instead
        ({"workers": 2}, Rank(), {}, 4, (2, 2)),
        ({"workers": 8}, Rank(), {}, 4, (8, 1)),
        ({"workers": 1, "threads": 3}, Rank(), {}, 4, (1, 3)),
        ({}, Rank(0, 2, 0), {}, 4, (1, 0)),
        ({"device": "cuda"}, Rank(), {}, 4, (1, 0)),
        ({}, Rank(), {"workers": 3, "threads": 2}, 4, (3, 2)),
        ({"workers": 1}, Rank(), {"workers": 3, "threads": 2}, 4, (1, 2)),
    ],
)
def test_workers_follow_flags_the_resumed_run_and_free_cores(monkeypatch, flags, rank, before, free, wanted):
    monkeypatch.setattr("settings.free_cores", lambda: free)
    s = replace(Settings(), **{"batch_tokens": 4096, "seq_len": 256, "device": "cpu"} | flags)
    assert chosen_workers(s, rank, before) == wanted


@pytest.mark.parametrize(
    ("flags", "rank", "words"),
    [
        ({"workers": 0}, Rank(), "--workers 0: must be at least 1"),
        ({"threads": 0}, Rank(), "--threads 0: must be at least 1"),
        ({"workers": 2}, Rank(0, 2, 0), "--workers 2: for a CPU under Linux, without torchrun"),
        ({"workers": 3}, Rank(), "--batch-tokens 8192: not divisible by --seq-len 256 x 3 workers"),
    ],
)
def test_workers_that_cannot_be_are_refused(flags, rank, words):
    given = replace(Settings(model="nano", device="cpu", data=TOKENS), **flags)
    with pytest.raises(BadInput, match=words):
        resolve(given, rank)


def test_kernels_of_a_cpu_are_its_own():
    assert chosen_kernels("auto", (0, 0)) == {"attention", "cross_entropy"}
    assert chosen_kernels("on", (0, 0)) == {"attention", "cross_entropy", "relu2_mlp"}
    assert chosen_kernels("off", (0, 0)) == frozenset()
    assert "attention" not in chosen_kernels("on", (8, 9))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def resolved(**flags):
    return resolve(replace(Settings(model="nano", device="cpu", data=TOKENS, workers=2, threads=1), **flags), Rank())


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"world_size": 3, "threads": 2, "compile": "on"}, {"workers": 3, "threads": 2, "compile": "on"}),
        # Of a version without workers: PyTorch's threads.
        ({"world_size": 1, "compile": "off"}, {"workers": 1, "threads": 0, "compile": "off"}),
        ({"world_size": 3, "threads": 2, "compile": "on", "device": "cuda"}, {}),
        ({"world_size": "3", "threads": 2, "compile": "on"}, {}),
        ({"world_size": 3, "threads": -1, "compile": "on"}, {}),
        ({"world_size": 3, "threads": 2, "compile": "maybe"}, {}),
        ({}, {}),
    ],
)
def test_a_resumed_run_keeps_what_its_config_says(tmp_path, config, found):
    (tmp_path / "run").mkdir()
    given = Settings(runs_dir=tmp_path, name="run", resume=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"device": "cpu"} | config))
    assert config_before(given) == found
    assert config_before(replace(given, resume=False)) == {}
    (tmp_path / "run" / "config.json").write_text("{")
    assert config_before(given) == {}


def test_a_compiled_run_marks_the_cache_that_the_next_one_looks_into(cache, train_small, monkeypatch):
    """With the micro-batch left to the run, whose number is known only when it has a model."""
    monkeypatch.setattr("settings.why_no_compiler", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    keys, pays = [], compiling.pays
    monkeypatch.setattr("settings.pays", lambda *a: (keys.append(a[-1]), pays(*a))[1])
    flags = ("--micro-batch", "auto", "--tokens", 256)
    assert train_small("first", *flags, "--compile", "on")[0] == 0
    assert train_small("next", *flags)[0] == 0
    assert [(cache / "warm" / key).exists() for key in keys] == [True]


def test_compiling_pays_for_many_tokens_and_for_fewer_in_a_warm_cache(cache, monkeypatch):
    import settings

    monkeypatch.setattr(settings, "why_no_compiler", lambda: None)
    assert resolved(tokens=1_000_000)[0].compile == "off"
    assert resolved(tokens=20_000_000)[0].compile == "on"
    compiling.mark_warm(settings.compiled_code(*resolved(tokens=1_000_000)))
    assert resolved(tokens=1_000_000)[0].compile == "on"
    assert resolved(tokens=50_000)[0].compile == "off"
    assert resolved(tokens=1_000_000, micro_batch=4)[0].compile == "off"  # other code, not in the cache


def test_without_a_compiler_auto_says_so_and_on_is_refused(cache, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in compiling.why_no_compiler()
    assert resolved(tokens=20_000_000)[0].compile == "off"
    assert "not compiled" in capsys.readouterr().err
    with pytest.raises(BadInput, match="--compile on: no C"):
        resolved(compile="on")
    monkeypatch.setenv("CXX", f"{sys.executable} -O3")
    monkeypatch.setattr(compiling, "sysconfig", SimpleNamespace(get_path=lambda name: str(cache)))
    assert "Python.h" in compiling.why_no_compiler()


def test_a_cache_that_cannot_be_written_stays_cold(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    compiling.mark_warm("key")
    assert not compiling.pays(1e12, 4, 2, "key")
