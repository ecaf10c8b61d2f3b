"""What the benchmarks promise besides times: refusals, and counts checked by hand."""

import functools
import sys
import types

import pytest
import torch

from bench import newton_schulz, peers
from bench.baseline import StackedMuon
from bench.harness import fault, interleaved, polynomials, print_table, quartiles, require
from bench.newton_schulz import dense_flops
from kernels.newton_schulz import coefficient_schedule, half_product_cost, iterate, method_of

SCHEDULE = coefficient_schedule("polar_express", 5)


def test_a_wrong_result_is_named_and_a_right_one_is_not():
    X = torch.randn(3, 32, 80, generator=torch.Generator().manual_seed(0))
    X = X / (1.06 * torch.linalg.matrix_norm(X, keepdim=True))
    for matrices in (X, X.mT):
        found, exact = iterate(matrices, SCHEDULE, "auto"), polynomials(matrices)
        assert fault(found, exact, 0.02) is None
        assert "by 0.03, not timed" in fault(1.03 * found, exact, 0.02)
        assert "not timed" in fault(found * torch.nan, exact, 0.02)
        with pytest.raises(SystemExit, match=r"gram differs from the loop's by 0\.5"):
            require("gram", 1.5 * exact, exact, 0.02, "the loop's")


def test_the_float64_polynomials_act_on_singular_values():
    """U diag(s) Vᵀ becomes U diag(p(s)) Vᵀ, p composed of the odd quintic polynomials a s + b s³ + c s⁵."""
    rng = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(8, 4, dtype=torch.float64, generator=rng))[0] for _ in range(2))
    s = torch.tensor([0.9, 0.5, 0.1, 0.01], dtype=torch.float64)
    image = s
    for a, b, c in SCHEDULE:
        image = a * image + b * image**3 + c * image**5
    torch.testing.assert_close(polynomials(U * s @ V.mT), U * image @ V.mT)


def test_candidates_take_turns_and_warm_up_rounds_are_not_timed():
    calls = []
    candidates = {"a": lambda i: calls.append(("a", i)), "b": lambda i: calls.append(("b", i))}
    seconds = interleaved(candidates, torch.device("cpu"), repeats=2, warmup=1)
    assert calls == [(name, i) for i in (-1, 0, 1) for name in "ab"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}
    assert all(time > 0 for times in seconds.values() for time in times)
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0])[1] == 3.0
    assert quartiles([2.0]) == [2.0, 2.0, 2.0]


def test_numbers_are_aligned_to_the_right_and_words_to_the_left(capsys):
    print_table([{"name": "ours", "us": "1,234.5", "goal": "2 x"}, {"name": "theirs", "us": "-", "goal": "none"}])
    assert capsys.readouterr().out.splitlines() == [
        "name         us  goal",
        "ours    1,234.5  2 x",
        "theirs        -  none",
    ]


@pytest.mark.parametrize(
    ("shape", "method", "half", "dense"),
    [((2, 100, 100), "standard", 2 * 20e6, 2 * 30e6), ((1, 400, 100), "gram", 38e6, 90e6)],
)
def test_flops_equal_a_count_by_hand(shape, method, half, dense):
    assert method_of(shape) == method
    assert half_product_cost(shape, method, 5)[0] == half
    assert dense_flops(shape) == dense


def test_other_packages_are_used_where_installed_and_named_where_broken_or_absent(monkeypatch, capsys):
    class Fake:
        def __init__(self, ns_coefficients, **_):
            self.rows = len(ns_coefficients)

        def __call__(self, X):
            return X * self.rows

    module = types.ModuleType("gram_newton_schulz")
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "gram_newton_schulz", module)
    assert "gram-newton-schulz" not in peers.installed(SCHEDULE, torch.device("cpu"))
    assert "not usable here (ImportError" in capsys.readouterr().out
    module.GramNewtonSchulz = Fake
    assert peers.installed(SCHEDULE, torch.device("cpu"))["gram-newton-schulz"](torch.ones(1)) == 5
    monkeypatch.setattr(peers, "_is_installed", lambda name: False)
    peers.report_absent()
    absent = ("gram-newton-schulz", "emerging-optimizers", "torch.optim.Muon", "heavyball", "pytorch_optimizer")
    assert capsys.readouterr().out.splitlines() == [f"{name}: absent" for name in absent]


@pytest.fixture
def whole_step(monkeypatch):
    """The benchmark of Muon's step without compilation, next to torch's and to a package whose step fails."""

    class Broken(torch.optim.SGD):
        def step(self):
            raise OSError("no compiler")

    monkeypatch.setattr(newton_schulz, "StackedMuon", functools.partial(StackedMuon, compile=False))
    monkeypatch.setattr(peers, "MUONS", {"torch.optim.Muon": peers.torch_muon, "broken": Broken})
    monkeypatch.setattr(peers, "muons_installed", lambda: list(peers.MUONS))
    return lambda: newton_schulz.bench_step("nano", torch.device("cpu"), 1, 1e11)


def test_whole_steps_are_timed_with_their_errors_and_a_broken_one_is_named(whole_step, capsys):
    rows = {row["candidate"]: row for row in whole_step()}
    assert rows.keys() == {"ours", "reference", "torch.optim.Muon"}
    assert rows["ours"]["error"] < 1e-4 < 1e-3 < rows["torch.optim.Muon"]["error"] < 0.05  # fp32, bf16
    assert "broken: installed but not usable here (OSError: no compiler)" in capsys.readouterr().out


def test_a_whole_step_that_is_wrong_is_not_timed(whole_step, monkeypatch):
    monkeypatch.setattr("kernels.optimizer.update_scale", lambda *shape: 1.1)
    with pytest.raises(SystemExit, match="whole step, matrix 0: ours differs from the reference"):
        whole_step()
