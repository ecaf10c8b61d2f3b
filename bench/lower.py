"""Lists what Inductor makes of the training step for a GPU that this machine need not have: kernels, bytes, surprises.

    python -m bench.lower [--model 88m] [--capability 89] [--kernels] [--json FILE]

Takes the compiled forward and backward of one micro-batch (bf16, as train.py runs it on a GPU) through PyTorch's CUDA
build with fake tensors and a pretended GPU, and compiles what Inductor wrote with Triton's compiler. A row is a kernel
or a library call with all its launches; kernels that differ in integer constants alone share one, and the first is
compiled. Bytes are counted from its code: each tensor once per launch, nothing kept in L2. Nothing is run or timed:
us is the larger of bytes and FLOPs over the data sheet of the GPU named below the table. A graph break is an error.
"""

import contextlib
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any
from unittest import mock

import torch
import tyro

from bench import pretended_gpu
from bench.harness import JsonFlag, print_table, write_figures
from bench.static import LIMITS, registers_and_stack
from engine.cli import AT_LEAST_1, BadInput, check_limits, exit_with_a_sentence, one_of
from engine.speed import DEVICES, Device
from engine.step import prepare_torch
from model import KERNELS, SIZES, ModelConfig, Transformer

GPUS = {
    80: "A100-SXM4-40GB",
    86: "GeForce RTX 3090",
    89: "GeForce RTX 4090",
    90: "H100 80GB HBM3",
    120: "GeForce RTX 5090",
}
VOCAB, TOKENS = 49_152, 16_384  # of the published 88M step, per forward pass
DEFINITION = re.compile(
    r"Original ATen: \[([^\]]*)\]\n(?:#[^\n]*\n)*(\w+) = async_compile\.triton\('\w+', '''\n(.*?)''', device_str=",
    re.DOTALL,
)
LAUNCH = re.compile(r"^ *(triton_\w+)\.run\((.*), stream=\w+\)", re.MULTILINE)
ARGUMENT = re.compile(r"reinterpret_tensor\(\w+, \([^)]*\), \([^)]*\), \d+\)|\w+")
BUFFER = re.compile(r"(\w+) = empty_strided_\w+\(\(([^)]*)\), \([^)]*\), torch\.(\w+)\)")
SHAPED = re.compile(r"(?:(\w+) = empty_strided_\w+\(|assert_size_stride\((\w+), )\(([^)]*)\)")
RENAMED = re.compile(r"^ *(\w+) = (?:reinterpret_tensor\()?(\w+)\b[^\n]*# reuse$", re.MULTILINE)
ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "i64": 8, "i32": 4, "i1": 1, "i8": 1, "u8": 1, "fp64": 8, "u64": 8}
# Operations that move or convert numbers and compute none.
MOVES = frozenset(("_to_copy", "_unsafe_view", "alias", "as_strided", "cat", "clone", "copy", "copy_", "expand"))
MOVES |= {"permute", "select", "slice", "split", "squeeze", "stack", "t", "transpose", "unbind", "unsqueeze", "view"}


@dataclass(frozen=True)
class Row:
    """Launches of one kernel or library call in one pass; bytes, FLOPs and registers of one launch."""

    phase: str
    name: str
    numel: str
    launches: int
    bytes: int
    flops: int = 0
    ops: tuple[str, ...] = ()
    source: str | None = None  # of Triton kernels
    dtypes: tuple[str, ...] = ()  # of a library call's operands
    registers: int | None = None
    shared_bytes: int | None = None
    spills: tuple[int, ...] = ()  # bytes of each configuration that Inductor would time

    def seconds(self, device: Device) -> float:
        return max(self.bytes / device.bytes_per_second, self.flops / device.bf16_flops)


@dataclass(frozen=True)
class Graph:
    """One compiled pass: the Python that Inductor wrote, and its library calls."""

    phase: str
    source: str
    calls: tuple[Row, ...]


def lower(shape: ModelConfig, kernels: bool, device: str = "cuda") -> list[Graph]:
    """Forward and backward of a micro-batch, written for the pretended GPU (or, in tests, for the CPU)."""
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.graph import GraphLowering
    from torch._subclasses import FakeTensorMode

    graphs: list[Graph] = []

    def keep(graph: Any) -> SimpleNamespace:
        """In place of loading the code, which would need the GPU."""
        phase, (code, _) = "backward" if graph.is_backward else "forward", graph.codegen()
        graphs.append(Graph(phase, code.value, tuple(library_calls(phase, graph.scheduler.nodes))))
        return SimpleNamespace(call=never, __file__=None)

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compile_fx(module, inputs)
        return never

    with (
        pretended_gpu.tracing() if device == "cuda" else contextlib.nullcontext(),
        functorch.patch(force_non_lazy_backward_lowering=True),
        inductor.patch(force_disable_caches=True),  # a graph from the cache has no code
        mock.patch.object(GraphLowering, "compile_to_module", keep),
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.device(device),
    ):
        model = Transformer(shape, VOCAB)
        model.compute_dtype, model.kernels = torch.bfloat16, KERNELS if kernels else frozenset()
        rows = torch.empty((max(1, TOKENS // shape.seq_len), shape.seq_len + 1), dtype=torch.long)
        with contextlib.suppress(Finished):
            torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(rows[:, :-1], rows[:, 1:])
    return graphs


class Finished(Exception):
    """Both passes are written; the compiled model would run next."""


def never(*_: Any) -> None:
    raise Finished


def library_calls(phase: str, nodes: list[Any]) -> Iterator[Row]:
    """The scheduler's nodes that are not generated code, with bytes and FLOPs of their tensors."""
    from torch._inductor import ir

    for node in (inner for outer in nodes for inner in outer.get_nodes()):
        if not node.is_extern() or isinstance(node.node, ir.MultiOutput):
            continue
        origin = node.node.get_origin_node() or next(iter(node.node.origins))
        inputs = [v for a in origin.all_input_nodes for v in _tensors(a.meta["val"])]
        outputs = _tensors(origin.meta["val"])
        name = str(origin.target).removesuffix(".default")
        shapes = " ".join("x".join(map(str, v.shape)) for v in inputs[:3])
        dtypes = tuple(sorted({str(v.dtype).removeprefix("torch.") for v in inputs}))
        moved = sum(v.numel() * v.element_size() for v in inputs + outputs)
        yield Row(phase, name, shapes, 1, moved, flops_of(name, inputs, outputs), (name,), dtypes=dtypes)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, torch.Tensor)]


def flops_of(name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
    """Of a product, causal attention, or one of this project's operators; 0 of anything else."""
    op = name.split(".")[-1]
    if op in ("mm", "bmm", "addmm", "baddbmm"):
        return 2 * outputs[0].numel() * inputs[-2].shape[-1]
    if op.startswith("_scaled_dot_product"):  # two products forward and five backward, half of each square
        backward = "backward" in op
        (B, H, T, E), products = inputs[backward].shape, 5 if backward else 2
        return products * B * H * T * T * E
    if op in ("linear_cross_entropy", "relu2_mlp", "relu2_dpre"):
        products = {"linear_cross_entropy": 3, "relu2_mlp": 2, "relu2_dpre": 1}[op]
        return 2 * products * inputs[0].numel() * inputs[1].shape[0]
    if op in ("grouped_matmul", "grouped_outer"):
        return 2 * inputs[0].numel() * (inputs[1].shape[-1])
    return 0


def generated(graph: Graph) -> list[Row]:
    """The Triton kernels of a pass in the order of their first launch."""
    kernels = {name: (ops, source) for ops, name, source in DEFINITION.findall(graph.source)}
    rows, numels = dict[tuple[str, str], Row](), numels_of(graph.source)
    for name, arguments in LAUNCH.findall(graph.source):
        ops, source = kernels[name]
        numel = "x".join(word for word in arguments.split(", ") if word.isdigit())
        key = re.sub(r"\d+", "#", source.replace(name, "")), numel
        if key in rows:
            rows[key] = replace(rows[key], launches=rows[key].launches + 1)
            continue
        words = tuple(sorted({word.split(".")[1] for word in ops.split(", ") if "." in word}))
        rows[key] = Row(graph.phase, name, numel, 1, bytes_of(source, arguments, numels), 0, words, source)
    return list(rows.values())


def numels_of(source: str) -> dict[str, int]:
    """Elements of each named tensor of a pass."""
    found = {new or given: _numel(shape) for new, given, shape in SHAPED.findall(source)}
    for new, old in RENAMED.findall(source):
        found.setdefault(new, found.get(old, 0))
    return found


def _numel(shape: str) -> int:
    return math.prod(int(n) for n in shape.split(",") if n.strip())


def bytes_of(source: str, arguments: str, numels: dict[str, int]) -> int:
    """Bytes that a launch reads and writes, each tensor at most once in each direction.

    A kernel has as many elements as its range; of a larger tensor it touches one for each load or store it has.
    """
    given = ARGUMENT.findall(arguments)
    elements = math.prod(int(word) for word in given if word.isdigit())
    signature, total = re.search(r"'signature': \{([^}]*)\}", source)[1], 0
    pointers = re.findall(r"'(\w+)': '\*(\w+)'", signature)
    for (pointer, dtype), argument in zip(pointers, given, strict=False):
        shape = re.search(r"\(\w+, \(([^)]*)\)", argument)
        numel = _numel(shape[1]) if shape else numels.get(argument, 0)
        for access in ("load", "store"):
            uses = len(re.findall(rf"tl\.(?:{access}|atomic_\w+)\({pointer}\b", source))
            total += ITEM_BYTES[dtype] * min(numel, uses * elements)
    return total


def rows_of(graph: Graph) -> list[Row]:
    """Generated kernels, then library calls, equal ones as one row."""
    merged: dict[Row, int] = {}
    for call in graph.calls:
        merged[call] = merged.get(call, 0) + 1
    return generated(graph) + [replace(call, launches=count) for call, count in merged.items()]


def compiled(row: Row, capability: int) -> Row:
    """With the resources of the first configuration, and what each would spill."""
    from torch._inductor.codecache import PyCodeCache

    if row.source is None:
        return row
    tuner = getattr(PyCodeCache.load(row.source), row.name)
    made = [tuner._precompile_config(config).kernel for config in tuner.configs]
    found = [registers_and_stack(binary.asm["cubin"]) for binary in made]
    return replace(
        row, registers=found[0][0], shared_bytes=made[0].metadata.shared, spills=tuple(stack for _, stack in found)
    )


def surprises(graphs: list[Graph], rows: list[Row], tokens: int, width: int) -> list[str]:
    """What nobody asked for, by rule: passes that only move numbers, wide numbers, atomics, fallbacks, spills."""
    found = []
    for row in rows:
        where = f"{row.phase}: {row.launches} x {row.name}, {row.launches * row.bytes / 1e6:,.0f} MB"
        if row.source and set(row.ops) <= MOVES:
            found.append(f"{where}: only {'converts' if '_to_copy' in row.ops else 'copies'}")
        if row.source and "atomic_add" in row.source.replace("'atomic_add_found'", ""):
            found.append(f"{where}: adds with atomics, in an order that varies from run to run")
        if row.source is None and not row.flops:
            found.append(f"{where}: no Triton kernel, falls back to ATen")
        if row.flops and row.dtypes == ("float32",):
            found.append(f"{where}: multiplies fp32 operands {row.numel}")
        if row.spills and min(row.spills):
            found.append(f"{where}: every configuration spills, at least {min(row.spills)} B a thread")
    for graph in graphs:
        found += [
            f"{graph.phase}: {count} x fp32 tensor ({shape}) between kernels, {count * size / 1e6:,.0f} MB"
            for shape, size, count in wide_buffers(graph, tokens * width)
        ]
        for count in (len(re.findall(r"empty_strided_cpu\w*\(\(", graph.source)),):
            found += [f"{graph.phase}: {count} tensors on the host"] if count else []
    return found


def wide_buffers(graph: Graph, at_least: int) -> list[tuple[str, int, int]]:
    """fp32 intermediates of so many elements that are no gradient: shape, bytes of one, how many."""
    owner = {}
    for new, old in RENAMED.findall(graph.source):
        owner[new] = owner.get(old, old)
    returned = (
        set(re.findall(r"\bbuf\d+\b", graph.source.rpartition("return (")[2])) if graph.phase == "backward" else set()
    )
    outputs = {owner.get(name, name) for name in returned}
    counts: dict[tuple[str, int], int] = {}
    for name, shape, dtype in BUFFER.findall(graph.source):
        numel = _numel(shape)
        if dtype == "float32" and numel >= at_least and name not in outputs:
            counts[shape, 4 * numel] = counts.get((shape, 4 * numel), 0) + 1
    return [(shape, size, count) for (shape, size), count in counts.items()]


def line_of(row: Row, device: Device) -> dict[str, str]:
    """A line of the printed table."""
    seconds = row.seconds(device)
    line = {"pass": row.phase, "kernel": row.name[:76], "numel": row.numel, "launches": str(row.launches)}
    line |= {"MB": f"{row.bytes / 1e6:.2f}", "GFLOP": f"{row.flops / 1e9:.2f}", "us": f"{1e6 * seconds:.1f}"}
    line |= {"all us": f"{1e6 * seconds * row.launches:.0f}", "registers": str(row.registers or "-")}
    shared, spill = row.shared_bytes, min(row.spills, default=None)
    return line | {"shared B": "-" if shared is None else str(shared), "spill B": "-" if spill is None else str(spill)}


@dataclass(frozen=True)
class Arguments(JsonFlag):
    """What Inductor makes of the training step for a GPU that this machine need not have."""

    model: Annotated[str, one_of(SIZES)] = "88m"
    """Named size."""
    capability: int = 89
    """Architecture: 80, 86, 89, 90 or 120."""
    layers: Annotated[int | None, AT_LEAST_1] = None
    """Layers, by default the model's; all but the first and last are alike, and 22 take half an hour on a busy core."""
    kernels: bool = False
    """With the fused kernels of train.py --kernels on."""
    source: Path | None = None
    """Write Inductor's code into this folder too."""


@exit_with_a_sentence
def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    check_limits(a)
    if a.capability not in LIMITS:
        raise BadInput(f"--capability {a.capability}: choose from {', '.join(map(str, LIMITS))}")
    pretended_gpu.restart_with(a.capability)
    prepare_torch()
    shape = SIZES[a.model]
    graphs = lower(replace(shape, layers=a.layers or shape.layers), a.kernels)
    for graph in graphs if a.source else ():
        a.source.mkdir(parents=True, exist_ok=True)
        (a.source / f"{graph.phase}.py").write_text(graph.source, encoding="utf-8")
    gpu = f"NVIDIA {GPUS[a.capability]}"
    with pretended_gpu.tracing():
        rows = [compiled(row, a.capability) for graph in graphs for row in rows_of(graph)]
    rows.sort(key=lambda row: -row.seconds(DEVICES[gpu]) * row.launches)
    print_table([line_of(row, DEVICES[gpu]) for row in rows])
    for phase in ("forward", "backward"):
        print(summary(phase, [row for row in rows if row.phase == phase], gpu))
    found = surprises(graphs, rows, TOKENS, shape.d_model)
    print(f"{len(found)} surprises", *found, sep="\n")
    write_figures(a.json, {"rows": [asdict(replace(row, source=None)) for row in rows], "surprises": found})
    return 0


def summary(phase: str, rows: list[Row], gpu: str) -> str:
    """Totals of one pass in a sentence."""
    launches, moved = sum(r.launches for r in rows), sum(r.launches * r.bytes for r in rows) / 1e9
    written = sum(r.launches for r in rows if r.source)
    flops, ms = (
        sum(r.launches * r.flops for r in rows) / 1e12,
        1e3 * sum(r.launches * r.seconds(DEVICES[gpu]) for r in rows),
    )
    return (
        f"{phase}: {launches} launches ({written} of generated kernels), {moved:.2f} GB, {flops:.2f} TFLOP; "
        f"at least {ms:.2f} ms on an {gpu}"
    )


if __name__ == "__main__":
    sys.exit(main())
