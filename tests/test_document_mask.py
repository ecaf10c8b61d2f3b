"""Attention within documents: nothing passes from one to the next, and FlexAttention sees the mask that SDPA does."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention as flex

import model as model_file
from corpus import shards
from corpus.shards import open_shards
from engine.cli import BadInput
from engine.ranks import Rank
from engine.step import TrainingStep
from model import FLEX_MIN_HEAD_WIDTH, SIZES, ModelConfig, Transformer
from settings import Settings, resolve
from tests.test_train import lines

START = 3
DENSE = ModelConfig(d_model=32, layers=2, heads=4, kv_heads=4, d_ff=48, seq_len=24, ffn="relu2", qk_norm=True)
KINDS = {
    "dense": DENSE,
    "shared heads": dataclasses.replace(DENSE, kv_heads=2),
    "experts": dataclasses.replace(DENSE, kv_heads=2, experts=4),
}
CUTS = (0, 7, 8, 20, 24)  # the end of a document, one that is empty but for its start, two more


def build(kind="shared heads", start=START, **changes):
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(KINDS[kind], **changes), vocab_size=50)
    model.document_start = start
    return model


def packed_row():
    """(1, 24) tokens in documents that begin at CUTS[1:-1]; the first is without its start."""
    row = torch.randint(START + 1, 50, (1, 24), generator=torch.Generator().manual_seed(1))
    row[0, CUTS[1:-1]] = START
    return row


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_changed_token_changes_no_logit_of_a_later_document(kind):
    model, row = build(kind), packed_row()
    rounding = 1e-6 if kind == "experts" else 0.0  # of a matmul over as many rows as an expert was sent
    before = model(row)
    for first, after in itertools.pairwise(CUTS):
        for place in range(first, after):
            changed = row.clone()
            changed[0, place] = START + 1 + (row[0, place] - START) % 46 if row[0, place] != START else START + 1
            difference = (model(changed) - before).abs().amax(-1)[0]
            assert difference[place] > 1e-3
            if row[0, place] != START:  # a start that goes joins two documents
                assert difference[place:after].min() > 1e-5
            assert (difference[after:] <= rounding).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_document_sends_no_gradient_to_an_earlier_one(kind):
    model, row, seen = build(kind), packed_row(), []
    model._drop = lambda x, _: seen.append(x) or x  # the embedded tokens are the first that it gets
    logits = model(row)
    (gradient,) = torch.autograd.grad(logits[0, 19].logsumexp(-1), seen[0])
    sizes = gradient[0].norm(dim=-1)
    assert torch.equal(sizes[:8], torch.zeros(8))
    assert sizes[8:20].min() > 1e-5
    assert torch.equal(sizes[20:], torch.zeros(4))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_packed_window_equals_the_unmasked_model_on_each_document_alone(kind):
    model, row = build(kind), packed_row().repeat(2, 1)
    row[1] = row[1].roll(5)  # documents of a batch end at different places
    packed = model(row)
    model.document_start = None
    for tokens, logits in zip(row, packed, strict=True):
        starts = [0, *(i for i in range(1, 24) if tokens[i] == START), 24]
        for first, after in itertools.pairwise(starts):
            alone = model(tokens[None, first:after])[0]
            torch.testing.assert_close(logits[first:after], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(row), packed, atol=1e-2)


def test_without_the_flag_no_mask_is_built(monkeypatch):
    def forbidden(*arguments):
        raise AssertionError("a mask was built")

    monkeypatch.setattr(model_file, "document_mask", forbidden)
    assert Settings().doc_mask is False
    fresh = Transformer(DENSE, vocab_size=50)
    fresh(packed_row())
    fresh.document_start = START
    with pytest.raises(AssertionError, match="a mask was built"):
        fresh(packed_row())


def test_a_row_of_one_document_is_plain_causal_attention():
    row = packed_row()
    row[0, 1:][row[0, 1:] == START] = START + 1
    torch.testing.assert_close(build()(row), build(start=None)(row), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "fused"), [("shared heads", False), ("shared heads", True), ("experts", True)])
def test_it_compiles_without_a_graph_break_once_and_to_the_same_gradients(kind, fused, monkeypatch):
    if fused:  # on a CPU FlexAttention refuses a backward pass, though what it traces to has one
        monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
        monkeypatch.setattr(model_file, "fuses_masks", lambda x: torch.compiler.is_compiling())
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph.code)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    seq_len, found = 150, []  # more than one block
    for compiled in (False, True):
        model = build(kind, seq_len=seq_len, layers=1)
        step = TrainingStep(model, [], micro_batch=2, compiled=compiled, backend=counting)
        for seed in range(3):
            model.zero_grad()
            rows = torch.randint(12, (2, seq_len + 1), generator=torch.Generator().manual_seed(seed))
            found.append((step.gradients(rows).read().loss, [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(found[3:], found[:3], rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1
    assert torch._dynamo.utils.counters["graph_break"] == {}
    assert ("higher_order.flex_attention" in graphs[0]) == fused


def test_flex_attention_is_for_models_compiled_for_a_gpu(monkeypatch):
    for on_gpu, compiling in itertools.product((False, True), repeat=2):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda answer=compiling: answer)
        assert model_file.fuses_masks(SimpleNamespace(is_cuda=on_gpu)) == (on_gpu and compiling)


def test_training_and_validation_stay_within_documents(train_small, shards_folder, monkeypatch):
    starts = set()
    forward = Transformer.forward
    monkeypatch.setattr(
        Transformer,
        "forward",
        lambda self, *a: (starts.add((self.training, self.document_start)), forward(self, *a))[1],
    )
    found = {}
    for name, flags in (("plain", ()), ("masked", ("--doc-mask",))):
        starts.clear()
        code, folder, _, err = train_small(name, "--tokens", 768, *flags)
        assert code == 0
        assert "Warning" not in err
        eot_id = json.loads((shards_folder / "meta.json").read_text())["eot_id"] if flags else None
        assert starts == {(True, eot_id), (False, eot_id)}
        config = json.loads((folder / "config.json").read_text())
        assert config["doc_mask"] is bool(flags)
        first = lines(folder, kind="train")[0]["train_loss"], lines(folder, kind="val")[0]["val_loss"]
        found[name] = (config["config_hash"], *first)
    assert all(a != b for a, b in zip(*found.values(), strict=True))


def test_the_start_of_documents_is_found_or_none(shards_folder, tmp_path):
    meta = json.loads((shards_folder / "meta.json").read_text())
    assert open_shards(shards_folder).eot_id == meta["eot_id"]

    def write(header_vocab_size, header_eot_id, **described):
        header = np.zeros(256, dtype="<i4")
        header[:5] = shards.MAGIC, shards.VERSION, 4, header_vocab_size, header_eot_id
        for split in ("train", "val"):
            (tmp_path / f"{split}_000000.bin").write_bytes(header.tobytes() + np.zeros(4, dtype="<u2").tobytes())
        names = dict.fromkeys(("train_000000.bin", "val_000000.bin"), "")
        described = {"vocab_size": 9, "fingerprint": "f", "sha256": names} | described
        (tmp_path / "meta.json").write_text(json.dumps(described))
        return open_shards(tmp_path).eot_id

    assert write(9, 5, eot_id=0) == 0
    assert write(9, 5) == 5
    assert write(0, 0) is None
    assert write(9, 5, eot_id=9) is None
    assert write(0, 0, vocab_size=50_257) == 50_256
    (tmp_path / "meta.json").unlink()
    assert open_shards(tmp_path).eot_id == 50_256  # as published, without a description


def test_shards_that_do_not_say_where_documents_start_are_refused(train_small, shards_folder, tmp_path):
    silent = tmp_path / "silent"
    silent.mkdir()
    meta = json.loads((shards_folder / "meta.json").read_text())
    (silent / "meta.json").write_text(json.dumps({key: value for key, value in meta.items() if key != "eot_id"}))
    for path in shards_folder.glob("*.bin"):
        content = bytearray(path.read_bytes())
        content[4 * shards.SLOT_VOCAB_SIZE : 4 * shards.SLOT_EOT_ID + 4] = bytes(8)
        (silent / path.name).write_bytes(content)
    code, folder, _, err = train_small("run", "--tokens", 256, "--doc-mask", data_folder=silent)
    assert code == 2
    assert "--doc-mask" in err
    assert "eot_id" in err
    assert len(err.splitlines()) == 1
    assert not folder.exists()
    assert train_small("run", "--tokens", 256, data_folder=silent)[0] == 0


def test_heads_too_narrow_for_flex_attention_are_refused_where_it_would_run(shards_folder, monkeypatch):
    assert all(config.head_width >= FLEX_MIN_HEAD_WIDTH for config in SIZES.values())
    given = {"model": "nano", "heads": 16, "kv_heads": 16, "doc_mask": True, "data": shards_folder}
    resolve(Settings(**given), Rank())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    with pytest.raises(BadInput, match=r"--doc-mask: .* 16 wide, not 8"):
        resolve(Settings(**given), Rank())
    for other in ({"compile": "off"}, {"doc_mask": False}, {"heads": 8, "kv_heads": 8}):
        resolve(Settings(**given | other), Rank())
