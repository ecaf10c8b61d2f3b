"""Takes a trained model elsewhere and back: a run's folder to one that transformers loads, and the reverse.

    python export.py runs/NAME --out DIR
    python export.py --import DIR --out runs/NAME

In fp32 the weights keep their bits. No code in a file is run, and a folder is written whole or not at all.
"""

import dataclasses
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
import safetensors.torch
import torch
import tyro
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from corpus.codec import Codec, tokenizer_of
from corpus.documents import MAX_TOKENIZER_BYTES
from corpus.shards import META, TOKENIZER
from engine.checkpoint import Progress, save_checkpoint
from engine.cli import BadInput, Limit, check_limits, exit_with_a_sentence, first_line, make_folder
from engine.files import (
    CONFIG,
    METRICS,
    ROOT,
    load_json,
    read_jsonl,
    shown,
    sync_folder,
    write_json,
    write_whole,
    writing,
)
from engine.identity import NOT_LEARNED, config_hash
from engine.start import weights_digest
from engine.trained import Trained, Which, open_trained
from model import ROPE_BASE, ModelConfig, Transformer
from optim import apart_from_muon, parameter_layout
from settings import RUN_NAME, Settings, trained_model

EXPORTED = ROOT / "exported"  # what travels with a model
MODELING, CARD = "modeling_muon_speedrun.py", "README.md"
MODEL_TYPE = "muon_speedrun"
WEIGHTS = "model.safetensors"
RECORD = "training"  # key of the exported config.json that holds the run's own config
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SETTINGS = tuple(field.name for field in dataclasses.fields(Settings) if field.name != "init_fingerprint")
# Our names and those in transformers: of the shape, and of the weights.
SHAPE = {
    "d_model": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "d_ff": "intermediate_size",
    "seq_len": "max_position_embeddings",
    "ffn": "hidden_act",
    "qk_norm": "qk_norm",
    "experts": "num_experts",
    "top_k": "num_experts_per_tok",
}
ONCE = {"embedding": "embed_tokens", "final_gain": "norm"}
PER_LAYER = {
    "attention_gain": "input_layernorm",
    "ffn_gain": "post_attention_layernorm",
    "q_gain": "self_attn.q_norm",
    "k_gain": "self_attn.k_norm",
    "router": "mlp.router",
}
PER_PROJECTION = {name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")}
PER_PROJECTION |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
IDENTIFIER = Limit("must be an identifier such as mit or apache-2.0", re.compile(r"[A-Za-z0-9.-]+").fullmatch)


@dataclass(frozen=True)
class Export:
    """Write a trained run as a folder that transformers loads, or such a folder as a run."""

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder of the run to export."""
    out: Path | None = None
    """Folder to write; it must not exist."""
    import_: Annotated[Path | None, tyro.conf.arg(name="import")] = None
    """Instead of a run, the exported folder to make a run of: --out runs/NAME."""
    to: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of the exported weights."""
    checkpoint: Which = "best"
    """The weights with the lowest validation loss, or the last ones."""
    license: Annotated[str, IDENTIFIER] = "unknown"
    """Licence of the model, for its card."""
    data: Path | None = None
    """The folder of the run's shards, where it has moved: its tokenizer is exported."""
    tokenizer: str | None = None
    """Export this tokenizer.json, or hub name, instead."""


@exit_with_a_sentence
def main() -> int:
    given = tyro.cli(Export, description=__doc__)
    check_limits(given)
    if (given.run is None) == (given.import_ is None):
        raise BadInput("name the folder of a run, or --import an exported one")
    if given.out is None:
        raise BadInput("--out: name the folder to write")
    if given.out.exists() or given.out.is_symlink():
        raise BadInput(f"--out {given.out}: exists; choose another name")
    if given.run is not None:
        export_run(given)
        return 0
    for flag in ("to", "checkpoint", "license", "data", "tokenizer"):
        if getattr(given, flag) != getattr(Export, flag):
            raise BadInput(f"--{flag} {getattr(given, flag)}: belongs to an export, not to --import")
    import_run(given.import_, given.out)
    return 0


def named_weights(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Each weight as a view under its name in transformers; copying into a view changes the model."""
    parameters = dict(model.named_parameters())
    for ours, theirs in ONCE.items():
        yield f"{theirs}.weight", parameters[ours]
    for ours, theirs in PER_LAYER.items():
        for layer, weight in enumerate(parameters.get(ours, ())):
            yield f"layers.{layer}.{theirs}.weight", weight
    for layer, name, expert, weight in model.projections():
        theirs = PER_PROJECTION[name]
        if expert is not None:
            theirs = theirs.replace("mlp.", f"mlp.experts.{expert}.")
        yield f"layers.{layer}.{theirs}.weight", weight


def export_run(given: Export) -> None:
    """Write a checkpoint of a run as a folder that transformers loads."""
    trained, to = open_trained(given.run, given.checkpoint), given.to
    model = trained_model(trained)
    codec = Codec(tokenizer_of(trained, given.data, given.tokenizer), model.vocab_size)
    if codec.encoder.get_vocab_size() > model.vocab_size:
        raise BadInput(f"{codec.path}: more entries than the {model.vocab_size:,} of {given.run}, so not its tokenizer")
    weights = {name: weight.detach().to(DTYPES[to]).contiguous() for name, weight in named_weights(model)}
    if wrong := next((name for name, weight in weights.items() if not weight.isfinite().all()), None):
        raise BadInput(f"--to {to}: {wrong} of {trained.path} has values that are not finite in it")
    end = codec.encoder.id_to_token(codec.end)

    def fill(folder: Path) -> None:
        write_whole(folder / WEIGHTS, lambda file: file.write(safetensors.torch.save(weights, {"format": "pt"})))
        ids = {f"{use}_token_id": codec.end for use in ("bos", "eos", "pad")}
        write_json(folder / CONFIG, transformers_config(trained, model, to, codec.end) | ids)
        write_json(folder / "generation_config.json", ids)
        write_json(folder / "tokenizer_config.json", tokenizer_config(end, model.config.seq_len))
        start = TemplateProcessing(single=f"{end} $A", special_tokens=[(end, codec.end)])
        codec.encoder.post_processor = start  # in front of a text, as the shards have it
        put_text(folder / TOKENIZER, codec.encoder.to_str(pretty=True))
        put_text(folder / MODELING, (EXPORTED / MODELING).read_text(encoding="utf-8"))
        put_text(folder / CARD, card(trained, model, given.data or trained.data, given.license))

    write_folder(given.out, fill)
    print(f"{given.out}: {trained.path} after {trained.step:,} steps, in {to}")


def transformers_config(trained: Trained, model: Transformer, to: str, end_id: int) -> dict[str, Any]:
    """config.json; the run's own config is part of it, for the way back."""
    module = MODELING.removesuffix(".py")
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["MuonSpeedrunForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.MuonSpeedrunConfig",
            "AutoModelForCausalLM": f"{module}.MuonSpeedrunForCausalLM",
        },
        "vocab_size": model.vocab_size,
        **{theirs: getattr(model.config, ours) for ours, theirs in SHAPE.items()},
        "rope_theta": ROPE_BASE,
        "document_start": end_id if trained.config["doc_mask"] else None,
        "dtype": str(DTYPES[to]).removeprefix("torch."),
        RECORD: {"step": trained.step, "config": trained.config},
    }


def tokenizer_config(end: str, seq_len: int) -> dict[str, Any]:
    """tokenizer_config.json; rows of unlike length are padded in front, so that all end where generation begins."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{use}_token": end for use in ("bos", "eos", "pad")},
        "model_max_length": seq_len,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }


def card(trained: Trained, model: Transformer, data: Path, license: str) -> str:
    """The model card: what was trained, on what, how, and how well."""
    c = trained.config
    meta = load_json(data / META) if (data / META).exists() else {}
    if meta.get("fingerprint") != c["data_fingerprint"]:
        meta = {}
    measured = [line for line in read_jsonl(trained.folder / METRICS) if line.get("kind") == "val"]
    val = next((line for line in measured if line.get("step") == trained.step), {})
    steps = f"{trained.step:,} of {c['steps']:,} steps"
    rows = {
        "data": meta.get("source"),
        "tokenizer": meta.get("tokenizer"),
        "data fingerprint": c["data_fingerprint"],
        "training tokens": f"{trained.step * c['batch_tokens']:,} ({steps})",
        "validation loss": (loss := val.get("val_loss")) and f"{loss:.4f} nats per token",
        "bits per byte of validation text": (bits := val.get("val_bpb")) and f"{bits:.4f}",
        "accuracy of the next token": (share := val.get("val_accuracy")) and f"{share:.2%}",
        "validation tokens": val and f"{c['eval_tokens']:,}",
        "weights at the start": (start := c.get("init_from")) and Path(start).name,
        "trained on": c.get("device_name"),
        "PyTorch": c.get("torch_version"),
        "commit of muon-speedrun": c.get("git_commit"),
    }
    page = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters["cell"] = lambda value: " ".join(str(value).replace("|", "\\|").split())
    return page.from_string((EXPORTED / "model_card.md").read_text(encoding="utf-8")).render(
        name=trained.folder.name,
        license=license,
        modeling=MODELING,
        parameters=model.parameter_count(),
        active=model.active_parameter_count(),
        seq_len=model.config.seq_len,
        doc_mask=c["doc_mask"],
        training={words: value for words, value in rows.items() if value},
        settings={key: c[key] for key in SETTINGS if key not in NOT_LEARNED and c.get(key) is not None},
    )


def import_run(source: Path, out: Path) -> None:
    """Make a run of an exported folder: a checkpoint at its step, with its weights and without optimizer state."""
    if not RUN_NAME.holds(out.name):
        raise BadInput(f"--out {out}: its name {RUN_NAME.sentence}")
    path = source / CONFIG
    exported = load_json(path)
    if exported.get("model_type") != MODEL_TYPE:
        raise BadInput(f"{path}: a model of type {exported.get('model_type')}, not {MODEL_TYPE}")
    try:
        step, config = exported[RECORD]["step"], dict(exported[RECORD]["config"])
        if type(step) is not int or step < 0:
            raise ValueError("its step is not a count")
        shape = ModelConfig.of(config)
        with torch.device("meta"):  # no storage before the file proves its size
            model = Transformer(shape, config["vocab_size"], apart_from_muon(config["muon_on"], shape))
        layout = parameter_layout(model, config["optimizer"], config["decay_on"], config["muon_on"])
        tokens = step * config["batch_tokens"]
        position, steps, _ = tokens // config["seq_len"], int(config["steps"]), Path(config["data"])
        rng = torch.Generator().manual_seed(config["seed"]).get_state()
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise BadInput(f"{path}: {RECORD} does not describe a run ({first_line(error)})") from None
    model = read_weights(source / WEIGHTS, model)
    load_json(source / TOKENIZER, MAX_TOKENIZER_BYTES)
    config = imported_config(config, source, out, f"{weights_digest(model.state_dict())}@{step}")
    contents = {
        "model": model.state_dict(),
        "optimizer": [{"state": {}} for _ in layout],
        "step": step,
        "tokens": tokens,
        "loader": {"epoch": 0, "position": position},
        "rng": {"torch": rng, "cuda": None},
        "progress": asdict(Progress(step)),
        "config": config,
    }

    def fill(folder: Path) -> None:
        save_checkpoint(folder, contents)
        write_json(folder / CONFIG, config)
        put_text(folder / TOKENIZER, (source / TOKENIZER).read_text(encoding="utf-8"))

    write_folder(out, fill)
    print(f"{out}: the weights of {source}, after {step:,} of {steps:,} steps; its optimizer begins anew")


def imported_config(config: dict[str, Any], source: Path, out: Path, fingerprint: str) -> dict[str, Any]:
    """The config of an imported run, with the flags first, as a run writes it: transformers sorts the keys."""
    config |= {
        "init_from": shown(source),
        "runs_dir": shown(out.parent),
        "name": out.name,
        "init_fingerprint": fingerprint,
    }
    hashed = (*SETTINGS, "data_fingerprint", "init_fingerprint", "optimizer_code", "vocab_size")
    first = {key: config[key] for key in hashed if key in config}
    return first | config | {"config_hash": config_hash(first)}


@torch.no_grad()
def read_weights(path: Path, sketch: Transformer) -> Transformer:
    """A model without storage, filled from a file; BadInput unless that has each weight, in its shape, and no other."""
    if not path.exists():
        raise BadInput(f"{path}: no such file")
    try:
        found = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"{path}: damaged ({first_line(error)})") from None
    if sketch.config.layers > len(found):
        raise BadInput(f"{path}: has {len(found):,} weights, too few for {sketch.config.layers:,} layers")
    wanted = {name: weight.shape for name, weight in named_weights(sketch)}
    for names, words in ((wanted.keys() - found.keys(), "lacks"), (found.keys() - wanted.keys(), "has no place for")):
        if names:
            raise BadInput(f"{path}: {words} {', '.join(sorted(names))}")
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise BadInput(f"{path}: {name} is {tuple(found[name].shape)}, not {tuple(shape)}")
        if not found[name].isfinite().all():
            raise BadInput(f"{path}: {name} has values that are not finite")
    model = sketch.to_empty(device="cpu")
    for name, weight in named_weights(model):
        weight.copy_(found[name])
    return model


def write_folder(out: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a folder next to `out`, then give it that name: it appears whole or not at all."""
    make_folder(out.parent, exist_ok=True)
    with writing(out):
        temporary = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-")
    with temporary as name:
        folder = Path(name) / out.name  # with the permissions of any folder, which a temporary one has not
        make_folder(folder)
        fill(folder)
        with writing(out):
            folder.rename(out)
            sync_folder(out.parent)


def put_text(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text), mode="w")


if __name__ == "__main__":
    sys.exit(main())
