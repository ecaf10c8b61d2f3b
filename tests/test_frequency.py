"""What a validation loss is measured against: deciles by hand, bytes of the text, and both in a run's lines."""

import collections
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer

from corpus import build, shards
from corpus.frequency import deciles_of, token_bytes, training_counts, yardstick_of
from corpus.shards import open_shards
from data import TokenStream, target_counts
from engine.cli import BadInput
from engine.step import evaluate
from model import ModelConfig, Transformer
from tests.conftest import random_documents

UNICODE = [
    "naïve 🙂👩‍👩‍👧 e\u0301",
    "漢字 العربية\u202e",
    "a\x00b\r\n\t  <|endoftext|> x",
    "ordinary words again and again",
]


def tokens_of(folder, split):
    return np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in sorted(folder.glob(f"{split}_*.bin"))])


def lines_of(folder, kind="val"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize(
    ("counts", "deciles"),
    [
        # of 100: id 1 takes 0 to 50, id 3 50 to 80, id 2 80 to 90, id 4 90 to 100; middles 25, 65, 85, 95
        ([0, 50, 10, 30, 10, 0], [9, 2, 8, 6, 9, 9]),
        ([10] * 10, list(range(10))),
        ([1, 3], [8, 3]),  # of 4: id 1 from 0 to 3, id 0 from 3 to 4
        ([0, 0], [0, 0]),
    ],
)
def test_deciles_agree_with_a_hand_count(counts, deciles):
    assert deciles_of(np.array(counts)).tolist() == deciles


def test_each_decile_holds_a_tenth_of_the_training_tokens():
    counts = (1e6 / np.arange(1, 5001)).astype(np.int64)[np.random.default_rng(0).permutation(5000)]
    deciles = deciles_of(counts)
    shares = np.array([counts[deciles == decile].sum() for decile in range(10)]) / counts.sum()
    assert np.abs(shares - 0.1).max() <= counts.max() / counts.sum()
    least = [counts[deciles == decile].min() for decile in range(10)]
    most = [counts[deciles == decile].max() for decile in range(10)]
    assert all(least[decile] >= most[decile + 1] for decile in range(9))


def test_training_tokens_are_counted_over_shards_up_to_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 5000)
    build.build_shards(lambda: iter(random_documents(60)), tmp_path / "s", source="t", vocab_size=300, val_fraction=0.2)
    opened, tokens = open_shards(tmp_path / "s"), tokens_of(tmp_path / "s", "train")
    assert len(opened.files["train"]) >= 2
    for most in (10**8, 5000, 7001):
        found = collections.Counter(tokens[:most].tolist())
        assert training_counts(opened, most).tolist() == [found[token] for token in range(opened.vocab_size)]


def test_bytes_of_tokens_add_up_to_those_of_the_text(tmp_path):
    documents = [f"{i} {text}" for i in range(30) for text in UNICODE] + random_documents(20)
    build.build_shards(lambda: iter(documents), tmp_path / "s", source="t", vocab_size=400, val_fraction=0.2)
    sizes = token_bytes(tmp_path / "s" / "tokenizer.json", open_shards(tmp_path / "s").vocab_size)
    found = sum(int(sizes[tokens_of(tmp_path / "s", split)].sum()) for split in ("train", "val"))
    assert found == sum(len(document.encode()) for document in documents)


def test_added_tokens_count_their_text_and_special_ones_nothing(shards_folder, tmp_path):
    tokenizer = Tokenizer.from_file(str(shards_folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("ÄÖÜ", special=False)])
    tokenizer.add_special_tokens(["<|im_start|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    sizes = token_bytes(tmp_path / "tokenizer.json", size + 3)  # a padded vocabulary
    assert sizes[tokenizer.token_to_id("ÄÖÜ")] == 6
    assert sizes[tokenizer.token_to_id("<|im_start|>")] == sizes[tokenizer.token_to_id("<|endoftext|>")] == 0
    assert sizes[size:].tolist() == [0, 0, 0]
    assert token_bytes(tmp_path / "tokenizer.json", size - 1) is None


@pytest.mark.parametrize(
    "content",
    [
        {"decoder": None, "model": {"vocab": {"a": 0}}, "added_tokens": []},
        {"decoder": {"type": "Metaspace"}, "model": {"vocab": {"a": 0}}, "added_tokens": []},
        {"decoder": {"type": "ByteLevel"}, "model": {"vocab": [["a", 0.0]]}, "added_tokens": []},
        {},
    ],
)
def test_a_tokenizer_that_does_not_tell_its_bytes_is_left_out(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert token_bytes(tmp_path / "tokenizer.json", 10) is None
    assert token_bytes(tmp_path / "absent.json", 10) is None


def test_a_tokenizer_that_is_not_json_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BadInput, match=r"tokenizer\.json: not readable"):
        token_bytes(tmp_path / "tokenizer.json", 10)


def test_the_unigram_loss_is_that_of_smoothed_training_frequencies(shards_folder):
    opened, train = open_shards(shards_folder), tokens_of(shards_folder, "train").tolist()
    targets = tokens_of(shards_folder, "val").tolist()[1 : 512 + 1]
    found = yardstick_of(opened, target_counts(TokenStream(opened, "val"), 530, 32))
    counts, total = collections.Counter(train), len(train) + opened.vocab_size
    expected = [-math.log((counts[token] + 1) / total) for token in targets]
    assert found.unigram == pytest.approx(sum(expected) / len(expected), rel=1e-12)


def test_a_loss_is_to_the_bit_what_one_cross_entropy_gives():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(32, 2, 2, 1, 64, seq_len=128), vocab_size=3001)
    batches = [np.random.default_rng(i).integers(0, 3001, (8, 129), dtype=np.int32) for i in range(3)]
    found = evaluate(model, batches, torch.zeros(3001, dtype=torch.long))
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            rows = torch.from_numpy(batch).long()
            total += F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
    assert found.loss == (total / (3 * 8 * 128)).item()
    assert found.by_decile[0] == pytest.approx(found.loss, rel=1e-6)
    assert all(math.isnan(loss) for loss in found.by_decile[1:])


def test_a_run_logs_the_loss_of_each_decile_and_bits_per_byte(train_small, shards_folder):
    code, folder, out, _ = train_small("run", "--tokens", 20 * 256, "--eval-tokens", 1000)
    assert code == 0
    # The same once more: the final weights, each token's loss by itself, sorted counts, the tokenizer's own decoder.
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    config = ModelConfig(32, 2, 2, 1, 64, seq_len=32, ffn="relu2", qk_norm=True)
    vocab = len(checkpoint["model"]["embedding"])
    model = Transformer(config, vocab)
    model.load_state_dict(checkpoint["model"])
    val = torch.from_numpy(tokens_of(shards_folder, "val").astype(np.int64))
    windows = torch.stack([val[32 * i : 32 * i + 33] for i in range(1000 // 32)])
    with torch.no_grad():
        losses = F.cross_entropy(model.eval()(windows[:, :-1]).mT, windows[:, 1:], reduction="none").flatten().double()
    counts = collections.Counter(tokens_of(shards_folder, "train").tolist())
    by_decile, before, total = [[] for _ in range(10)], 0, sum(counts.values())
    for token in sorted(range(vocab), key=lambda token: (-counts[token], token)):
        decile = min(9, math.floor(10 * (before + counts[token] / 2) / total))
        by_decile[decile] += losses[windows[:, 1:].flatten() == token].tolist()
        before += counts[token]
    last = lines_of(folder)[-1]
    assert last["val_loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert last["val_loss_by_decile"] == pytest.approx([np.mean(part) for part in by_decile], rel=1e-5)
    tokenizer = Tokenizer.from_file(str(shards_folder / "tokenizer.json"))
    text = tokenizer.decode(windows[:, 1:].flatten().tolist(), skip_special_tokens=True)
    bits = losses.sum().item() / math.log(2) / len(text.encode())
    assert last["val_bpb"] == pytest.approx(bits, rel=1e-6)
    assert f"val_bpb:{last['val_bpb']:.4f}" in out
    summary, settings = (json.loads((folder / name).read_text()) for name in ("summary.json", "config.json"))
    assert summary["final_val_bpb"] == last["val_bpb"]
    assert summary["unigram_val_loss"] == settings["unigram_val_loss"] > 0


def test_without_a_tokenizer_there_are_no_bits_per_byte(train_small, shards_folder, tmp_path):
    shutil.copytree(shards_folder, tmp_path / "s")
    (tmp_path / "s" / "tokenizer.json").unlink()
    code, folder, out, _ = train_small("run", "--tokens", 512, data_folder=tmp_path / "s")
    assert code == 0
    assert "bpb" not in out
    assert all("val_bpb" not in line and len(line["val_loss_by_decile"]) == 10 for line in lines_of(folder))
    assert "final_val_bpb" not in json.loads((folder / "summary.json").read_text())
