"""kernels/ as the package muon_kernels: what a wheel holds, that it trains elsewhere, and how it splits parameters."""

import copy
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest
import torch
from torch import nn

from engine.files import ROOT
from kernels import Muon, MuonWithAdamW, configs, orthogonalize, param_groups

TRAIN = """
import importlib.util, torch
from torch import nn
import muon_kernels
from muon_kernels import Muon, gram, orthogonalize, param_groups, symmetric_matmul

print(muon_kernels.__file__)
assert importlib.util.find_spec("kernels") is None, "the project is within reach"
torch.manual_seed(0)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 32)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
        self.head = nn.Linear(32, 20)

    def forward(self, tokens):
        return self.head(self.encoder(self.embedding(tokens)))

model = Model()
groups = param_groups(model)
optimizers = [Muon(groups.muon, lr=0.02), torch.optim.AdamW(groups.adamw, lr=3e-3)]
losses = []
for step in range(40):
    tokens = torch.randint(20, (16, 12))
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), (7 * tokens % 20).flatten())
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    losses.append(loss.item())
assert losses[0] > 2.5 and losses[-1] < 0.5 * losses[0], losses
"""


def run(*command, cwd):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the tree as git sees it, without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / path).is_file():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, folder / path)
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", "dist")
    run(sys.executable, "-m", "pip", "wheel", ".", *options, cwd=folder)
    (built,) = (folder / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory):
    """A folder and the Python of a fresh venv that has the wheel, and PyTorch from this environment."""
    folder = tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "torch.pth").write_text(sysconfig.get_path("purelib"))
    return folder, python


def test_the_wheel_holds_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.startswith("muon_kernels-")
    assert {name.split("/")[0].split("-")[0] for name in names} == {"muon_kernels"}
    files = {path.name for path in (ROOT / "kernels").glob("*.py")}
    assert {name.split("/")[1] for name in names if ".dist-info/" not in name} == files
    metadata = next(name for name in names if name.endswith("METADATA"))
    requirements = [
        line.removeprefix("Requires-Dist: ")
        for line in zipfile.ZipFile(wheel).read(metadata).decode().splitlines()
        if line.startswith("Requires-Dist: ")
    ]
    assert requirements == ["torch>=2.11"]


def test_the_installed_package_trains_a_transformer_in_another_folder(elsewhere):
    folder, python = elsewhere
    printed = run(python, "-P", "-c", TRAIN, cwd=folder)
    assert printed.startswith(str(folder / "venv"))


def test_every_code_block_of_the_page_runs(elsewhere):
    folder, python = elsewhere
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/muon_kernels.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    (folder / "page.py").write_text("\n".join(blocks))
    assert "self_attn.in_proj_weight" in run(python, "page.py", cwd=folder)


def test_cuda_without_triton_uses_pytorch(monkeypatch):
    monkeypatch.setattr(configs, "capability", lambda device: (9, 0))
    found = []
    for has_triton in (True, False):
        monkeypatch.setattr(configs, "HAS_TRITON", has_triton)
        found.append(configs.runs_triton(torch.zeros(2, 2)))
    assert found == [True, False]


def placed(model, **options):
    """{name: optimizer} as the groups themselves have it."""
    groups = param_groups(model, **options)
    optimizer_of = {}
    for optimizer, its_groups in (("Muon", groups.muon), ("AdamW", groups.adamw)):
        for p in (p for group in its_groups for p in group["params"]):
            assert id(p) not in optimizer_of
            optimizer_of[id(p)] = optimizer
    found = {name: optimizer_of.get(id(p), "frozen") for name, p in model.named_parameters(remove_duplicate=False)}
    for placement in groups.placements:
        assert {found[name] for name in placement.names} == {placement.optimizer}
    return found


class Decoder(nn.Module):
    def __init__(self, tied, head="lm_head"):
        super().__init__()
        setattr(self, head, nn.Linear(8, 50, bias=False))
        self.embedding = nn.Embedding(50, 8)
        self.pos_embed = nn.Parameter(torch.zeros(1, 16, 8))
        self.blocks = nn.ModuleList(nn.ModuleDict({"output": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}) for _ in "ab")
        if tied:
            getattr(self, head).weight = self.embedding.weight


@pytest.mark.parametrize("head", ["lm_head", "projection"])
def test_a_tied_head_goes_to_adamw_once_whatever_its_name(head):
    model = Decoder(tied=True, head=head)
    found = placed(model)
    assert {name for name, where in found.items() if where == "Muon"} == {
        "blocks.0.output.weight",
        "blocks.1.output.weight",
    }
    assert found[f"{head}.weight"] == found["embedding.weight"] == "AdamW"
    assert f"{head}.weight = embedding.weight  (50, 8)  embedding" in str(param_groups(model))


def test_an_untied_head_is_known_by_its_name_or_named_by_the_user():
    assert placed(Decoder(tied=False))["lm_head.weight"] == "AdamW"
    model = Decoder(tied=False, head="projection")
    assert placed(model)["projection.weight"] == "Muon"
    assert placed(model, adamw=["projection"])["projection.weight"] == "AdamW"
    assert placed(model, adamw=lambda name, p: len(p) == 50)["projection.weight"] == "AdamW"


def test_of_a_head_with_several_layers_the_last_is_the_head():
    model = nn.ModuleDict({"classifier": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))})
    assert placed(model)["classifier.0.weight"] == "Muon"
    assert placed(model)["classifier.2.weight"] == "AdamW"
    stack = nn.ModuleDict({"decoder": nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 1)})
    assert placed(stack)["decoder.layers.0.linear2.weight"] == "Muon"


def test_the_user_overrules_by_patterns_and_mistakes_are_errors():
    model = Decoder(tied=False)
    found = placed(model, adamw="blocks.1", muon=["lm_head", "pos*"])
    assert found["lm_head.weight"] == found["pos_embed"] == found["blocks.0.output.weight"] == "Muon"
    assert found["blocks.1.output.weight"] == found["blocks.0.output.bias"] == "AdamW"
    assert placed(model, muon=["blocks"]) == placed(model)  # gains and biases are not matrices
    with pytest.raises(ValueError, match=r"no parameter has a name like 'blocks\.7'"):
        param_groups(model, adamw=["blocks.7"])
    with pytest.raises(ValueError, match="chosen for AdamW and for Muon"):
        param_groups(model, adamw=["blocks.1"], muon=["blocks.1.output"])
    with pytest.raises(ValueError, match="has 8 rows, but row_splits is 3"):
        param_groups(model, row_splits={"blocks.0.output": 3})


def test_gains_biases_routers_and_depthwise_filters_go_to_adamw_and_decay_only_where_they_are_matrices():
    model = nn.ModuleDict(
        {
            "router": nn.Linear(8, 4),
            "depthwise": nn.Conv1d(8, 8, 4, groups=8),
            "norm": nn.LayerNorm((4, 8)),
            "one": nn.Linear(8, 1),
            "bag": nn.EmbeddingBag(9, 8),
        }
    )
    assert set(placed(model).values()) == {"AdamW"}
    decayed, kept = param_groups(model).adamw
    assert len(decayed["params"]) == 4
    assert "weight_decay" not in decayed
    assert {id(p) for p in kept["params"]} == {
        id(p) for name, p in model.named_parameters() if name.endswith("bias") or name.startswith("norm")
    }
    assert kept["weight_decay"] == 0


def test_frozen_parameters_are_in_no_group_but_in_the_description():
    model = Decoder(tied=False)
    model.blocks[0].requires_grad_(False)
    found = placed(model)
    assert {name for name, where in found.items() if where == "frozen"} == {
        name for name in found if name.startswith("blocks.0.")
    }
    assert "  blocks.0.output.weight  (8, 8)  requires_grad=False" in str(param_groups(model)).split("frozen:")[1]


def changes(model, **options):
    """What one step of Muon, without momentum and scale, subtracts from each parameter for a random gradient."""
    groups = param_groups(model, **options).muon
    parameters = [p for group in groups for p in group["params"]]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    before = [p.detach().clone() for p in parameters]
    Muon(groups, lr=1.0, momentum=0.0, lr_scale="none").step()
    return {p: old - p.detach() for p, old in zip(parameters, before, strict=True)}


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(5, 8, 3),
        nn.Conv2d(3, 8, (3, 2)),
        nn.Conv3d(2, 8, 2),
        nn.ConvTranspose2d(6, 4, 3),
        nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last),
        nn.Conv3d(2, 8, 2).to(memory_format=torch.channels_last_3d),
    ],
    ids=["1d", "2d", "3d", "transposed", "channels_last", "channels_last_3d"],
)
def test_a_convolution_is_orthogonalized_as_its_flattened_matrix(layer):
    found = changes(layer)[layer.weight].flatten(1)
    assert_close(found, orthogonalize(layer.weight.grad.flatten(1)))
    s = torch.linalg.svdvals(found)
    assert s.max() < 1.2
    assert s.min() > 0.8


def test_groups_of_a_convolution_are_orthogonalized_each_by_itself():
    layer = nn.Conv2d(6, 8, 3, groups=2)
    found = changes(layer)[layer.weight]
    for rows in (slice(0, 4), slice(4, 8)):
        assert_close(found[rows].flatten(1), orthogonalize(layer.weight.grad[rows].flatten(1)))


def test_attention_and_recurrent_projections_are_orthogonalized_each_by_itself():
    model = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.LSTM(6, 8), nn.GRUCell(6, 8), nn.Linear(6, 24)])
    attention, lstm, cell, fused = model
    found = changes(model, row_splits={"3": (16, 8)})
    for p, counts in (
        (attention.in_proj_weight, (8, 8, 8)),
        (lstm.weight_ih_l0, (8, 8, 8, 8)),
        (lstm.weight_hh_l0, (8, 8, 8, 8)),
        (cell.weight_ih, (8, 8, 8)),
        (fused.weight, (16, 8)),
    ):
        expected = torch.cat([orthogonalize(part) for part in p.grad.split(counts)])
        assert_close(found[p], expected)
        assert (found[p] - orthogonalize(p.grad)).norm() > 0.1
    assert_close(found[attention.out_proj.weight], orthogonalize(attention.out_proj.weight.grad))


def test_a_parametrized_convolution_is_flattened_too():
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
    direction = layer.parametrizations.weight.original1
    assert_close(changes(layer)[direction].flatten(1), orthogonalize(direction.grad.flatten(1)))


def test_a_linear_layer_stored_as_in_by_out_is_scaled_as_its_map():
    class Conv1D(nn.Module):  # as in transformers
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 16))

    layer = Conv1D()
    layer.weight.grad = torch.randn(4, 16)
    Muon(param_groups(layer).muon, lr=1.0, momentum=0.0).step()
    assert_close(layer.weight.detach(), -2 * orthogonalize(layer.weight.grad))  # sqrt(16 / 4)


def train(model, optimizers, schedulers, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(4, 6, 8, generator=generator)
        (model(x) - x.cumsum(dim=1)).square().mean().backward()
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return [p.detach().clone() for p in model.parameters()]


def small_encoder():
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 1)


def two_optimizers(model):
    groups = param_groups(model)
    return Muon(groups.muon, lr=0.02, weight_decay=0.1), torch.optim.AdamW(groups.adamw, lr=0.01)


def halving(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


def test_both_as_one_equal_two_optimizers_to_the_bit():
    apart, together = small_encoder(), small_encoder()
    optimizers = two_optimizers(apart)
    joined = MuonWithAdamW(*two_optimizers(together))
    expected = train(apart, optimizers, [halving(o) for o in optimizers], 4)
    found = train(together, [joined], [halving(joined)], 4)
    assert [group["lr"] for group in joined.param_groups] == [0.02 / 16, 0.02 / 16, 0.01 / 16]
    for a, b, start in zip(found, expected, small_encoder().parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, start)


@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
def test_both_as_one_continue_from_a_checkpoint_or_a_copy(how, tmp_path):
    model = small_encoder()
    joined = MuonWithAdamW(*two_optimizers(model))
    scheduler = halving(joined)
    train(model, [joined], [scheduler], 2)
    if how == "deepcopy":
        model_again, joined_again = copy.deepcopy((model, joined))
    else:
        torch.save((model.state_dict(), joined.state_dict()), tmp_path / "state.pt")
        weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
        assert set(state) == {"state", "param_groups"}
        model_again = small_encoder()
        joined_again = MuonWithAdamW(*two_optimizers(model_again))
        model_again.load_state_dict(weights)
        joined_again.load_state_dict(state)
    again = torch.optim.lr_scheduler.LambdaLR(joined_again, lambda step: 0.5**step, last_epoch=1)
    again.load_state_dict(scheduler.state_dict())
    found = train(model_again, [joined_again], [again], 2, seed=1)
    expected = train(model, [joined], [scheduler], 2, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_both_as_one_obey_a_grad_scaler_and_refuse_late_groups():
    model = small_encoder()
    joined = MuonWithAdamW(*two_optimizers(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [p.detach().clone() for p in model.parameters()]
    for factor in (torch.inf, 1.0):
        scaler.scale(factor * model(torch.randn(2, 3, 8)).square().mean()).backward()
        scaler.step(joined)
        scaler.update()
        joined.zero_grad()
        same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert all(same) if factor == torch.inf else not any(same)
    with pytest.raises(ValueError, match="add the group to Muon or to AdamW"):
        joined.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})
