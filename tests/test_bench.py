"""What the benchmarks promise besides times: refusals, and counts checked by hand."""

import sys
import types

import pytest
import torch

from bench import peers
from bench.newton_schulz import dense_flops, fault
from kernels.newton_schulz import coefficient_schedule, half_product_cost, iterate, method_of

SCHEDULE = coefficient_schedule("polar_express", 5)


def test_a_wrong_result_is_named_and_a_right_one_is_not():
    X = torch.randn(3, 32, 80, generator=torch.Generator().manual_seed(0))
    X = X / (1.06 * torch.linalg.matrix_norm(X, keepdim=True))
    assert fault(lambda x: iterate(x, SCHEDULE, "auto"), X, 0.02) is None
    assert "not timed" in fault(lambda x: 1.03 * iterate(x, SCHEDULE, "auto"), X, 0.02)
    assert "not timed" in fault(lambda x: x * torch.nan, X, 0.02)


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
    assert capsys.readouterr().out.splitlines() == ["gram-newton-schulz: absent", "emerging-optimizers: absent"]
