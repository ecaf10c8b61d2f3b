"""The training step and what it stands on: compilation, clocks, memory count, the speed of light."""

import dataclasses
import gc
import math

import pytest
import torch

import model as model_file
import train
from engine import speed
from engine.memory import MemoryCount
from engine.speed import Times
from engine.step import TrainingStep
from model import KERNELS, SIZES, ModelConfig, Transformer
from optim import build_optimizers, step_cost

CONFIG = ModelConfig(32, 2, 2, 1, 64, seq_len=16, ffn="relu2", qk_norm=True)


def build(kernels=frozenset(), optimizer="muon", config=CONFIG, device="cpu", **options):
    torch.manual_seed(0)
    model = Transformer(config, vocab_size=50).to(device)
    model.kernels = kernels
    optimizers = build_optimizers(model, optimizer, lr=0.02, adamw_lr=0.01)
    return TrainingStep(model, optimizers, micro_batch=2, **options)


def rows(seed=0, count=4, device="cpu"):
    return torch.randint(50, (count, CONFIG.seq_len + 1), generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("kernels", [frozenset(), KERNELS], ids=["off", "on"])
def test_the_nano_model_compiles_without_a_graph_break_and_never_again(kernels, monkeypatch):
    torch._dynamo.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    config = dataclasses.replace(SIZES["nano"], seq_len=CONFIG.seq_len)
    step = build(kernels, config=config, compiled=True, backend=counting)
    for seed in range(3):
        step.gradients(rows(seed))
        step.apply()
    assert len(graphs) == 1  # fullgraph: a break would have raised
    assert torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.parametrize("kernels", [frozenset(), KERNELS], ids=["off", "on"])
def test_compiled_gradients_equal_eager_ones(kernels):
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        step = build(kernels, compiled=compiled, backend="aot_eager")
        found.append((step.gradients(rows()).read().loss, [p.grad for p in step.model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_kernels_change_neither_loss_nor_gradients():
    found = []
    for kernels in (frozenset(), KERNELS):
        step = build(kernels)
        found.append((step.gradients(rows()).read().loss, [p.grad for p in step.model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_validation_never_runs_the_kernels(monkeypatch):
    step = build(kernels=KERNELS)

    def forbidden(*arguments):
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(model_file, "linear_cross_entropy", forbidden)
    monkeypatch.setattr(model_file, "relu2_mlp", forbidden)
    step.model.eval()
    step.model(rows()[:, :-1], rows()[:, 1:])
    step.model.train()
    with pytest.raises(AssertionError, match="a kernel ran"):
        step.model(rows()[:, :-1], rows()[:, 1:])


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("grad_clip", [0.0, 0.05])
def test_two_steps_equal_plain_pytorch_with_clipping(optimizer, grad_clip):
    step, plain = build(optimizer=optimizer, grad_clip=grad_clip), build(optimizer=optimizer)
    for seed in range(2):
        stats = step.gradients(rows(seed)).read()
        step.apply()
        loss = plain.model(rows(seed)[:, :-1], rows(seed)[:, 1:])  # all micro-batches at once
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.model.parameters(), grad_clip or math.inf)
        for o in plain.optimizers:
            o.step()
            o.zero_grad()
        assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
        assert stats.grad_norm == pytest.approx(norm.item(), rel=1e-5)
        assert norm > 0.05
    for p, q in zip(step.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_named(optimizer):
    step = build(optimizer=optimizer)
    step.gradients(rows())
    step.apply()
    weights = [p.detach().clone() for p in step.model.parameters()]
    moments = [t.clone() for o in step.optimizers for s in o.state.values() for t in s.values()]
    hook = step.model.weights["k_v"].register_hook(lambda gradient: gradient * torch.inf)
    stats = step.gradients(rows(1)).read()
    step.apply()
    hook.remove()
    assert not stats.finite
    assert stats.not_finite == ("weights.k_v",)
    assert all(torch.equal(p, old) for p, old in zip(step.model.parameters(), weights, strict=True))
    after = [t for o in step.optimizers for s in o.state.values() for t in s.values()]
    assert all(torch.equal(t, old) for t, old in zip(after, moments, strict=True))
    assert step.gradients(rows(1)).read().finite


def test_phases_add_up_to_the_step():
    times = Times(torch.device("cpu"))
    for phase in ("forward", "backward", "forward", "backward", "optimizer"):
        sum(range(20_000))
        times.mark(phase)
    milliseconds = times.milliseconds()
    assert list(milliseconds) == ["forward", "backward", "optimizer"]
    assert sum(milliseconds.values()) == pytest.approx(1e3 * (times.points[-1] - times.points[0]))


def count(optimizer="muon", dtype=torch.bfloat16, kernels=frozenset(), **options):
    with torch.device("meta"):
        model = Transformer(SIZES["88m"], vocab_size=49_152)
    model.compute_dtype, model.kernels = dtype, kernels
    return MemoryCount(model, optimizer, sequences=8, seq_len=2048, **options)


def test_memory_count_of_the_88m_model_equals_one_by_hand():
    parts = count().bytes_by_purpose(micro_batch=4)
    assert parts["weights"] == parts["gradients"] == 4 * 88_630_528
    assert parts["moments"] == 4 * (2 * 88_630_528 - 63_438_848)  # one moment for the matrices of the blocks
    assert parts["logits"] == 8192 * 49_152 * (2 + 2 + 12)
    assert count(compiled=True).bytes_by_purpose(micro_batch=4)["logits"] == 8192 * 49_152 * (2 + 2 + 4)
    # q, k, v are 1,024 wide before and after norm and rotation; up before and after its activation.
    assert parts["activations"] == 2 * 8192 * (22 * (5 * 512 + 2 * 1024 + 2 * 2048) + 2 * 512)
    fused = count(kernels=KERNELS).bytes_by_purpose(micro_batch=4)
    assert fused["logits"] == 8192 * 49_152 * 2
    assert count(kernels=KERNELS).bytes_by_purpose(micro_batch=16)["logits"] <= 2**31  # made in chunks
    assert parts["activations"] - fused["activations"] == 2 * 8192 * 22 * 2048


def test_the_largest_micro_batch_that_fits_is_a_divisor_of_the_batch():
    c = count(compiled=True)
    for available, wanted in ((24e9, 8), (0.9 * 24e9 / 2, 4), (5e9, 1), (1e6, 1)):
        found = c.largest_micro_batch(int(available))
        assert found == wanted
        assert found == 1 or c.total_bytes(found) <= 0.9 * available
        assert found == 8 or c.total_bytes(2 * found) > 0.9 * available


def test_running_out_of_memory_names_a_micro_batch_that_fits(train_small, monkeypatch):
    def exhausted(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.00 GiB")

    monkeypatch.setattr(TrainingStep, "gradients", exhausted)
    monkeypatch.setattr(train, "available_bytes", lambda device: 10**9)
    code, folder, out, _ = train_small("run", "--tokens", 512)
    assert code == 1
    assert "--micro-batch 4 does not fit this device; 2 should: 0." in out
    assert "does not fit" in (folder / "summary.json").read_text()


def test_the_speed_of_light_equals_a_count_by_hand():
    step = build()
    gpu = speed.Device(bf16_flops=1e9, bytes_per_second=1e9)
    in_banks = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 2 * 64 * 32)
    others = 50 * 32 + 2 * 2 * 32 + 32 + 2 * 2 * 16
    per_token = 6 * (in_banks + 50 * 32) + 12 * 2 * 32 * 16 // 2
    square, wide, tall = 20 * 32**3, 29 * 16**3, 29 * 32**3  # half products: 20 m³ standard, 29 m³ Gram, 2 restarts
    flops = 64 * per_token + 4 * (square + wide + tall)
    moved = 24 * in_banks + 28 * others
    found = speed.light_seconds(step.model, step_cost(step.optimizers), 64, 16, gpu)
    assert found == pytest.approx((flops + moved) / 1e9)


def test_every_step_line_splits_the_step(train_small):
    code, _, out, _ = train_small("run", "--tokens", 512, "--log-every", 1)
    assert code == 0
    assert "memory of one step: 0." in out
    line = next(line for line in out.splitlines() if line.startswith("step:1/2 train_loss"))
    fields = dict(pair.split(":") for pair in line.split())
    parts = sum(float(fields[f"{phase}_ms"]) for phase in ("forward", "backward", "optimizer"))
    assert 0 < parts <= float(fields["step_ms"]) + 0.2


def test_kernels_on_trains_to_the_same_loss(train_small):
    losses = []
    for kernels in ("auto", "on"):
        code, folder, _, _ = train_small(f"run-{kernels}", "--tokens", 2560, "--kernels", kernels)
        assert code == 0
        losses.append(float((folder / "log.txt").read_text().split("val_loss:")[-1].split()[0]))
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kernels", [frozenset(), KERNELS], ids=["off", "on"])
def test_a_step_never_waits_for_the_gpu(kernels):
    step = build(kernels, device="cuda")
    step.model.compute_dtype = torch.bfloat16
    batch = rows().pin_memory()
    for _ in range(4):  # until Muon's step is captured
        step.gradients(batch)
        step.apply()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            stats = step.gradients(batch)
            step.apply()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stats.read().finite


def test_the_collector_is_frozen_while_training_and_only_then(train_small, before_step):
    frozen = []
    before_step(None, lambda: frozen.append(gc.get_freeze_count()))
    assert train_small("run", "--tokens", 256)[0] == 0
    assert frozen[0] > 1000
    assert gc.get_freeze_count() == 0
