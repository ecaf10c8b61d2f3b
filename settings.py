"""Every setting of a run as a flag, from one dataclass: checked, and filled in where it depends on others.

    python train.py --help

`Settings` is what a user may set, `resolve` checks it and fills in the rest; a bad value is one sentence, exit code 2.
"""

import dataclasses
import math
import os
import shlex
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from corpus.codec import Codec
from corpus.frequency import Yardstick, same_tokens
from corpus.shards import TOKENIZER, TRAIN_PATTERN, Shards, open_shards
from data import Packing
from engine.checkpoint import has_checkpoint
from engine.cli import (
    AT_LEAST_1,
    BELOW_1,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    BadInput,
    Count,
    Limit,
    check_limits,
    first_line,
    one_of,
)
from engine.compiling import cache_key, pays, why_no_compiler
from engine.cores import free_cores
from engine.defaults import LARGE, NANO, default_data, defaults_of
from engine.files import BEST, CONFIG, finite, is_safe_name, load_json, shown
from engine.identity import config_hash, provenance
from engine.live import VIEWS
from engine.own_optimizer import class_name, is_own, load_class, try_out, without_folder
from engine.ranks import Rank
from engine.start import check_fit, weights_digest
from engine.trained import Trained, open_trained
from kernels.newton_schulz import COEFFICIENTS
from kernels.optimizer import DECAY_RULES, LR_SCALES, NS_METHODS
from model import CPU_KERNELS, FLEX_MIN_HEAD_WIDTH, KERNELS, SIZES, ModelConfig, Transformer
from optim import BLOCKS, SCHEDULES, apart_from_muon, muon_names, ns_schedule

RUN_NAME = Limit("must be letters, digits, '.', '_' and '-', not starting with a dot", is_safe_name)
LOGS = Limit(
    f"choose from jsonl, {', '.join(VIEWS)}, or several by commas",
    lambda value: {*value.split(",")} <= {"jsonl", *VIEWS},
)
MUON_OPTIONS = ("momentum", "nesterov", "ns_steps", "ns_coefficients", "ns_method", "lr_scale", "ns_before_momentum")
MUON_OPTIONS += ("normalize_rows", "decay_rule")
KERNELS_THAT_PAY: frozenset[str] = frozenset()  # of model.KERNELS: those with an end-to-end win in runs/records
CPU_KERNELS_THAT_PAY = frozenset(("cross_entropy", "attention"))  # bench/LOG.md
EVENTS_PER_RUN = 20  # validation and spectra, unless their flags say otherwise
LARGE_SPECTRA_PER_RUN = 4  # above nano: an event takes seconds of a CPU (docs/run_folder.md)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Train one language model with Muon or AdamW and log the spectra of its weights."""

    model: Annotated[str, one_of(SIZES)] = "88m"
    """Named size: nano, 11m, 16m, 29m, 50m, 88m, 108m, or with experts moe-nano, moe-79m."""
    layers: int | None = None
    """Blocks, instead of the size's."""
    d_model: int | None = None
    """Width of the residual stream, instead of the size's."""
    heads: int | None = None
    """Query heads, instead of the size's."""
    kv_heads: int | None = None
    """Key/value heads, instead of the size's."""
    d_ff: int | None = None
    """Width of the feed-forward layer, instead of the size's."""
    ffn: str | None = None
    """Feed-forward activation (relu2, silu, relu, gelu, swiglu), instead of the size's."""
    experts: int | None = None
    """Experts per layer, instead of the size's; 0 = one dense feed-forward layer."""
    top_k: int | None = None
    """Experts that each token goes to, instead of the size's."""
    balance: Annotated[float, NOT_NEGATIVE] = 0.01
    """Weight of the experts' load-balancing loss, which is part of the training loss."""
    router_noise: Annotated[float, NOT_NEGATIVE] = 0.0
    """Standard deviation of the noise that training adds to the router's logits."""
    dropout: Annotated[float, BELOW_1] = 0.0
    """Probability of dropping an element of the embedding and of each block's outputs."""
    inner_dropout: Annotated[float, BELOW_1] = 0.0
    """Probability of dropping an attention weight, and a hidden unit of the feed-forward layer or of an expert."""
    doc_mask: bool = False
    """Attention stays within a document, in training and validation; off = all earlier tokens of the sequence."""
    optimizer: str = "muon"
    """Optimizer of the block matrices: muon, adamw or FILE.py:CLASS; gains always use AdamW, embedding and router
    unless --muon-on names them."""
    optimizer_options: tuple[str, ...] = ()
    """Settings of a class of a file, as momentum=0.9 nesterov=True; its rate is --lr."""
    muon_on: str = BLOCKS
    """What Muon trains, by commas: q, k, v, o, gate, up, down (blocks = all of these), embedding, router."""
    data: Path | None = None
    """Folder of token shards (default: the embedded shards that make speedrun builds)."""
    data_pattern: str = TRAIN_PATTERN
    """File names of the training shards in it, such as fineweb_train_*.bin; with val for train the validation ones."""
    init_from: Path | None = None
    """Folder of the run whose weights this one begins with, best.pt or its last; optimizer and schedule are fresh."""
    init_fingerprint: Annotated[str | None, tyro.conf.Suppress] = None
    """Hash of these weights, for the run's identity; never given."""
    packing: Packing = "stream"
    """How sequences are cut from the tokens: end to end, or each from the start of a document, tails left out."""
    tokens: Annotated[Count, AT_LEAST_1] = 2_015_232
    """Training tokens in all, rounded up to whole steps; 2e6 works too."""
    batch_tokens: Annotated[Count, AT_LEAST_1] | None = None
    """Tokens per step over all ranks (default: 16,384; nano 8,192)."""
    micro_batch: Literal["auto"] | int = "auto"
    """Sequences per forward pass and rank; auto is the most that is counted to fit a GPU, 1k tokens on a CPU."""
    seq_len: Annotated[int, AT_LEAST_1] | None = None
    """Tokens per sequence, instead of the size's."""
    seed: Annotated[int, Limit("must be 0 or more", lambda value: 0 <= value < 2**63)] = 0
    """Sets initialisation, data order and dropout."""
    lr: Annotated[float, POSITIVE] | None = None
    """Peak rate of the block matrices (default: muon 0.024, adamw 0.002; nano 0.04, 0.005)."""
    adamw_lr: Annotated[float, POSITIVE] | None = None
    """Peak rate of embedding, gains and router, and of what Muon leaves (default: 0.006; nano 0.02)."""
    left_lr: Annotated[float, POSITIVE] | None = None
    """Peak rate of the block matrices that --muon-on leaves to AdamW, if not --adamw-lr's."""
    momentum: Annotated[float, BELOW_1] | None = None
    """Muon's momentum (default: 0.95; nano 0.85)."""
    nesterov: bool = True
    """Nesterov momentum in Muon."""
    ns_steps: int | str = 5
    """Newton-Schulz iterations; 3:0.5,5 is three until half of the run, then five."""
    ns_coefficients: Annotated[str, one_of(COEFFICIENTS)] = "polar_express"
    """Newton-Schulz polynomials: polar_express, quintic or cubic."""
    ns_method: Annotated[str, one_of(NS_METHODS)] = "auto"
    """How Newton-Schulz is computed, auto, standard or gram; svd is exact instead, none only scales the momentum."""
    lr_scale: Annotated[str, one_of(LR_SCALES)] = "spectral"
    """Scale of Muon's update by shape: spectral, rms or none."""
    ns_before_momentum: bool = False
    """Orthogonalise each gradient and average the results, instead of orthogonalising the average."""
    normalize_rows: bool = False
    """Divide each row of Muon's update by the root of its running mean square, and keep the norm (NorMuon)."""
    heads_per_matrix: Annotated[int, NOT_NEGATIVE] = 0
    """Heads of q, k and v that Muon orthogonalises as one matrix; 0 = all of them."""
    decay_rule: Annotated[str, one_of(DECAY_RULES)] = "plain"
    """How Muon's weights decay: plain, cautious (where the update shrinks them) or hyperball (their norm is kept)."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """Decoupled weight decay of the block matrices, times the learning rate per step."""
    decay_on: Literal["blocks", "matrices"] = "blocks"
    """What decays: the block matrices, or every matrix, with the embedding and the router at their own rate."""
    beta1: Annotated[float, BELOW_1] | None = None
    """AdamW's decay of the first moment (default: 0.9; nano 0.7)."""
    beta2: Annotated[float, BELOW_1] = 0.95
    """AdamW's decay of the second moment."""
    adam_eps: Annotated[float, POSITIVE] = 1e-8
    """AdamW's epsilon."""
    schedule: Annotated[str, one_of(SCHEDULES)] = "linear"
    """Learning rate over steps: constant, cosine, linear, step or wsd."""
    warmup: Annotated[float, SHARE] = 0.05
    """Share of the steps over which the rate rises from zero, 0 to 1."""
    min_lr: Annotated[float, SHARE] = 0.1
    """Final rate of cosine, linear and wsd as a share of the peak, 0 to 1."""
    grad_clip: Annotated[float, NOT_NEGATIVE] = 1.0
    """Largest gradient norm over all parameters; 0 = off."""
    eval_every: Annotated[int, AT_LEAST_1] | None = None
    """Steps between validations (default: a twentieth of the run)."""
    eval_tokens: Annotated[Count, AT_LEAST_1] | None = None
    """Validation tokens, always the same first ones (default: 131,072; nano 16,384)."""
    spectra_every: Annotated[int, Limit("must be 0 (never) or more", lambda value: value >= 0)] | None = None
    """Steps between spectra events (default: a quarter of the run; nano a twentieth); 0 = never."""
    sample_every: Annotated[int, Limit("must be 0 (never) or more", lambda value: value >= 0)] = 0
    """Steps between logged lines of text that the model writes, outside train_seconds; 0 = never."""
    checkpoint_every: Annotated[int, AT_LEAST_1] = 1000
    """Steps between checkpoints; the end always writes one."""
    log_every: Annotated[int, AT_LEAST_1] = 10
    """Steps between printed lines; metrics.jsonl has every step."""
    log: Annotated[str, LOGS] = "jsonl"
    """Live views in addition to the JSONL files, by commas: tensorboard, wandb; each needs that package installed."""
    resume: bool = False
    """Continue the run of this --name from its last checkpoint."""
    kernels: Literal["auto", "on", "off"] = "auto"
    """Fused kernels of the training loss; auto = those measured to pay: two on a CPU, on a GPU none yet."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the model; auto = on CUDA, and on a CPU where the run then ends sooner."""
    workers: Literal["auto"] | int = "auto"
    """Processes that train on a CPU; auto = one per core that is free, or as many as a resumed run had."""
    threads: Literal["auto"] | int = "auto"
    """Threads of each of them; auto = one where there is a worker per free core."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to train; auto = CUDA if there is one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of activations; auto = bf16 on CUDA sm_80 and newer, else fp32. Weights are always fp32."""
    deterministic: bool = False
    """Only algorithms that repeat to the bit on the same GPU, slower; a CPU always does."""
    runs_dir: Path = Path("runs")
    """Where run folders are made."""
    name: Annotated[str, RUN_NAME] | None = None
    """Name of the run's folder (default: model-optimizer-seed-UTC time)."""
    plots: bool = True
    """Draw the run's plots when it is finished."""

    @property
    def views(self) -> tuple[str, ...]:
        """The live views that --log names, each once."""
        return tuple(name for name in VIEWS if name in self.log.split(","))

    @property
    def steps(self) -> int:
        """Of the whole run, once `resolve` has filled in the batch."""
        return math.ceil(self.tokens / self.batch_tokens)


def resolve(given: Settings, rank: Rank) -> tuple[Settings, ModelConfig, Shards]:
    """Every setting checked and filled in, the model's shape, and the opened shards; BadInput names the flag."""
    check_limits(given)
    if given.resume and given.name is None:
        raise BadInput("--resume needs the --name of the run to continue")
    for view in given.views:
        if find_spec(view) is None:
            raise BadInput(f"--log {view}: the package is not installed; pip install {view}")
    check_optimizer(given)
    cuda = given.device == "cuda" or (given.device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise BadInput("--device cuda: this PyTorch sees no CUDA device")
    bf16 = cuda and torch.cuda.get_device_capability()[0] >= 8
    size, utc_time = SIZES[given.model], time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    before = config_before(given)
    filled: dict[str, Any] = {
        "device": "cuda" if cuda else "cpu",
        "precision": given.precision if given.precision != "auto" else ("bf16" if bf16 else "fp32"),
        "data": given.data or default_data(given.model),
        "name": given.name or f"{given.model}-{class_name(given.optimizer)}-{given.seed}-{utc_time}",
    }
    filled |= {field: value for field, value in defaults_by_model(given).items() if getattr(given, field) is None}
    for field in ("layers", "d_model", "heads", "kv_heads", "d_ff", "ffn", "seq_len", "experts", "top_k"):
        override = getattr(given, field)
        filled[field] = getattr(size, field) if override is None else override
    s = dataclasses.replace(given, **filled)
    check_limits(s)  # a damaged config.json too
    try:
        config = ModelConfig.of(vars(s))
    except ValueError as wrong:
        raise BadInput(str(wrong)) from None

    s = dataclasses.replace(s, muon_on=chosen_for_muon(s, config))
    if s.heads_per_matrix and (s.heads % s.heads_per_matrix or s.kv_heads % s.heads_per_matrix):
        heads = f"the {s.heads} heads and the {s.kv_heads} key/value heads"
        raise BadInput(f"--heads-per-matrix {s.heads_per_matrix}: does not divide {heads}")
    try:
        ns_schedule(s.ns_steps)
    except ValueError as wrong:
        raise BadInput(f"--ns-steps {s.ns_steps}: {wrong}") from None
    if is_own(s.optimizer) and not try_out(load_class(s.optimizer, s.optimizer_options), s.lr, torch.device(s.device)):
        if rank.count > 1 or s.workers not in ("auto", 1):
            words = "its step of one matrix depends on the others, so one process must have them all"
            raise BadInput(f"--optimizer {s.optimizer}: {words}; use --workers 1, and no torchrun")
        s = dataclasses.replace(s, workers=1)
    workers, threads = chosen_workers(s, rank, before)
    s = dataclasses.replace(s, workers=workers, threads=threads)
    ranks, what = rank.count * s.workers, "rank" if s.workers == 1 else "worker"
    sequences, remainder = divmod(s.batch_tokens, s.seq_len * ranks)
    unit = f"--seq-len {s.seq_len} x {ranks} {what}{'s' * (ranks > 1)}"
    if remainder or not sequences:
        raise BadInput(f"--batch-tokens {s.batch_tokens}: not divisible by {unit}")
    cadence = max(1, s.steps // EVENTS_PER_RUN)
    spectra_cadence = cadence if given.model in NANO else max(1, s.steps // LARGE_SPECTRA_PER_RUN)
    s = dataclasses.replace(
        s,
        eval_every=cadence if s.eval_every is None else s.eval_every,
        spectra_every=spectra_cadence if s.spectra_every is None else s.spectra_every,
    )
    if s.eval_tokens < s.seq_len:
        raise BadInput(f"--eval-tokens {s.eval_tokens}: fewer than one sequence of --seq-len {s.seq_len}")
    shards = open_shards(s.data, s.data_pattern)
    if shards.tokens("val") <= s.seq_len:
        raise BadInput(f"{s.data}: {shards.tokens('val'):,} validation tokens are too few for --seq-len {s.seq_len}")
    if s.sample_every:
        if not (s.data / TOKENIZER).exists():
            raise BadInput(f"--sample-every {s.sample_every}: {s.data} has no {TOKENIZER} to write text with")
        Codec(str(s.data / TOKENIZER), shards.vocab_size)  # says why it cannot
    if s.doc_mask and shards.eot_id is None:
        raise BadInput(f"--doc-mask: neither {s.data} nor its shards say which token documents start with (eot_id)")
    s = dataclasses.replace(s, compile=chosen_compile(s, config, shards, before))
    s = with_start(s, config, shards.vocab_size)
    if s.doc_mask and s.compile == "on" and cuda and config.head_width < FLEX_MIN_HEAD_WIDTH:
        least = f"heads at least {FLEX_MIN_HEAD_WIDTH} wide, not {config.head_width}"
        raise BadInput(f"--doc-mask: compiled on a GPU it needs {least}; choose fewer --heads or --compile off")
    return s, config, shards


def defaults_by_model(given: Settings) -> dict[str, Any]:
    """The defaults that depend on the model; of a run to resume, what it has: newer defaults must not stop it."""
    suited, recorded = vars(defaults_of(given.model)), recorded_config(given)
    suited = suited | {"lr": suited["lr"].get(given.optimizer)}  # a class of a file has given its own
    usable = {key: value for key, value in recorded.items() if key in suited and type(value) is type(suited[key])}
    return suited | usable


def trained_model(trained: Trained, device: torch.device | None = None) -> Transformer:
    """The model of a run's checkpoint, set to validate: in fp32 on a CPU, on a GPU in the run's precision. Its
    `document_start` is left to the caller, who knows the tokens. BadInput if weights and settings do not fit."""
    config = trained.config
    try:
        shape = ModelConfig.of(config)
        model = Transformer(shape, config["vocab_size"], apart_from_muon(config["muon_on"], shape))
        model.load_state_dict(trained.weights)
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{trained.path}: its weights do not fit its settings ({first_line(error)})") from None
    if device is not None and device.type == "cuda" and config.get("precision") == "bf16":
        model.compute_dtype = torch.bfloat16
    return model.to(device).eval()


def with_start(s: Settings, config: ModelConfig, vocab_size: int) -> Settings:
    """The settings with the run to start from, if any, and the hash of its weights. A resumed run keeps what it has,
    whatever became of those weights since."""
    recorded = recorded_config(s)
    start, fingerprint = (recorded.get(key) for key in ("init_from", "init_fingerprint"))
    if s.init_from is None and not isinstance(start, str):
        return s
    s = dataclasses.replace(s, init_from=s.init_from or Path(start))
    if not has_checkpoint(s.runs_dir / s.name) or shown(s.init_from) != start:
        fingerprint = weights_digest(starting_model(s, config, vocab_size).state_dict())
    return dataclasses.replace(s, init_fingerprint=fingerprint)


def starting_model(s: Settings, config: ModelConfig, vocab_size: int) -> Transformer:
    """The best model of --init-from, or its last; BadInput unless shape and tokens are those of this run."""
    folder, data = s.init_from, s.data
    trained = open_trained(folder, "best" if (folder / BEST).exists() else "last")
    model = trained_model(trained)
    check_fit(model, config, vocab_size, f"--init-from {folder}")
    if not same_tokens(trained.tokenizer, data / TOKENIZER):
        advice = f"build shards with --tokenizer {trained.tokenizer}"
        raise BadInput(f"--init-from {folder}: its tokens are not those of {data}; {advice}")
    return model


def check_optimizer(s: Settings) -> None:
    """BadInput unless the optimizer exists and its settings go together."""
    if s.optimizer in LARGE.lr:
        if s.optimizer_options:
            raise BadInput(
                f"--optimizer-options: only for --optimizer FILE.py:CLASS; {s.optimizer} has flags of its own"
            )
    elif not is_own(s.optimizer):
        raise BadInput(f"--optimizer {s.optimizer}: choose muon, adamw or FILE.py:CLASS")
    elif s.lr is None:
        raise BadInput(f"--optimizer {s.optimizer}: give its peak rate as --lr")
    elif s.weight_decay:
        raise BadInput(f"--weight-decay {s.weight_decay}: a class of a file takes it by --optimizer-options, if at all")
    for field in ("normalize_rows", "heads_per_matrix", "decay_rule"):
        if s.optimizer != "muon" and getattr(s, field) != getattr(Settings, field):
            raise BadInput(f"--{field.replace('_', '-')}: only for --optimizer muon")
    if s.decay_rule == "hyperball" and s.weight_decay:
        raise BadInput(
            f"--weight-decay {s.weight_decay}: --decay-rule hyperball keeps every matrix's norm; leave it at 0"
        )


def chosen_for_muon(s: Settings, config: ModelConfig) -> str:
    """--muon-on in one spelling; BadInput where it names what the model lacks, or nothing, or there is no Muon."""
    try:
        names = muon_names(s.muon_on, config)
    except ValueError as wrong:
        raise BadInput(f"--muon-on {wrong}") from None
    blocks = muon_names(BLOCKS, config)
    chosen = (BLOCKS, *names[len(blocks) :]) if names[: len(blocks)] == blocks else names
    if s.optimizer != "muon" and chosen != (BLOCKS,):
        raise BadInput(f"--muon-on {','.join(chosen)}: --optimizer {s.optimizer} trains nothing by Muon")
    if s.left_lr is not None and (s.optimizer != "muon" or chosen[0] == BLOCKS):
        raise BadInput(f"--left-lr {s.left_lr}: no block matrix is left to AdamW")
    return ",".join(chosen)


def recorded_config(s: Settings) -> dict[str, Any]:
    """config.json of the run to resume; empty where there is none, or a damaged one."""
    try:
        return load_json(s.runs_dir / s.name / CONFIG) if s.resume else {}
    except BadInput:
        return {}


def config_before(given: Settings) -> dict[str, Any]:
    """Workers, threads and whether it was compiled, of the run to resume where it trained on a CPU: what this machine
    would choose anew stays, so that the run does to the bit. Empty where there is none, or a damaged one."""
    config = recorded_config(given)
    found = {"workers": config.get("world_size"), "threads": config.get("threads", 0), "compile": config.get("compile")}
    counts = [type(found[key]) is int and found[key] >= least for key, least in (("workers", 1), ("threads", 0))]
    return found if config.get("device") == "cpu" and all(counts) and found["compile"] in ("on", "off") else {}


def chosen_workers(s: Settings, rank: Rank, before: dict[str, Any]) -> tuple[int, int]:
    """How many processes train and the threads of each (0 = as many as PyTorch likes): those asked for, those of the
    resumed run, or one worker per free core, as far as they share the batch evenly, and the threads that are left.
    Ranks that torchrun started fork no more, nor does a process with a GPU."""
    for flag in ("workers", "threads"):
        if getattr(s, flag) != "auto" and getattr(s, flag) < 1:
            raise BadInput(f"--{flag} {getattr(s, flag)}: must be at least 1")
    alone = rank.count > 1 or s.device == "cuda" or not hasattr(os, "memfd_create")  # which only Linux has
    if alone and s.workers not in ("auto", 1):
        raise BadInput(f"--workers {s.workers}: for a CPU under Linux, without torchrun, which starts the ranks itself")
    workers, threads = s.workers, s.threads
    if alone:
        workers, threads = 1, 0 if threads == "auto" else threads
    elif before:
        workers = before["workers"] if workers == "auto" else workers
        threads = before["threads"] if threads == "auto" else threads
    free = free_cores() if "auto" in (workers, threads) else 1
    if workers == "auto":
        workers = next((n for n in range(free, 0, -1) if s.batch_tokens % (s.seq_len * n) == 0), 1)
    return workers, max(1, free // workers) if threads == "auto" else threads


def chosen_compile(s: Settings, config: ModelConfig, shards: Shards, before: dict[str, Any]) -> str:
    """--compile as on or off; BadInput where it is asked for and cannot be had."""
    if s.device == "cuda":
        return "on" if s.compile == "auto" else s.compile
    wanted = s.compile if s.compile != "auto" else before.get("compile")
    if wanted is None:
        with torch.device("meta"):
            flops = s.tokens * Transformer(config, shards.vocab_size).flops_per_token(s.seq_len)
        wanted = "on" if pays(flops, config.layers, s.workers, compiled_code(s, config, shards)) else "off"
    missing = why_no_compiler() if wanted == "on" else None
    if missing and s.compile == "on":
        raise BadInput(f"--compile on: {missing}")
    if missing:
        print(f"not compiled, though it would save time: {missing}", file=sys.stderr)
    return "off" if missing else wanted


def compiled_code(s: Settings, config: ModelConfig, shards: Shards) -> str:
    """The key of what torch.compile makes for this run."""
    batch = s.batch_tokens // s.workers
    shape = {"config": config, "vocab": shards.vocab_size, "batch": batch, "micro_batch": s.micro_batch}
    return cache_key(**shape, muon_on=s.muon_on, kernels=s.kernels, doc_mask=s.doc_mask, precision=s.precision)


def identity(s: Settings, shards: Shards) -> dict[str, Any]:
    """Every resolved setting under its flag's name, then the data: what config_hash is made of."""
    flags = {key: shown(value) if isinstance(value, Path) else value for key, value in vars(s).items()}
    flags["optimizer_options"] = shlex.join(s.optimizer_options) or None
    derived = {"init_fingerprint": flags.pop("init_fingerprint")}
    if is_own(s.optimizer):  # two files of one name are two optimizers
        derived["optimizer_code"] = load_class(s.optimizer, s.optimizer_options).code
        flags["optimizer"] = without_folder(s.optimizer)
    derived = {key: value for key, value in derived.items() if value is not None}
    return flags | {"data_fingerprint": shards.fingerprint, **derived, "vocab_size": shards.vocab_size}


def describe(
    s: Settings, shards: Shards, model: Transformer, ranks: int, device_name: str, yardstick: Yardstick
) -> dict[str, Any]:
    """config.json: every resolved setting under its flag's name, and where the run comes from."""
    flags = identity(s, shards)
    return {
        **flags,
        "steps": s.steps,
        "params": model.parameter_count(),
        "active_params": model.active_parameter_count(),
        "matmul_params": model.matmul_parameter_count(),
        "active_matmul_params": model.active_matmul_parameter_count(),
        "flops_per_token": model.flops_per_token(s.seq_len),
        "unigram_val_loss": finite(yardstick.unigram),
        "bytes_per_token": yardstick.bytes_per_token,
        "world_size": ranks,
        "device_name": device_name,
        "config_hash": config_hash(flags),
        **provenance(),
    }


def optimizer_options(s: Settings) -> dict[str, Any]:
    """The settings that `optim.build_optimizers` takes."""
    all_have = ("lr", "adamw_lr", "left_lr", "weight_decay", "decay_on", "muon_on", "adam_eps", "heads_per_matrix")
    first, _ = ns_schedule(s.ns_steps)[0]
    own = load_class(s.optimizer, s.optimizer_options) if is_own(s.optimizer) else None
    found = {key: getattr(s, key) for key in (*all_have, *MUON_OPTIONS)}
    return found | {"betas": (s.beta1, s.beta2), "ns_steps": first, "own": own}


def chosen_kernels(flag: str, capability: tuple[int, int]) -> frozenset[str]:
    """The fused kernels that --kernels selects on a GPU of this compute capability, (0, 0) for a CPU; below 8.0,
    where Triton's tensor-core code is not tried (a T4 is 7.5), auto is none."""
    if flag == "off":
        return frozenset()
    if capability == (0, 0):
        return CPU_KERNELS_THAT_PAY if flag == "auto" else CPU_KERNELS
    if flag == "auto":
        return KERNELS_THAT_PAY if capability >= (8, 0) else frozenset()
    return KERNELS
