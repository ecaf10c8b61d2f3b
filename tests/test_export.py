"""Models as transformers loads them against ours: logits, greedy text, and the way back into a run."""

import ast
import json
import math
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

import export
import train
from corpus.documents import load_tokenizer
from corpus.shards import open_shards
from data import Loader, TokenStream, validation_batches
from engine.checkpoint import save_checkpoint
from engine.cli import CannotWrite
from engine.files import BEST, CHECKPOINT, ROOT
from engine.identity import config_hash
from engine.ranks import Rank
from exported.modeling_muon_speedrun import MuonSpeedrunForCausalLM
from model import ACTIVATIONS, Transformer
from optim import apart_from_muon
from settings import Settings, identity, resolve
from tests.test_layout import imported
from tests.test_own_optimizer import MY_SGD

TINY = {"model": "nano", "layers": 2, "d_model": 32, "heads": 4, "kv_heads": 2, "d_ff": 48, "seq_len": 32}
TINY |= {"batch_tokens": 256, "eval_tokens": 512, "tokens": 2560, "device": "cpu", "workers": 1, "threads": 1}
STEP = 5  # of the made-up checkpoints
SHAPES = {
    "nano": {},
    "a head for each query": {"model": "11m", "kv_heads": 4},  # silu, no QK-norm
    "swiglu": {"ffn": "swiglu", "muon_on": "q,up,down"},
    "gelu": {"ffn": "gelu"},
    "relu": {"ffn": "relu"},
    "mixture": {"model": "moe-nano", "experts": 4},
    "mixture of swiglu": {"model": "moe-79m", "experts": 3, "top_k": 1, "ffn": "swiglu", "kv_heads": 4},
    "document mask": {"doc_mask": True},
}


@pytest.fixture
def made_run(shards_folder, tmp_path):
    """made_run("name", ffn="gelu"): the folder of a run whose best.pt has random weights, and its model."""

    def make(name="run", step=STEP, **given):
        s, shape, shards = resolve(Settings(**TINY | given, data=shards_folder, name=name), Rank())
        torch.manual_seed(1)
        model = Transformer(shape, shards.vocab_size, apart_from_muon(s.muon_on, shape)).eval()
        with torch.no_grad():  # far from the start, so that every weight matters
            for parameter, p in model.named_parameters():
                p.copy_(1 + 0.5 * torch.randn_like(p) if parameter.endswith("gain") else 5 * p)
        model.document_start = shards.eot_id if s.doc_mask else None
        flags = identity(s, shards)
        config = flags | {"steps": s.steps, "config_hash": config_hash(flags)}
        folder = tmp_path / name
        folder.mkdir()
        save_checkpoint(folder, {"model": model.state_dict(), "step": step, "config": config}, BEST)
        return folder, model

    return make


@pytest.fixture
def exported(run_main, tmp_path):
    """exported(folder of a run, "--to", "bf16"): the folder that transformers loads."""

    def call(run, *arguments):
        code, _, err = run_main(export.main, run, "--out", tmp_path / "dir", *arguments)
        assert code == 0, err
        return tmp_path / "dir"

    return call


def greedy(model, tokens, count):
    """Ours, without a cache: the whole text anew for each token; the tokens, and the logits of each step."""
    logits = []
    with torch.no_grad():
        for _ in range(count):
            logits.append(model(tokens)[:, -1])
            tokens = torch.cat((tokens, logits[-1].argmax(-1, keepdim=True)), dim=1)
    return tokens, torch.stack(logits)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES.keys())
def test_logits_and_greedy_tokens_are_ours(made_run, exported, settings):
    folder, model = made_run(**settings)
    theirs = MuonSpeedrunForCausalLM.from_pretrained(exported(folder))
    tokens = torch.randint(model.vocab_size, (3, 20), generator=torch.Generator().manual_seed(2))
    tokens[0, 7] = tokens[1, 3] = 0  # documents begin
    padded = torch.cat((torch.full((3, 2), 5), tokens), dim=1)
    visible = (torch.arange(22) >= 2).expand(3, 22).long()
    with torch.no_grad():
        ours = model(tokens)
        assert_close(theirs(tokens).logits, ours)
        assert_close(theirs(padded, attention_mask=visible).logits[:, 2:], ours)
    assert ours.std() > 0.5

    expected, expected_logits = greedy(model, tokens, 12)
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    theirs.generation_config.eos_token_id = None  # go on behind the end of a text
    for given, mask in ((tokens, visible[:, 2:]), (padded, visible)):
        written = theirs.generate(given, attention_mask=mask, **options)
        assert torch.equal(written.sequences[:, -32:], expected)
        assert_close(torch.stack(written.logits), expected_logits)


def test_every_activation_is_tried():
    assert {given.get("ffn", {"11m": "silu"}.get(given.get("model"), "relu2")) for given in SHAPES.values()} >= set(
        ACTIVATIONS
    )


def test_auto_classes_and_the_pipeline_give_our_text_and_lead_back(
    made_run, exported, run_main, shards_folder, tmp_path, monkeypatch
):
    folder, model = made_run()
    where = str(exported(folder))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    plain = load_tokenizer(str(shards_folder / "tokenizer.json"))
    prompts = ["abc def", "a b c d e f g h"]
    expected = []
    for prompt in prompts:  # each by itself, without padding
        ids = [0, *plain.encode(prompt, add_special_tokens=False).ids]
        assert tokenizer(prompt).input_ids == ids
        text = greedy(model, torch.tensor([ids]), 9)[0][0, len(ids) :].tolist()
        expected.append(plain.decode(text[: text.index(0)] if 0 in text else text))
    generate = transformers.pipeline("text-generation", model=theirs, tokenizer=tokenizer)
    options = {"max_new_tokens": 9, "do_sample": False, "return_full_text": False, "batch_size": 2}
    assert [one[0]["generated_text"] for one in generate(prompts, **options)] == expected

    with torch.no_grad():  # as if trained there
        theirs.norm.weight += 1
    for part in (theirs, tokenizer):
        part.save_pretrained(tmp_path / "saved")
    assert run_main(export.main, "--import", tmp_path / "saved", "--out", tmp_path / "again")[0] == 0
    contents = torch.load(tmp_path / "again" / CHECKPOINT, weights_only=True)
    assert torch.equal(contents["model"]["final_gain"], model.final_gain + 1)
    assert torch.equal(contents["model"]["embedding"], model.embedding)


@pytest.mark.parametrize(("to", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_other_types_are_the_rounded_weights(made_run, exported, to, dtype):
    folder, model = made_run()
    where = exported(folder, "--to", to)
    theirs = MuonSpeedrunForCausalLM.from_pretrained(where)
    assert theirs.dtype == dtype
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert F.cosine_similarity(theirs(tokens).logits.float(), model(tokens), dim=-1).min() > 0.99
    embedding = load_file(where / "model.safetensors")["embed_tokens.weight"]
    assert torch.equal(embedding, model.embedding.detach().to(dtype))


def test_the_model_card_says_what_was_trained(made_run, exported):
    folder, model = made_run()
    lines = [{"kind": "val", "step": step, "val_loss": 3 + step / 10, "val_bpb": 1.5} for step in (0, STEP, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = (exported(folder, "--license", "cc-by-4.0") / "README.md").read_text()
    assert text.startswith("---\nlicense: cc-by-4.0\nlibrary_name: transformers\n")
    assert "| validation loss | 3.5000 nats per token |" in text
    assert f"| training tokens | {STEP * 256:,} ({STEP} of 10 steps) |" in text
    assert "| data | test |" in text
    assert f"{model.parameter_count():,} parameters" in text
    assert "| `momentum` | 0.85 |" in text
    assert "/tmp" not in text  # nothing of the machine's paths


def resume(run_main, folder, shards_folder, *arguments, **given):
    """Run train.py again with the settings of a made-up run."""
    flags = [word for key, value in (TINY | given).items() for word in (f"--{key.replace('_', '-')}", value)]
    flags += ["--data", shards_folder, "--runs-dir", folder.parent, "--name", folder.name, "--no-plots"]
    return run_main(train.main, *flags, "--spectra-every", 0, "--compile", "off", *arguments)


def metrics(folder, kind):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize("optimizer", ["muon", "own.py"])
def test_an_imported_run_has_the_same_bits_and_resumes_at_its_step(
    made_run, exported, run_main, shards_folder, tmp_path, optimizer
):
    given = {"ffn": "swiglu"}
    if optimizer == "muon":
        given["muon_on"] = "q,up"
    else:
        (tmp_path / "own.py").write_text(MY_SGD)
        given |= {"optimizer": f"{tmp_path / 'own.py'}:MySGD", "lr": 1e-4}
    folder, model = made_run(**given)
    where = exported(folder)
    settings = json.loads((where / "config.json").read_text())
    settings = json.dumps(settings, indent=2, sort_keys=True)  # as transformers saves it
    (where / "config.json").write_text(settings)
    again = tmp_path / "again"
    assert run_main(export.main, "--import", where, "--out", again)[0] == 0
    contents = torch.load(again / CHECKPOINT, weights_only=True)
    state = model.state_dict()
    assert contents["model"].keys() == state.keys()
    assert all(torch.equal(weight, state[name]) for name, weight in contents["model"].items())

    code, out, err = resume(run_main, again, shards_folder, "--resume", **given)
    assert code == 0, err
    assert "resuming at step 5 of 10" in out
    steps = metrics(again, "train")
    assert [line["step"] for line in steps] == [6, 7, 8, 9, 10]
    batch = Loader(TokenStream(open_shards(shards_folder), "train"), 8, 32, seed=0).batch(STEP)
    batch = torch.from_numpy(batch).long()
    with torch.no_grad():
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    assert math.isclose(steps[0]["train_loss"], loss.item(), rel_tol=1e-4)
    config = json.loads((again / "config.json").read_text())
    assert config["init_from"] == str(where)
    assert config["init_fingerprint"].endswith("@5")
    assert config["config_hash"] != torch.load(folder / BEST, weights_only=True)["config"]["config_hash"]


def test_a_run_starts_from_the_weights_of_another(made_run, run_main, shards_folder, tmp_path):
    other, model = made_run("other", kv_heads=4, muon_on="q,k")  # other banks than those of the new run
    new = tmp_path / "new"
    code, _, err = resume(run_main, new, shards_folder, "--init-from", other, kv_heads=4, tokens=512)
    assert code == 0, err
    stream, losses = TokenStream(open_shards(shards_folder), "val"), []
    for batch in validation_batches(stream, 512, 32, 16):
        batch = torch.from_numpy(batch).long()
        with torch.no_grad():
            losses.append(F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).item())
    assert math.isclose(metrics(new, "val")[0]["val_loss"], losses[0], rel_tol=1e-4)
    assert [line["step"] for line in metrics(new, "train")] == [1, 2]
    config = json.loads((new / "config.json").read_text())
    assert config["init_from"] == str(other)
    flags = {key: config[key] for key in list(config)[: list(config).index("vocab_size") + 1]}
    assert len(flags["init_fingerprint"]) == 16
    assert config_hash(flags) == config["config_hash"] != config_hash(flags | {"init_fingerprint": "0"})
    assert config_hash(flags | {"init_from": "moved"}) == config["config_hash"]

    shutil.rmtree(other)  # a run that is resumed needs it no more, nor the flag
    for flag in ((), ("--init-from", other)):
        code, out, err = resume(run_main, new, shards_folder, "--resume", *flag, kv_heads=4, tokens=512)
        assert code == 0, err
        assert "finished already" in out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_heads": 4, "d_ff": 64}, "kv_heads is 2 there, 4 here, d_ff is 48 there, 64 here"),
        ({"ffn": "gelu"}, "ffn is relu2 there, gelu here"),
        ({"model": "16m", "ffn": "relu2"}, "qk_norm is True there, False here"),
    ],
)
def test_another_shape_is_no_start(made_run, run_main, shards_folder, tmp_path, change, words):
    other, _ = made_run("other")
    code, _, err = resume(run_main, tmp_path / "new", shards_folder, "--init-from", other, **change)
    assert code == 2
    assert f"--init-from {other}: its weights do not fit this model ({words})" in err
    assert not (tmp_path / "new").exists()


def with_tokens_swapped(source, target):
    """A copy of a tokenizer.json in which two tokens have each other's id."""
    tokenizer = json.loads(source.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    target.write_text(json.dumps(tokenizer))


def test_other_tokens_are_no_start(made_run, run_main, shards_folder, tmp_path):
    other, _ = made_run("other")
    with_tokens_swapped(shards_folder / "tokenizer.json", other / "tokenizer.json")
    code, _, err = resume(run_main, tmp_path / "new", shards_folder, "--init-from", other)
    assert code == 2
    assert f"its tokens are not those of {shards_folder}; build shards with --tokenizer {other}" in err


def test_the_tokenizer_must_be_there_and_fit(made_run, run_main, tmp_path):
    folder, _ = made_run()
    contents = torch.load(folder / BEST, weights_only=True)
    for change, words in (({"data": str(tmp_path)}, f"the tokenizer of {folder} is not there"), ({}, "more entries")):
        contents["config"] |= change
        save_checkpoint(folder, contents, BEST)
        code, _, err = run_main(export.main, folder, "--out", tmp_path / "dir")
        assert (code, words in err) == (2, True), err
        large = Tokenizer(models.BPE(vocab={"<eos>": 0, **{str(i): i for i in range(1, 321)}}, merges=[]))
        large.save(str(folder / "tokenizer.json"))
    small = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    small.save(str(folder / "tokenizer.json"))
    code, _, err = run_main(export.main, folder, "--out", tmp_path / "dir")
    assert (code, "has no end-of-text token" in err) == (2, True), err


def edit_weights(**changes):
    def edit(folder):
        path = folder / "model.safetensors"
        weights = load_file(path)
        for name, change in changes.items():
            weights[name.replace("__", ".")] = change
        save_file({name: weight for name, weight in weights.items() if weight is not None}, path)

    return edit


def edit_config(change):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: None, ".hidden: its name must be letters"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
        (edit_config(lambda c: c.update(model_type="llama")), "config.json: a model of type llama, not muon_speedrun"),
        (edit_config(lambda c: c.pop("training")), "config.json: training does not describe a run"),
        (edit_config(lambda c: c["training"].update(step=-1)), "config.json: training does not describe a run"),
        (edit_config(lambda c: c["training"]["config"].update(d_model="a")), "training does not describe a run"),
        (edit_config(lambda c: c["training"]["config"].update(layers=3)), "model.safetensors: lacks layers.2."),
        (edit_config(lambda c: c["training"]["config"].update(vocab_size=2**40)), "embed_tokens.weight is (320, 32)"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: no such file"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
        (cut, "model.safetensors: damaged"),
        (edit_weights(norm__weight=None), "model.safetensors: lacks norm.weight"),
        (edit_weights(more=torch.ones(1)), "model.safetensors: has no place for more"),
        (edit_weights(norm__weight=torch.ones(31)), "norm.weight is (31,), not (32,)"),
        (edit_weights(norm__weight=torch.full((32,), torch.nan)), "norm.weight has values that are not finite"),
    ],
)
def test_a_folder_that_cannot_be_imported_is_named(made_run, exported, run_main, tmp_path, damage, words):
    where = exported(made_run()[0])
    damage(where)
    before = sorted(tmp_path.iterdir())
    out = tmp_path / (".hidden" if "its name" in words else "again")
    code, _, err = run_main(export.main, "--import", where, "--out", out)
    assert code == 2
    assert words in err
    assert sorted(tmp_path.iterdir()) == before


def damage_best(folder):
    content = bytearray((folder / BEST).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / BEST).write_bytes(content)


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (lambda folder: (folder / BEST).unlink(), (), "run: has no best.pt"),
        (damage_best, (), "best.pt: damaged"),
        (lambda folder: folder.with_name("dir").mkdir(), (), "dir: exists"),
        (None, ("--checkpoint", "last"), "has no checkpoint.pt; use --checkpoint best"),
        (None, ("--license", "mit\n---"), "must be an identifier"),
        (None, ("--import", "x"), "name the folder of a run, or --import an exported one"),
    ],
)
def test_a_run_that_cannot_be_exported_is_named(made_run, run_main, tmp_path, change, arguments, words):
    folder, _ = made_run()
    if change:
        change(folder)
    before = sorted(tmp_path.iterdir())
    code, _, err = run_main(export.main, folder, "--out", tmp_path / "dir", *arguments)
    assert code == 2
    assert words in err
    assert sorted(tmp_path.iterdir()) == before


def test_flags_of_an_export_are_refused_at_an_import(run_main, tmp_path):
    code, _, err = run_main(export.main, "--import", tmp_path, "--out", tmp_path / "dir", "--to", "bf16")
    assert (code, "--to bf16: belongs to an export" in err) == (2, True)


def test_weights_beyond_fp16_are_refused(made_run, run_main, tmp_path):
    folder, _ = made_run()
    contents = torch.load(folder / BEST, weights_only=True)
    contents["model"]["final_gain"][0] = 1e5
    save_checkpoint(folder, contents, BEST)
    code, _, err = run_main(export.main, folder, "--out", tmp_path / "dir", "--to", "fp16")
    assert (code, "--to fp16: norm.weight" in err) == (2, True)


def test_a_full_disk_leaves_nothing(made_run, run_main, tmp_path, monkeypatch):
    folder, _ = made_run()

    def full(path, value):
        raise CannotWrite(f"{path}: cannot be written (No space left on device)")

    monkeypatch.setattr(export, "write_json", full)
    code, _, err = run_main(export.main, folder, "--out", tmp_path / "dir")
    assert (code, "No space left on device" in err) == (1, True)
    assert sorted(tmp_path.iterdir()) == [folder]


def test_the_command_needs_no_transformers_and_the_model_nothing_of_ours():
    assert not {name for name in imported((ROOT / "export.py").read_text()) if name.startswith("transformers")}
    source = (ROOT / "exported/modeling_muon_speedrun.py").read_text()
    assert {name.split(".")[0] for name in imported(source)} == {"torch", "transformers"}
    assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.level]
