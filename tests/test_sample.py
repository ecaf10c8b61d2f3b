"""A trained run read back: its text against a slow loop without a cache, its scores against numpy, refusals."""

import io
import json
import math
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import report
import sample
import train
from analysis.scores import Scores, choice_row, lead_over
from corpus import build
from corpus.codec import Codec
from data import TokenStream
from engine import files
from engine.scoring import log_likelihoods
from engine.trained import open_trained
from settings import trained_model
from tests.conftest import SMALL_MODEL, random_documents
from tests.test_generate import slow_text


@pytest.fixture(scope="module")
def run(shards_folder, tmp_path_factory):
    """A run of the small model that keeps some projections from Muon, so that they have banks of their own."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_plots", lambda path: None)
        patch.setattr(train, "stop_on", lambda signals: None)
        where = ("--data", str(shards_folder), "--runs-dir", str(folder), "--name", "run")
        rest = ("--tokens", str(30 * 256), "--spectra-every", "0", "--muon-on", "q,up")
        patch.setattr(sys, "argv", ["train.py", *SMALL_MODEL, *where, *rest])
        assert train.main() == 0
    return folder / "run"


@pytest.fixture
def words(shards_folder):
    """Words of the training text."""
    return Tokenizer.from_file(str(shards_folder / "tokenizer.json")).decode(
        np.fromfile(shards_folder / "train_000000.bin", "<u2", 12, offset=1026).tolist()
    )


def test_weights_come_back_in_the_banks_of_training(run, shards_folder):
    """The model that is built anew gives the validation loss that training logged."""
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["val_loss"] for line in logged if line["kind"] == "val"}
    for which in ("best", "last"):
        trained = open_trained(run, which)
        assert set(trained.weights) >= {"weights.q", "weights.up"}
        tokens = torch.from_numpy(np.fromfile(shards_folder / "val_000000.bin", "<u2", 513, offset=1024).astype(int))
        with torch.no_grad():
            logits = trained_model(trained)(tokens[:512].view(16, 32)).flatten(0, 1)
        assert torch.nn.functional.cross_entropy(logits, tokens[1:]).item() == pytest.approx(
            losses[trained.step], rel=1e-5
        )


def test_text_goes_to_stdout_and_all_else_to_stderr(run, run_main, shards_folder, words):
    code, out, err = run_main(sample.main, run, "--prompt", words, "--tokens", 50, "--temperature", 0)
    assert code == 0
    encoder = Tokenizer.from_file(str(shards_folder / "tokenizer.json"))
    prompt = [0, *encoder.encode(words).ids]
    ids = slow_text(trained_model(open_trained(run)), prompt, 50, end=0)
    assert out == encoder.decode(prompt + ids) + "\n"
    assert f"{run / 'best.pt'}: step" in err
    assert "context of 32 tokens is full" in err


def test_the_same_seed_gives_the_same_text_whatever_is_written_next_to_it(run, run_main, tmp_path, words):
    flags = ("--tokens", 20, "--samples", 3, "--seed", 5)
    _, printed, _ = run_main(sample.main, run, "--prompt", words, *flags)
    (tmp_path / "prompts.txt").write_text(f"{words}\nhello\n\n{words[:3]}\n")
    code, nothing, _ = run_main(
        sample.main, run, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "o.jsonl", *flags
    )
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert (code, nothing) == (0, "")
    assert printed == "".join(f"{words}{line['text']}\n" for line in lines[:3])
    assert [line["prompt"] for line in lines] == [words] * 3 + ["hello"] * 3 + [words[:3]] * 3
    assert [line["sample"] for line in lines] == [0, 1, 2] * 3
    assert all(line["ended"] or line["tokens"] == 20 for line in lines)
    assert len({line["text"] for line in lines}) > 6
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in (words, "hello")))
    _, again, _ = run_main(sample.main, run, "--prompts", tmp_path / "prompts.jsonl", *flags)
    assert [json.loads(line) for line in again.splitlines()] == lines[:6]
    _, other, _ = run_main(sample.main, run, "--prompt", words, "--tokens", 20, "--seed", 6)
    assert other not in printed


def test_each_line_of_stdin_is_continued(run, run_main, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc\n\nde\n"))
    code, out, err = run_main(sample.main, run, "--interactive", "--tokens", 3)
    assert code == 0
    assert [line[:2] for line in out.splitlines()] == ["ab", "de"]
    assert "error: line 2: is empty" in err


def test_no_half_letter_is_printed(run, capsys, monkeypatch):
    codec = sample.codec_of(open_trained(run))
    prompt, ids = codec.prompt("a", ""), codec.ids("é🙂x漢", "")
    assert len(ids) >= 8  # of several bytes each
    cut = [token if n + 1 < len(ids) else None for n, token in enumerate(ids)]  # ends within the last letter
    monkeypatch.setattr(sample, "continued", lambda *_: ([token] for token in cut))
    printed = []
    monkeypatch.setattr("builtins.print", lambda text, **_: printed.append(text))
    sample.stream(None, None, codec, [sample.Text(0, "a", prompt, 0)])
    assert "".join(printed) == "aé🙂x\ufffd\n"
    assert [part for part in printed if part][:3] == ["a", "é", "🙂"]
    assert all("\ufffd" not in part for part in printed[:-1])


def test_samples_of_the_best_checkpoint_end_the_report(run, run_main, tmp_path, no_drawing, shards_folder):
    written = json.loads((run / "samples.json").read_text())
    assert (written["checkpoint"], written["step"]) == ("best.pt", open_trained(run).step)
    encoder = Tokenizer.from_file(str(shards_folder / "tokenizer.json"))
    val = np.fromfile(shards_folder / "val_000000.bin", "<u2", offset=1024)
    starts = np.flatnonzero(val == 0)[:3]  # every document here is long enough
    assert [s["prompt"] for s in written["samples"]] == [encoder.decode(val[at : at + 8].tolist()) for at in starts]
    assert all(s["text"] for s in written["samples"])
    assert run_main(report.main, run, "--out", tmp_path / "report")[0] == 0
    page = (tmp_path / "report" / "report.md").read_text()
    last = page[page.rindex("\n## ") :]
    assert last.startswith("\n## Samples\n")
    assert "run: sample 3 of 3 from best.pt" in last
    assert all((s["prompt"] + s["text"]).splitlines()[0] in last for s in written["samples"])
    damaged = shutil.copytree(run, tmp_path / "damaged")
    (damaged / files.SAMPLES).write_text('{"checkpoint": "best.pt", "samples": [{"prompt": 1, "text": ""}]}')
    code, _, err = run_main(report.main, damaged, "--out", tmp_path / "other")
    assert (code, err) == (2, f"error: {damaged / files.SAMPLES}: sample 1: prompt is 1\n")


def test_a_run_whose_validation_documents_are_short_ends_without_samples(run, monkeypatch, capsys):
    monkeypatch.setattr(sample, "openings", lambda *arguments: [])
    (run / "samples.json").replace(run / "kept.json")
    sample.write_samples(run, torch.device("cpu"))
    assert "no samples:" in capsys.readouterr().err
    assert not (run / "samples.json").exists()
    (run / "kept.json").replace(run / "samples.json")


def test_a_run_that_never_got_better_has_samples_of_its_last_weights(run, tmp_path):
    last = shutil.copytree(run, tmp_path / "last")
    (last / "best.pt").unlink()
    sample.write_samples(last, torch.device("cpu"))
    assert json.loads((last / "samples.json").read_text())["checkpoint"] == "checkpoint.pt"


def test_a_prompt_that_ends_inside_a_letter_loses_none(shards_folder):
    codec = Codec(str(shards_folder / "tokenizer.json"), 320)
    ids = codec.prompt("a漢b", "--prompt")
    cuts = [
        sample.words_of(codec, ids[:at]) + sample.continuation(codec, ids[:at], ids[at:]) for at in range(1, len(ids))
    ]
    assert set(cuts) == {"a漢b"}
    assert len(cuts) == 5  # three bytes of one letter


def test_writing_text_while_training_changes_nothing(train_small, monkeypatch):
    """With dropout, whose random numbers would shift; and the time that it takes is not training's."""
    flags = ("--tokens", 6 * 256, "--spectra-every", 0, "--dropout", 0.1)
    assert train_small("without", *flags)[0] == 0
    line = sample.Greedy.line
    monkeypatch.setattr(sample.Greedy, "line", lambda self: time.sleep(1) or line(self))
    code, folder, out, _ = train_small("with", *flags, "--sample-every", 2)
    assert code == 0
    a, b = (torch.load(folder.parent / name / "checkpoint.pt", weights_only=True) for name in ("without", "with"))
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    assert torch.equal(a["rng"]["torch"], b["rng"]["torch"])
    assert a["config"]["config_hash"] == b["config"]["config_hash"]
    lines = [line for line in (folder / "log.txt").read_text().splitlines() if " sample:" in line]
    assert [line.split()[0] for line in lines] == ["step:2/6", "step:4/6", "step:6/6"]
    assert all(line in out for line in lines)
    trained = open_trained(folder, "last")
    codec = sample.codec_of(trained)
    prompt = sample.openings(TokenStream(sample.open_shards(trained.data), "val"), 0, 1)[0]
    ids = slow_text(trained_model(trained), prompt, 32, end=0)
    assert (
        lines[-1]
        == f"step:6/6 sample:{codec.text(prompt)!r} -> {codec.text(prompt + ids)[len(codec.text(prompt)) :]!r}"
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["train_seconds"] < 3 < summary["wall_seconds"]  # three lines of a second each


def test_the_model_in_training_stays_in_training(run, shards_folder):
    trained = open_trained(run)
    model, shards = trained_model(trained).train(), sample.open_shards(shards_folder)
    sample.Greedy(model, shards, TokenStream(shards, "val"), shards_folder).line()
    assert model.training


# Evaluation


def numpy_scores(run, tokens, width=32):
    """Losses in nats and hits of all tokens but the first, window by window, by numpy from the logits."""
    model, losses, hits = trained_model(open_trained(run)), [], []
    for first in range(0, len(tokens) - 1, width):
        window = tokens[first : first + width + 1]
        with torch.no_grad():
            logits = model(torch.tensor([window[:-1]]))[0].double().numpy()
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        losses += [-math.log(p[i, token]) for i, token in enumerate(window[1:])]
        hits += [int(p[i].argmax() == token) for i, token in enumerate(window[1:])]
    return losses, hits


def table(out):
    """The rows of a printed table as dicts; columns are two spaces or more apart."""
    header, *rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in out.splitlines()]
    return [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]


@pytest.fixture
def other(run, tmp_path):
    """A copy of the run with other weights."""
    folder = shutil.copytree(run, tmp_path / "other")
    contents = torch.load(folder / "best.pt", weights_only=True)
    contents["model"]["embedding"] *= 1.1
    torch.save(contents, folder / "best.pt")
    return folder


def test_a_runs_own_validation_tokens_give_the_loss_it_logged(run, run_main):
    code, out, _ = run_main(sample.main, "evaluate", run, "--tokens", 512, "--checkpoint", "last")
    (row,) = table(out)
    summary = json.loads((run / "summary.json").read_text())
    assert code == 0
    assert float(row["loss"]) == pytest.approx(summary["final_val_loss"], abs=6e-5)
    assert float(row["accuracy"]) == pytest.approx(summary["final_val_accuracy"], abs=6e-5)
    assert float(row["bits/byte"]) == pytest.approx(summary["final_val_bpb"], abs=6e-5)


def test_scores_of_a_text_are_those_of_numpy_with_intervals_over_documents(run, other, run_main, tmp_path, words):
    documents = [words, "hello there", f"{words[::-1]} ä🙂", "abc " * 30]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    code, out, _ = run_main(sample.main, "evaluate", run, other, "--text", tmp_path / "t.jsonl")
    assert code == 0
    codec = sample.codec_of(open_trained(run))
    lengths = [1 + len(codec.ids(text, "")) for text in documents]
    tokens = [token for text in documents for token in (0, *codec.ids(text, ""))]
    # The last target of each document but the last is the token that ends it.
    spans = np.split(np.arange(len(tokens) - 1), np.cumsum(lengths)[:-1])
    sizes = np.array([len(text.encode()) for text in documents])
    by_run, quantile = [], 3.182446  # of t with 3 degrees of freedom at 97.5 %
    for folder, row in zip((run, other), table(out), strict=True):
        losses, hits = map(np.array, numpy_scores(folder, tokens))
        assert float(row["loss"]) == pytest.approx(losses.mean(), abs=6e-5)
        assert float(row["perplexity"].replace(",", "")) == pytest.approx(math.exp(losses.mean()), abs=6e-3)
        assert float(row["accuracy"]) == pytest.approx(hits.mean(), abs=6e-5)
        assert float(row["bits/byte"]) == pytest.approx(losses.sum() / math.log(2) / sizes.sum(), abs=6e-5)
        assert (row["tokens"], row["documents"]) == (str(len(losses)), "4")
        # The error of a ratio estimator: sqrt(n / (n - 1) sum of (a - r b)²) / sum of b.
        for values, weights, key in (
            (losses, lengths, "loss"),
            (hits, lengths, "accuracy"),
            (losses / math.log(2), sizes, "bits/byte"),
        ):
            a = np.array([values[span].sum() for span in spans])
            b = np.array([len(span) for span in spans]) if weights is lengths else np.array(weights)
            half = quantile * math.sqrt(4 / 3 * sum((a - a.sum() / b.sum() * b) ** 2)) / b.sum()
            low, high = map(float, row[f"95 % ({key})"].split(" to "))
            assert (high - low) / 2 == pytest.approx(half, abs=6e-5)
        by_run.append(losses)
    sentence = out.splitlines()[-1]
    assert sentence.startswith(f"other minus run: loss {by_run[1].mean() - by_run[0].mean():+.4f} (95 % ")
    assert "paired t-test over 4 documents" in sentence
    # Paired: documents that are hard for one are hard for the other.
    gaps = by_run[1] - by_run[0]
    a, b = np.array([gaps[span].sum() for span in spans]), np.array([len(span) for span in spans])
    half = quantile * math.sqrt(4 / 3 * sum((a - a.sum() / b.sum() * b) ** 2)) / b.sum()
    assert f"{gaps.mean() - half:+.4f} to {gaps.mean() + half:+.4f}" in sentence


def test_runs_with_other_tokens_are_compared_by_their_bits_per_byte():
    a = Scores("a", 1, np.arange(3), *np.array([[2, 2], [3.0, 5.0], [4.0, 8.0], [1, 1], [4, 4]]))
    b = Scores("b", 1, np.arange(2), *np.array([[1, 1], [3.0, 5.0], [8.0, 8.0], [1, 1], [4, 4]]))
    assert lead_over(b, a).startswith("b minus a: bits per byte +0.5000 (95 % ")
    unknown = Scores("u", 1, np.arange(2), *np.array([[1, 1], [3.0, 5.0], [8.0, 8.0], [1, 1], [0, 0]]))
    assert lead_over(unknown, a).endswith("do not compare")


def test_the_likelihood_of_a_choice_is_that_of_its_tokens_behind_the_context():
    """A model that knows only the token before: ln p of each pair is in a table."""
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))

    class Pairs(torch.nn.Module):
        embedding = torch.zeros(1)

        def forward(self, tokens):
            assert tokens.shape[1] <= 5
            return logits[tokens]

    log_p = logits.log_softmax(-1)
    expected = [log_p[3, 1] + log_p[1, 2], log_p[3, 5]]
    for context in ([0, 4, 3], [3], [1, 2, 1, 2, 1, 2, 3]):
        assert log_likelihoods(Pairs(), context, [[1, 2], [5]], 5) == pytest.approx([float(x) for x in expected])
    with pytest.raises(ValueError, match="a choice of 6 tokens does not fit"):
        log_likelihoods(Pairs(), [0], [[1] * 6, [1]], 5)


def test_answers_are_counted_by_likelihood_per_byte_and_in_all():
    likelihoods, sizes = [[-4.0, -6.0], [-1.0, -2.0, -3.0], [-5.0, -5.5]], [[2, 6], [1, 1, 1], [5, 5]]
    row = choice_row("x", 7, likelihoods, sizes, answers=[1, 0, 1])
    # Per byte -2 against -1, so right; the second right; the third wrong. In all only the second is right.
    assert (row["accuracy"], row["not normalised"], row["questions"]) == ("0.6667", "0.3333", "3")
    assert row["chance"] == f"{(1 / 2 + 1 / 3 + 1 / 2) / 3:.4f}"
    z, n, p = 1.959964, 3, 2 / 3  # Wilson's interval
    middle, half = (p + z * z / 2 / n), z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    assert row["95 %"] == f"{(middle - half) / (1 + z * z / n):.4f} to {(middle + half) / (1 + z * z / n):.4f}"


def test_questions_in_our_form_and_in_that_of_hellaswag_get_the_same_answers(run, run_main, tmp_path, words):
    asked = [(words, ["abc", "hello there", words[:9]], 2), ("x y", ["ab", "cdefgh"], 0), (words[::-1], ["q", "rs"], 1)]
    ours = [{"context": context, "choices": choices, "answer": answer} for context, choices, answer in asked]
    theirs = [
        {"ind": 4, "ctx_a": "A", "ctx": context, "endings": choices, "label": label, "split": "val", "source_id": "w~1"}
        for (context, choices, _), label in zip(asked, (2, "0", 1), strict=True)  # a text in the hub's copy
    ]
    tables = []
    for name, lines in (("ours", ours), ("theirs", theirs)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        code, out, _ = run_main(sample.main, "evaluate", run, "--choices", tmp_path / name)
        assert code == 0
        tables.append(table(out))
    assert tables[0] == tables[1]
    codec, right = sample.codec_of(open_trained(run)), 0
    for context, choices, answer in asked:
        scores = []
        for choice in choices:
            ids = [0, *codec.ids(context, ""), *codec.ids(f" {choice}", "")]
            losses, _ = numpy_scores(run, ids[-33:], width=32)
            scores.append(-sum(losses[-len(codec.ids(f" {choice}", "")) :]) / len(choice))
        right += int(np.argmax(scores)) == answer
    assert tables[0][0]["accuracy"] == f"{right / 3:.4f}"


# Refusals


def without_best(folder, tmp_path):
    (folder / "best.pt").unlink()


def damaged(folder, tmp_path):
    content = bytearray((folder / "best.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "best.pt").write_bytes(content)


def weights_of_another_model(folder, tmp_path):
    contents = torch.load(folder / "best.pt", weights_only=True)
    contents["config"]["layers"] = 3
    torch.save(contents, folder / "best.pt")


def other_shards(folder, tmp_path):
    texts = random_documents(40, seed=5)
    build.build_shards(lambda: iter(texts), tmp_path / "others", source="x", vocab_size=320, val_fraction=0.2)


def moved_shards(folder, tmp_path):
    contents = torch.load(folder / "best.pt", weights_only=True)
    contents["config"]["data"] = str(tmp_path / "gone")
    torch.save(contents, folder / "best.pt")


def larger_tokenizer(folder, tmp_path):
    contents = json.loads((folder.parent / "shards" / "tokenizer.json").read_text())
    contents["added_tokens"].append(contents["added_tokens"][0] | {"id": 5000, "content": "zyzzy", "special": False})
    (tmp_path / "larger.json").write_text(json.dumps(contents))


def lines(*rows):
    def write(folder, tmp_path):
        (tmp_path / "lines.jsonl").write_text("".join(f"{row}\n" for row in rows))

    return write


def empty_text(folder, tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"text": ""}\n')


GOOD = '{"context": "a", "choices": ["b", "c"], "answer": 1}'
REFUSALS = [
    (None, ["RUN"], "give one of --prompt, --prompts and --interactive"),
    (None, ["TMP/none", "--prompt", "a"], "TMP/none: no such run folder"),
    (None, ["RUN", "--prompt", ""], "--prompt: is empty"),
    (None, ["RUN", "--prompt", "a\udcff"], "--prompt: is not Unicode text"),
    (None, ["RUN", "--prompt", "a", "--top-p", "0"], "--top-p 0.0: must be above 0 and at most 1"),
    (None, ["RUN", "--prompt", "a", "--temperature", "nan"], "--temperature nan: must be 0 or a positive number"),
    (None, ["RUN", "--prompt", "a", "--out", "TMP/x"], "--out TMP/x: goes with --prompts"),
    (None, ["RUN", "--prompts", "TMP/none"], "TMP/none: no such file"),
    (lines("", ""), ["RUN", "--prompts", "TMP/lines.jsonl"], "TMP/lines.jsonl: holds no line of text"),
    (lines('{"prompt": "a"}', "{"), ["RUN", "--prompts", "TMP/lines.jsonl"], "lines.jsonl: line 2: is not JSON"),
    (lines('{"text": "a"}'), ["RUN", "--prompts", "TMP/lines.jsonl"], 'line 1: its "prompt" is not a text'),
    (lines(GOOD), ["RUN", "--prompts", "TMP/lines.jsonl", "--out", "TMP/lines.jsonl"], "lines.jsonl: exists"),
    (without_best, ["RUN", "--prompt", "a"], "run: has no best.pt; use --checkpoint last"),
    (damaged, ["RUN", "--prompt", "a"], "run/best.pt: damaged (a checksum in it does not match)"),
    (weights_of_another_model, ["RUN", "--prompt", "a"], "run/best.pt: its weights do not fit its settings"),
    (moved_shards, ["RUN", "--prompt", "a"], "is not there; name one with --tokenizer"),
    (other_shards, ["RUN", "--prompt", "a", "--data", "TMP/others"], "TMP/others: not the shards of"),
    (larger_tokenizer, ["RUN", "--prompt", "zyzzy", "--tokenizer", "TMP/larger.json"], "--prompt: holds token 320 of"),
    (None, ["evaluate"], "name at least one run folder"),
    (None, ["evaluate", "RUN", "--data", "TMP/none"], "TMP/none: no such folder of shards"),
    (None, ["evaluate", "RUN", "--text", "TMP/none"], "TMP/none: no such file or folder"),
    (empty_text, ["evaluate", "RUN", "--text", "TMP/lines.jsonl"], "too short, it holds no token to predict"),
    (None, ["evaluate", "RUN", "--data", "x", "--choices", "y"], "give one of --data, --text and --choices"),
    (lines(GOOD, "[]"), ["evaluate", "RUN", "--choices", "TMP/lines.jsonl"], "line 2: holds a JSON list"),
    (lines(GOOD.replace("1", "2")), ["evaluate", "RUN", "--choices", "TMP/lines.jsonl"], "is not a number from 0 to 1"),
    (lines(GOOD.replace("1", "true")), ["evaluate", "RUN", "--choices", "TMP/lines.jsonl"], "not a number from 0 to 1"),
    (lines(GOOD.replace('"c"', "3")), ["evaluate", "RUN", "--choices", "TMP/lines.jsonl"], "not two or more texts"),
    (lines(GOOD.replace('"c"', '"' + 99 * "c " + '"')), ["evaluate", "RUN", "--choices", "TMP/lines.jsonl"], "fit the"),
]


@pytest.mark.parametrize(("spoil", "words", "sentence"), REFUSALS, ids=[sentence for *_, sentence in REFUSALS])
def test_bad_input_is_one_sentence_and_exit_code_2(run, shards_folder, run_main, tmp_path, spoil, words, sentence):
    folder = run
    if spoil is not None:
        folder = shutil.copytree(run, tmp_path / "run")
        shutil.copytree(shards_folder, tmp_path / "shards")
        spoil(folder, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    words = [word.replace("RUN", str(folder)).replace("TMP", str(tmp_path)) for word in words]
    code, out, err = run_main(sample.main, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sentence.replace("TMP", str(tmp_path)) in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_checkpoint_with_code_in_it_is_not_run(run, run_main, tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    folder = shutil.copytree(run, tmp_path / "run")
    torch.save({"model": Code(), "step": 1, "config": {}}, folder / "best.pt")
    code, _, err = run_main(sample.main, folder, "--prompt", "a")
    assert code == 2
    assert "best.pt: damaged" in err
    assert not (tmp_path / "written").exists()


def test_lines_of_text_need_a_tokenizer(train_small, shards_folder, tmp_path):
    shutil.copytree(shards_folder, tmp_path / "s")
    (tmp_path / "s" / "tokenizer.json").unlink()
    code, _, _, err = train_small("run", "--tokens", 512, "--sample-every", 1, data_folder=tmp_path / "s")
    assert (code, err) == (2, f"error: --sample-every 1: {tmp_path / 's'} has no tokenizer.json to write text with\n")
