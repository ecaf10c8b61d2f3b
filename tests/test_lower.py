"""The list of what Inductor writes: its counts and rules, on a passage of its code and on nano lowered for the CPU."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from bench import lower
from bench.lower import Graph, generated, surprises
from engine.files import ROOT
from model import SIZES, Transformer

V, D, N = 1000, 64, 200


def kernel(name, ops, signature, body):
    """A definition as Inductor writes it, shortened."""
    pointers = ", ".join(f"'{pointer}': '*{dtype}'" for pointer, dtype in signature.items())
    return (
        f"# Topologically Sorted Source Nodes: [x], Original ATen: [{', '.join(f'aten.{op}' for op in ops)}]\n"
        "# Source node to ATen node mapping:\n#   %x : Tensor\n"
        f"{name} = async_compile.triton('{name}', '''\n"
        f"    triton_meta={{'signature': {{{pointers}, 'xnumel': 'i32', 'XBLOCK': 'constexpr'}}, 'device': 1}},\n"
        f"    inductor_meta={{'kernel_name': '{name}', 'atomic_add_found': False}},\n"
        f"def {name}({', '.join(signature)}, xnumel, XBLOCK : tl.constexpr):\n{body}\n''', device_str='cuda')\n\n"
    )


def backward(ending="return (buf3, )"):
    """Casts two layers of a bank, then makes a dense embedding gradient: zeros, atomics, the sum with the head's."""
    cast = "    tmp0 = tl.load(in_ptr0 + ({} + x0), None)\n    tl.store(out_ptr0 + (x0), tmp0, None)"
    both = {"in_ptr0": "fp32", "out_ptr0": "bf16"}
    source = kernel("triton_poi_cast_0", ["_to_copy", "unbind"], both, cast.format(0))
    source += kernel("triton_poi_cast_1", ["_to_copy", "unbind"], both, cast.format(4096))
    source += kernel("triton_poi_zero_2", ["zeros"], {"out_ptr0": "fp32"}, "    tl.store(out_ptr0 + (x0), 0.0, None)")
    add = "    tmp0 = tl.load(in_ptr0 + (x0), None)\n    tmp1 = tl.load(in_ptr1 + (x0 // 64), None)\n"
    add += "    tl.atomic_add(out_ptr0 + (tmp1), tmp0, None, sem='relaxed')"
    rows = {"in_ptr0": "bf16", "in_ptr1": "i64", "out_ptr0": "fp32"}
    source += kernel("triton_poi_rows_3", ["embedding_dense_backward"], rows, add)
    both = "    tmp0 = tl.load(in_ptr0 + (x0), None)\n    tmp1 = tl.load(in_ptr1 + (x0), None)\n"
    both += "    tl.store(out_ptr0 + (x0), tmp0 + tmp1, None)"
    head = f"reinterpret_tensor(buf9, ({V}, {D}), ({D}, 1), 0)"
    sum_ = {"in_ptr0": "bf16", "in_ptr1": "fp32", "out_ptr0": "fp32"}
    return (
        source
        + kernel("triton_poi_sum_4", ["_to_copy", "add"], sum_, both)
        + (
            "def call(args):\n"
            "    assert_size_stride(primals_1, (2, 64, 64), (4096, 64, 1))\n"
            f"    assert_size_stride(primals_2, ({N}, ), (1, ))\n"
            f"    assert_size_stride(tangents_1, ({N}, {D}), ({D}, 1))\n"
            "    buf0 = empty_strided_cuda((64, 64), (64, 1), torch.bfloat16)\n"
            "    triton_poi_cast_0.run(primals_1, buf0, 4096, stream=stream0)\n"
            "    buf1 = buf0; del buf0  # reuse\n"
            "    triton_poi_cast_1.run(primals_1, buf1, 4096, stream=stream0)\n"
            f"    buf2 = empty_strided_cuda(({V}, {D}), ({D}, 1), torch.float32)\n"
            f"    triton_poi_zero_2.run(buf2, {V * D}, stream=stream0)\n"
            f"    triton_poi_rows_3.run(tangents_1, primals_2, buf2, {N * D}, stream=stream0)\n"
            f"    buf3 = empty_strided_cuda(({V}, {D}), ({D}, 1), torch.float32)\n"
            f"    triton_poi_sum_4.run({head}, buf2, buf3, {V * D}, stream=stream0)\n"
            f"    {ending}\n"
        )
    )


def test_bytes_of_each_kernel_equal_the_tensors_it_touches():
    casts, zeros, rows, total = generated(Graph("backward", backward(), ()))
    assert (casts.launches, casts.bytes) == (2, 64 * 64 * (4 + 2))  # one layer of the bank, not both
    assert zeros.bytes == V * D * 4
    assert rows.bytes == N * D * 2 + N * 8 + 2 * N * D * 4  # atomics read and write the rows of tokens alone
    assert total.bytes == V * D * (2 + 4 + 4)


def test_casts_atomics_and_wide_intermediates_are_surprises_and_gradients_are_not():
    graph = Graph("backward", backward(), ())
    found = "\n".join(surprises([graph], generated(graph), N, D))
    assert "2 x triton_poi_cast_0, 0 MB: only converts" in found
    assert "triton_poi_rows_3, 0 MB: adds with atomics" in found
    assert f"1 x fp32 tensor ({V}, {D}) between kernels" in found  # buf2, and not the gradient buf3
    assert len(found.splitlines()) == 3
    kept = Graph("backward", backward("return (buf2, buf3, )"), ())
    assert "fp32 tensor" not in "\n".join(surprises([kept], generated(kept), N, D))


def test_spills_fallbacks_and_fp32_products_are_surprises():
    row = generated(Graph("forward", backward(), ()))[1]
    spilled, saved = (dataclasses.replace(row, spills=spills) for spills in ((8, 16), (0, 16)))
    sort = lower.Row("forward", "aten.sort", "4096", 1, 8, ops=("aten.sort",), dtypes=("int64",))
    product = lower.Row("forward", "aten.mm", "64x64 64x64", 1, 8, 2 * 64**3, dtypes=("float32",))
    assert "spills, at least 8 B" in surprises([], [spilled], N, D)[0]
    assert surprises([], [saved], N, D) == []
    assert "falls back" in surprises([], [sort], N, D)[0]
    assert "multiplies fp32" in surprises([], [product], N, D)[0]


def test_products_of_a_lowered_step_have_the_flops_of_the_model():
    shape = dataclasses.replace(SIZES["nano"], layers=1)
    forward, backward = lower.lower(shape, kernels=False, device="cpu")
    assert (forward.phase, backward.phase) == ("forward", "backward")
    with torch.device("meta"):
        model = Transformer(shape, lower.VOCAB)
    products = 2 * lower.TOKENS * model.matmul_parameter_count()
    attention = 2 * lower.TOKENS * shape.seq_len * shape.d_model
    assert sum(call.flops for call in forward.calls) == products + attention
    assert sum(call.flops for call in backward.calls) == 2 * products + attention * 5 // 2


@pytest.mark.skipif(torch.version.cuda is not None, reason="PyTorch's CUDA build")
def test_a_cpu_build_gives_one_sentence():
    command = [sys.executable, "-m", "bench.lower"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: torch ")
    assert result.stderr.endswith("install PyTorch's CUDA build, which needs no GPU for this\n")
