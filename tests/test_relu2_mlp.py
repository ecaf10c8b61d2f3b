"""The squared-ReLU perceptron: its kernel under TRITON_INTERPRET=1 or on a GPU, everything else on the CPU path too."""

import pytest
import torch
import torch.nn.functional as F

from kernels import configs
from kernels.relu2_mlp import launch_relu2, relu2_mlp
from tests.test_symmetric import SIZES, assert_as_exact_as_torch, poisoned_memory  # noqa: F401 (a fixture)
from tests.test_symmetric import pytestmark as needs_kernels

DEVICE = "cuda" if torch.cuda.is_available() and not configs.INTERPRETED else "cpu"
# Tokens, D and F: each size meets others in every role; the last two have no overhang in the interpreter's tile.
SHAPES = [(m, SIZES[(i + shift) % 8], SIZES[(i + 3 * shift + 1) % 8]) for i, m in enumerate(SIZES) for shift in (1, 4)]
SHAPES += [(64, 64, 64), (128, 128, 192)]


@pytest.fixture(params=["pytorch", pytest.param("kernel", marks=needs_kernels)])
def path(request, monkeypatch):
    monkeypatch.setattr(configs, "runs_triton", lambda x: request.param == "kernel")
    return request.param


@pytest.fixture
def launches(monkeypatch):
    """The BACKWARD constant of every launch so far."""
    made, launch = [], configs.launch
    monkeypatch.setattr(configs, "launch", lambda *a, **k: (made.append(k["BACKWARD"]), launch(*a, **k)))
    return made


def problem(tokens, D, width, dtype=torch.float32, strided=()):
    """x, up, down and dy, scaled so that h is about 1; those named in `strided` are views of larger matrices."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for name, scale in (("x", 1.0), ("up", D**-0.5), ("down", width**-0.5), ("dy", 1.0)):
        rows = width if name in ("up", "down") else tokens
        shape = (3 * D, 2 * rows) if name in strided else (rows, D)
        matrix = (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype)
        made.append(matrix.mT[::2, ::3] if name in strided else matrix)
    return made


def unfused(x, up, down):
    return F.relu(x @ up.mT).square() @ down


def outputs(mlp, x, up, down, dy):
    """y, dx, dup, ddown; strides of the inputs are kept."""
    leaves = [t.detach().requires_grad_() for t in (x, up, down)]
    y = mlp(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def assert_all_as_exact_as_torch(*inputs):
    found, rounded = outputs(relu2_mlp, *inputs), outputs(unfused, *inputs)
    for mine, theirs, exact in zip(found, rounded, outputs(unfused, *(t.double() for t in inputs)), strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        assert_as_exact_as_torch(mine, exact, theirs)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "D", "width"), SHAPES)
def test_output_and_every_gradient_match_float64_on_odd_sizes(tokens, D, width, dtype):
    assert_all_as_exact_as_torch(*problem(tokens, D, width, dtype))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("strided", [("x",), ("up",), ("down",), ("dy",), ("x", "up", "down", "dy")], ids=str)
def test_strided_inputs_and_gradients_match_float64(strided):
    assert_all_as_exact_as_torch(*problem(70, 33, 100, strided=strided))


@pytest.mark.usefixtures("path")
def test_dpre_reads_a_strided_activation():
    _, _, down, dy = problem(70, 33, 100)
    h = torch.rand(200, 210, generator=torch.Generator().manual_seed(1)).to(DEVICE).mT[::3, ::2]
    found = torch.ops.muon_speedrun.relu2_dpre(dy, down, h)
    exact = 2 * h.double().sqrt() * (dy.double() @ down.double().mT)
    assert_as_exact_as_torch(found, exact, 2 * h.sqrt() * (dy @ down.mT))


@pytest.mark.usefixtures("path")
def test_leading_dimensions_and_an_expanded_gradient_match_float64():
    x, up, down, _ = problem(2 * 3 * 5, 20, 24)
    x = x.view(2, 5, 3, 20).transpose(1, 2)
    dy = torch.ones((), device=DEVICE).expand(x.shape)
    assert_all_as_exact_as_torch(x, up, down, dy)
    assert_all_as_exact_as_torch(x[0, 0, 0], up, down, dy[0, 0, 0])


@pytest.mark.gpu
@needs_kernels[1]
@pytest.mark.parametrize("width", [33, 64])
def test_the_kernel_writes_nothing_beside_its_result(width, monkeypatch):
    whole = torch.full((140, 140), torch.nan, device=DEVICE)
    monkeypatch.setattr(configs, "empty_matrices", lambda like, batch, m, n: whole[None, :m, :n])
    _, up, down, dy = problem(70, 16, width)
    h = launch_relu2(dy, up, None).clone()
    for out in (h, launch_relu2(dy, down, h)):
        assert out.isfinite().all()
        assert whole.isfinite().sum() == 70 * width


@pytest.mark.usefixtures("path")
def test_nan_stays_in_its_own_row():
    x, up, down, dy = problem(70, 33, 100)
    x[3, 5] = torch.nan
    y, dx, dup, ddown = outputs(relu2_mlp, x, up, down, dy)
    for rows in (y, dx):
        assert rows[3].isnan().all()
        assert rows[torch.arange(70) != 3].isfinite().all()
    assert dup.isnan().all()
    assert ddown.isnan().all()


@pytest.mark.usefixtures("path")
def test_no_tokens_launch_nothing_and_give_zero_gradients(launches):
    x, up, down, dy = problem(1, 16, 24)
    y, dx, dup, ddown = outputs(relu2_mlp, x[:0].view(2, 0, 16), up, down, dy[:0].view(2, 0, 16))
    assert y.shape == dx.shape == (2, 0, 16)
    assert dup.shape == ddown.shape == (24, 16)
    assert not dup.any()
    assert not ddown.any()
    assert launches == []


def test_one_activation_is_kept_and_one_kernel_runs_each_way(path, launches):
    kept = []
    x, up, down, dy = (t.requires_grad_() for t in problem(40, 16, 96))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        y = relu2_mlp(x, up, down)
    assert kept.count((40, 96)) == 1
    assert sum(shape.numel() for shape in kept) == 40 * 96 + 40 * 16 + 2 * 96 * 16
    assert launches == [False] * (path == "kernel")
    y.backward(dy)
    assert launches == [False, True][: 2 * (path == "kernel")]


def test_only_the_gradients_asked_for_are_made(path, launches):
    *inputs, dy = problem(40, 16, 96)
    expected = outputs(relu2_mlp, *inputs, dy)[1:]
    for i, gradient in enumerate(expected):
        launches.clear()
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate(inputs)]
        relu2_mlp(*leaves).backward(dy)
        assert torch.equal(leaves[i].grad, gradient)
        assert launches.count(True) == (path == "kernel" and i < 2)


@pytest.mark.usefixtures("path")
def test_autocast_does_not_touch_it():
    *inputs, _ = problem(40, 16, 96)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = relu2_mlp(*inputs)
    assert torch.equal(found, relu2_mlp(*inputs))


def small_problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = ((3, 5, 6), (7, 6), (7, 6))
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def test_gradients_pass_gradcheck_in_float64():
    torch.autograd.gradcheck(relu2_mlp, small_problem())


def test_ops_pass_pytorchs_own_checks():
    x, up, down = small_problem(torch.float32)
    x = x.detach().flatten(0, 1).requires_grad_()
    torch.library.opcheck(torch.ops.muon_speedrun.relu2_mlp, (x, up, down))
    h = torch.rand(15, 7)
    torch.library.opcheck(torch.ops.muon_speedrun.relu2_dpre, (x.detach(), down.detach(), h))


@pytest.mark.parametrize("width", [7, 32])
@pytest.mark.usefixtures("path")
def test_fake_outputs_have_the_strides_of_real_ones(width):
    x, up, down, _ = problem(20, 16, width)
    y, h = torch.ops.muon_speedrun.relu2_mlp(x, up, down)
    dpre = torch.ops.muon_speedrun.relu2_dpre(x, down, h)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (x, up, down, h)]
        fake_y, fake_h = torch.ops.muon_speedrun.relu2_mlp(*fakes[:3])
        fake_dpre = torch.ops.muon_speedrun.relu2_dpre(fakes[0], fakes[2], fakes[3])
    for real, fake in ((y, fake_y), (h, fake_h), (dpre, fake_dpre)):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


def test_survives_fullgraph_compilation_with_gradients_equal_to_eager():
    def residual(x, up, down):
        return x + 2.0 * relu2_mlp(x.sin(), up, down)

    inputs = small_problem(torch.float32)
    dy = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2))
    compiled = torch.compile(residual, fullgraph=True, backend="aot_eager")
    for found, expected in zip(outputs(compiled, *inputs, dy), outputs(residual, *inputs, dy), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.ones(3, 5)}, r"x \(3, 5\), up \(7, 6\) and down \(7, 6\) do not fit"),
        ({"down": torch.ones(6, 7)}, r"x \(3, 6\), up \(7, 6\) and down \(6, 7\) do not fit"),
        ({"up": torch.ones(1, 7, 6)}, r"up \(1, 7, 6\) and down \(7, 6\) do not fit"),
        ({"x": torch.tensor(1.0)}, r"x \(\), .* do not fit"),
        ({"up": torch.ones(0, 6), "down": torch.ones(0, 6)}, r"up \(0, 6\) and down \(0, 6\) do not fit"),
        ({"up": torch.ones(7, 6).half()}, "one float dtype, got torch.float32, torch.float16, torch.float32"),
        ({name: torch.ones(7, 6).int() for name in ("x", "up", "down")}, "one float dtype, got torch.int32"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        relu2_mlp(**{"x": torch.ones(3, 6), "up": torch.ones(7, 6), "down": torch.ones(7, 6)} | change)
