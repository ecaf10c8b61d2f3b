"""The fused head: its kernel under TRITON_INTERPRET=1 or on a GPU, everything else on the CPU path too."""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F

from kernels import configs, cross_entropy
from kernels.cross_entropy import launch_softmax_gradient, linear_cross_entropy
from tests.test_symmetric import poisoned_memory  # noqa: F401 (a fixture of this module)
from tests.test_symmetric import pytestmark as needs_kernels

DEVICE = "cuda" if torch.cuda.is_available() and not configs.INTERPRETED else "cpu"


def problem(rows, D, V, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, W = (torch.randn(n, D, generator=generator) for n in (rows, V))
    targets = torch.randint(V, (rows,), generator=generator)
    return x.to(DEVICE, dtype), (W / D**0.5).to(DEVICE, dtype), targets.to(DEVICE)


def exact_gradients(x, W, targets, upstream=1.0):
    x, W = (t.detach().double().requires_grad_() for t in (x, W))
    loss = F.cross_entropy(x @ W.T, targets)
    (upstream * loss).backward()
    return loss.detach(), x.grad, W.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "V"), [(1, 1), (3, 7), (5, 64), (2, 100), (3, 1000), (2, 9001), (4, 4096)])
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.gpu
@needs_kernels[1]
def test_softmax_gradient_matches_float64(rows, V, dtype):
    generator = torch.Generator().manual_seed(V)
    wide = (4 * torch.randn(rows, V + 3, generator=generator)).to(DEVICE, dtype)
    logits = wide[:, :V]  # rows are not adjacent
    targets = torch.randint(V, (rows,), generator=generator).to(DEVICE)
    exact = logits.double()
    expected = exact.softmax(-1) - F.one_hot(targets, V)
    losses = F.cross_entropy(exact, targets, reduction="none")
    beside = wide[:, V:].clone()
    found = launch_softmax_gradient(logits, targets)
    torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert torch.equal(wide[:, V:], beside)


@pytest.mark.gpu
@needs_kernels[1]
def test_extreme_logits_stay_finite_and_nan_or_a_wild_target_stays_in_its_row():
    logits = torch.zeros(5, 300, device=DEVICE)
    logits[0, 7], logits[1] = 3e38, -3e38
    logits[4, :290] = -torch.inf  # whole blocks of a row may be
    logits[2, 5] = torch.nan
    targets = torch.tensor([7, 0, 0, 300, 299], device=DEVICE)
    losses = launch_softmax_gradient(logits, targets)
    assert losses[0] == 0
    torch.testing.assert_close(losses[[1, 4]].exp(), torch.tensor([300.0, 10.0], device=DEVICE))
    assert losses[2:4].isnan().all()
    assert logits[[0, 1, 3, 4]].isfinite().all()


def test_a_target_whose_probability_underflows_has_its_loss_on_the_cpu_path_too():
    logits = torch.tensor([[0.0, 300.0, -5.0], [-3e38, 0.0, 3e38], [0.0, 0.0, 0.0]])
    targets = torch.tensor([0, 2, 1])
    losses = cross_entropy.softmax_gradient_reference(logits, targets)
    torch.testing.assert_close(losses, torch.tensor([300.0, 0.0, math.log(3)]))
    torch.testing.assert_close(logits[:2], torch.tensor([[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_kernels)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "D", "V"), [(1, 1, 2), (7, 33, 100), (129, 16, 65), (40, 64, 300)])
@pytest.mark.parametrize("chunk_rows", [1, 4096])
def test_loss_and_gradients_are_as_exact_as_torch(rows, D, V, dtype, kernels, chunk_rows, monkeypatch):
    monkeypatch.setattr(configs, "runs_triton", lambda t: kernels)
    monkeypatch.setattr(cross_entropy, "MIN_CHUNK_ROWS", chunk_rows)
    monkeypatch.setattr(cross_entropy, "CPU_CHUNK_ROWS", chunk_rows)
    monkeypatch.setattr(cross_entropy, "LOGIT_BYTES", 8 * 4 * V)
    x, W, targets = problem(rows, D, V, dtype)
    x.requires_grad_(), W.requires_grad_()
    exact = exact_gradients(x, W, targets, upstream=0.25)
    rounded = F.cross_entropy((x @ W.T).float(), targets)
    torch_dx, torch_dW = torch.autograd.grad(0.25 * rounded, (x, W))
    loss = linear_cross_entropy(x, W, targets)
    dx, dW = torch.autograd.grad(0.25 * loss, (x, W))
    for found, theirs, expected in zip((loss, dx, dW), (rounded, torch_dx, torch_dW), exact, strict=True):
        slack = 4 * torch.finfo(found.dtype).eps * expected.abs().max()
        allowed = 2 * (theirs.double() - expected).abs().max() + slack
        assert (found.detach().double() - expected).abs().max() <= allowed


def test_gradients_pass_gradcheck_and_pytorchs_own_checks():
    x, W, targets = (t.cpu() for t in problem(5, 4, 6))
    x, W = (t.double().requires_grad_() for t in (x, W))
    torch.autograd.gradcheck(lambda a, b: linear_cross_entropy(a, b, targets), (x, W))
    op = torch.ops.muon_speedrun.linear_cross_entropy
    torch.library.opcheck(op, (x.float(), W.float(), targets), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(configs.INTERPRETED, reason="the interpreter's kernels cannot be traced")
def test_survives_fullgraph_compilation_with_its_gradients():
    x, W, targets = problem(9, 8, 20)

    def head(x, W):
        return linear_cross_entropy(x * 2.0, W.to(x.dtype), targets)

    results = []
    for run in (head, torch.compile(head, fullgraph=True, backend="aot_eager")):
        a, b = (t.clone().requires_grad_() for t in (x, W))
        loss = run(a, b)
        loss.backward()
        results.append((loss.detach(), a.grad, b.grad))
    torch.testing.assert_close(results[1], results[0])


def test_without_gradients_it_is_the_plain_loss_and_autocast_touches_neither():
    x, W, targets = problem(6, 5, 9)
    plain = F.cross_entropy(x @ W.T, targets)
    with torch.autocast(DEVICE, torch.bfloat16):
        with torch.no_grad():
            assert torch.equal(linear_cross_entropy(x, W, targets), plain)
        torch.testing.assert_close(linear_cross_entropy(x.requires_grad_(), W, targets), plain)


def test_only_one_chunk_of_logits_is_alive_at_a_time(monkeypatch):
    x, W, targets = (t.cpu() for t in problem(12, 5, 9))
    monkeypatch.setattr(cross_entropy, "CPU_CHUNK_ROWS", 4)
    alive, seen = [], []

    def watch(logits, chunk_targets):
        seen.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(logits))
        return softmax_gradient(logits, chunk_targets)

    softmax_gradient = cross_entropy.softmax_gradient_reference
    monkeypatch.setattr(cross_entropy, "softmax_gradient_reference", watch)
    linear_cross_entropy(x.requires_grad_(), W, targets)
    assert seen == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, W, t: (x, W[:, :-1], t), "not \\(N, D\\)"),
        (lambda x, W, t: (x[:0], W, t[:0]), "at least 1"),
        (lambda x, W, t: (x.half(), W.half(), t), "bf16 or fp32"),
        (lambda x, W, t: (x, W, t.int()), "int64"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy(*change(*problem(4, 3, 5)))
