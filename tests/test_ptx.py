"""The interpreter of compiled kernels, against NumPy and float64, and against kernels that are wrong on purpose."""

import re

import pytest
import torch

from kernels import configs

if configs.INTERPRETED or not configs.HAS_TRITON:
    pytest.skip("the interpreter of Triton replaces every kernel", allow_module_level=True)

import triton

import ptx
from tests import ptx_kernels

CAPABILITIES = (89, 120)
HALVES = (torch.float16, torch.bfloat16)
on_both = pytest.mark.parametrize("capability", CAPABILITIES)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def poison(*shape, dtype=torch.float32):
    return torch.full(shape, torch.nan, dtype=dtype)


def run_clean(*arguments, **options):
    launch = ptx.run(*arguments, **options)
    assert launch.faults == {}
    return launch


def assert_close(found, exact, tolerance):
    """Error against the largest value; NaN is never close."""
    assert (found.double() - exact.double()).abs().max() <= tolerance * exact.abs().max()


# Single instructions, most of which the kernels here do not happen to use: registers, and the result by definition.
ONE_INSTRUCTION = """
.visible .entry single(
	.param .u64 out
)
.reqntid 32
{{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<9>;
	.reg .b64 %rd<9>;
	ld.param.b64 %rd8, [out];
	{moves}
	{instruction};
	st.global.{kind} [ %rd8 + 0 ], {{ {result} }};
	ret;
}}
"""
CASES = [
    ("lop3.b32 %r1, %r2, %r3, %r4, 0x96", {"r2": 12, "r3": 10, "r4": 6}, 12 ^ 10 ^ 6),
    ("lop3.b32 %r1, %r2, %r3, %r4, 0xEA", {"r2": 12, "r3": 10, "r4": 1}, (12 & 10) | 1),
    ("prmt.b32 %r1, %r2, %r3, 0x5410", {"r2": 0x11223344, "r3": 0x55667788}, 0x77883344),
    ("prmt.b32 %r1, %r2, %r3, 0x7632", {"r2": 0x11223344, "r3": 0x55667788}, 0x55661122),
    ("prmt.b32 %r1, %r2, %r3, 0x0008", {"r2": 0x11223384, "r3": 0}, 0x848484FF),
    ("shf.l.wrap.b32 %r1, %r2, %r3, 8", {"r2": 0xAABBCCDD, "r3": 0x11223344}, 0x223344AA),
    ("shf.r.clamp.b32 %r1, %r2, %r3, 8", {"r2": 0xAABBCCDD, "r3": 0x11223344}, 0x44AABBCC),
    ("bfe.u32 %r1, %r2, 4, 8", {"r2": 0x12345678}, 0x67),
    ("bfe.s32 %r1, %r2, 4, 4", {"r2": 0x000000F0}, 0xFFFFFFFF),
    ("bfi.b32 %r1, %r2, %r3, 8, 4", {"r2": 0xFF, "r3": 0x12345678}, 0x12345F78),
    ("shl.b32 %r1, %r2, 40", {"r2": 5}, 0),
    ("shr.s32 %r1, %r2, 40", {"r2": 0x80000000}, 0xFFFFFFFF),
    ("mul.wide.s32 %rd1, %r2, %r3", {"r2": 0xFFFFFFFF, "r3": 7}, 2**64 - 7),
    ("mul.hi.u32 %r1, %r2, %r3", {"r2": 0xFFFFFFFF, "r3": 0x10}, 0xF),
    ("mad.lo.s32 %r1, %r2, %r3, %r4", {"r2": 0x10000, "r3": 0x10001, "r4": 5}, 0x10005),
    ("div.s32 %r1, %r2, %r3", {"r2": 2**32 - 7, "r3": 2}, 2**32 - 3),
    ("rem.s32 %r1, %r2, %r3", {"r2": 2**32 - 7, "r3": 2}, 2**32 - 1),
    ("cvt.rzi.s32.f32 %r1, %r2", {"r2": 0x4F800000}, 0x7FFFFFFF),
    ("cvt.rzi.s32.f32 %r1, %r2", {"r2": 0x7FC00000}, 0),
    ("cvt.rn.bf16x2.f32 %r1, %r2, %r3", {"r2": 0x3F800000, "r3": 0x40000000}, 0x3F804000),
    ("cvt.rn.f16x2.f32 %r1, %r2, %r3", {"r2": 0x3F800000, "r3": 0x40000000}, 0x3C004000),
    ("cvt.rn.bf16.f32 %rs1, %r2", {"r2": 0x3F818000}, 0x3F82),
    ("cvt.rn.bf16.f32 %rs1, %r2", {"r2": 0x3F808000}, 0x3F80),
    ("fma.rn.bf16x2 %r1, %r2, %r3, %r4", {"r2": 0x3F804000, "r3": 0x40004000, "r4": 0x3F803F80}, 0x404040A0),
    ("add.f16x2 %r1, %r2, %r3", {"r2": 0x3C004000, "r3": 0x3C003C00}, 0x40004200),
    ("max.f32 %r1, %r2, %r3", {"r2": 0x7FC00000, "r3": 0x3F800000}, 0x3F800000),
    ("fma.rn.f32x2 %rd1, %rd2, %rd3, 0", {"rd2": 0x3F80000040000000, "rd3": 0x4000000040000000}, 0x4000000040800000),
    ("sub.rn.f32.bf16 %r1, %rs2, %r3", {"rs2": 0x4000, "r3": 0x3F800000}, 0x3F800000),
    ("popc.b32 %r1, %r2", {"r2": 0xF0F}, 8),
    ("ex2.approx.ftz.f32 %r1, %r2", {"r2": 0xC3000000}, 0),  # 2^-128 is subnormal
]


def execute_text(text, **tensors):
    return ptx.execute(text, tensors, ptx.Launch("single", (1,), 89, 0))


@pytest.mark.parametrize(("instruction", "registers", "expected"), CASES, ids=lambda case: str(case)[:24])
def test_an_instruction_follows_its_definition(instruction, registers, expected):
    sizes = {"r": "b32", "rd": "b64", "rs": "b16"}
    moves = "\n".join(f"mov.{sizes[n.rstrip('0123456789')]} %{n}, {value};" for n, value in registers.items())
    result = re.match(r"\S+ %(\w+)", instruction)[1]
    kind = sizes[result.rstrip("0123456789")]
    out = torch.zeros(1, dtype=torch.int64)
    text = ONE_INSTRUCTION.format(moves=moves, instruction=instruction, kind=kind, result=f"%{result}")
    execute_text(text, out=out)
    assert out.item() % 2**64 == expected


@pytest.mark.parametrize(
    "instruction",
    [
        "wgmma.fence.sync.aligned",
        "cp.async.bulk.commit_group",
        "st.local.b32 [ %rd1 + 0 ], { %r1 }",
        "bar.sync 1, 64",
        "add.cc.u32 %r1, %r2, %r3",
        "cvt.rz.f16.f32 %rs1, %r1",
        "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%r1, %r2}, {%r1, %r2, %r3, %r4}, {%r1, %r2}, {%r1, %r2}",
    ],
)
def test_an_instruction_that_is_not_covered_is_refused_by_name(instruction):
    text = ONE_INSTRUCTION.format(moves="", instruction=instruction, kind="b32", result="%r1")
    with pytest.raises(ptx.PtxError, match=re.escape(instruction[:20]) + ".*not known"):
        execute_text(text, out=torch.zeros(1, dtype=torch.int64))


@on_both
@pytest.mark.parametrize(
    ("cols", "warps", "dtype"), [(100, 4, torch.float32), (1024, 8, HALVES[0]), (700, 2, HALVES[1])]
)
def test_softmax_matches_float64(capability, cols, warps, dtype):
    x = (4 * normal(5, cols)).to(dtype)
    out = torch.full_like(x, torch.nan)
    sizes = {"BLOCK": triton.next_power_of_2(cols), "num_warps": warps}
    run_clean(ptx_kernels.softmax_kernel, (5,), x, out, cols, x.stride(0), capability=capability, **sizes)
    assert_close(out, x.double().softmax(1), 2 * torch.finfo(dtype).eps + 1e-6)


def dot_problem(m, n, k, dtype=torch.float16, layout="", block=(64, 64, 32), stages=3, precision="ieee"):
    """Grid, arguments, constants and the exact result of a product; letters of `layout` lie by columns."""
    a, b, out = normal(m, k).to(dtype), normal(k, n, seed=1).to(dtype), poison(m, n)
    a, b, out = (x.T.contiguous().T if name in layout else x for name, x in zip("abo", (a, b, out), strict=True))
    constants = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), block, strict=True))
    constants |= {"PRECISION": precision, "num_warps": 4, "num_stages": stages}
    arguments = (a, b, out, m, n, k, *a.stride(), *b.stride(), *out.stride())
    return (triton.cdiv(m, block[0]), triton.cdiv(n, block[1])), arguments, constants, a.double() @ b.double()


@on_both
@pytest.mark.parametrize(
    ("shape", "layout", "dtype", "precision"),
    [
        ((64, 64, 64), "", HALVES[0], "ieee"),
        ((50, 70, 100), "a", HALVES[0], "ieee"),
        ((128, 96, 160), "abo", HALVES[1], "ieee"),
        ((50, 70, 100), "b", torch.float32, "tf32"),
        ((64, 40, 33), "o", torch.float32, "ieee"),
    ],
)
def test_a_product_matches_float64(capability, shape, layout, dtype, precision):
    grid, arguments, constants, exact = dot_problem(*shape, dtype, layout, precision=precision)
    run_clean(ptx_kernels.dot_kernel, grid, *arguments, capability=capability, **constants)
    assert_close(arguments[2], exact, 2e-3 if precision == "tf32" else 2e-6)


@on_both
@pytest.mark.parametrize(
    ("rows", "cols", "dtype"), [(16, 16, HALVES[0]), (64, 32, torch.float32), (128, 64, HALVES[1])]
)
def test_a_transpose_moves_every_element(capability, rows, cols, dtype):
    x = normal(rows, cols).to(dtype)
    turned, twice = poison(cols, rows, dtype=dtype), poison(rows, cols, dtype=dtype)
    run_clean(ptx_kernels.transpose_kernel, (1,), x, turned, twice, R=rows, C=cols, capability=capability)
    assert torch.equal(turned, x.T)
    assert torch.equal(twice, x + x)


@on_both
def test_reductions_and_scans_match_float64(capability):
    x = normal(32, 128)
    sums, largest, scan, where = poison(32), poison(128), poison(32, 128), torch.full((32,), -1, dtype=torch.int32)
    arguments = (x, sums, largest, where, scan)
    run_clean(ptx_kernels.reductions_kernel, (1,), *arguments, R=32, C=128, capability=capability)
    assert_close(sums, x.double().sum(1), 1e-6)
    assert torch.equal(largest, x.amax(0))
    assert torch.equal(where, x.argmax(1).int())
    assert_close(scan, x.double().cumsum(1), 1e-5)


@on_both
def test_programs_that_loop_and_branch_differently_run_together(capability):
    counts = torch.tensor([3, 9, 0, 16, 7, 0, 1, 1], dtype=torch.int32)
    x, out = normal(8, 256), poison(8)
    run_clean(ptx_kernels.loops_kernel, (8,), counts, x, out, BLOCK=256, capability=capability)
    sums, largest = x.double().sum(1), x.double().amax(1)
    roots = counts.double().sqrt().ceil().int().tolist()
    exact = [sums[:c].sum() if p % 2 == 0 else -largest[: roots[p]].sum() for p, c in enumerate(counts.tolist())]
    assert_close(out, torch.stack(exact), 1e-5)


@on_both
def test_functions_of_floats_match_float64(capability):
    x, out = normal(256) * 3, poison(9, 256)
    run_clean(ptx_kernels.floats_kernel, (1,), x, out, BLOCK=256, capability=capability)
    d = x.double()
    exact = [d.exp(), (d.abs() + 1).log(), d.abs().sqrt(), d * d - d, d.floor(), d.sigmoid()]
    exact += [x.clamp(max=0.25).bfloat16(), (x * 7).half(), d.erf() + (d.abs() + 1).rsqrt()]
    for row, values in zip(out, exact, strict=True):
        assert_close(row, values, 1e-6)


@on_both
def test_integers_equal_pytorchs_to_the_bit(capability):
    x, out = normal(256) * 3, torch.zeros(8, 256, dtype=torch.int32)
    i = torch.randint(-(2**31), 2**31 - 1, (256,), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    run_clean(ptx_kernels.integers_kernel, (1,), x, i, out, BLOCK=256, capability=capability)
    wide = i.long()
    exact = [
        torch.div(wide, 7, rounding_mode="trunc"),
        torch.fmod(wide, 7),
        wide * 2654435761 >> 16,
        (wide ^ (wide << 3)) & ~(wide >> 5),
        torch.tensor([(n % 2**32) * 0x9E3779B9 >> 32 for n in wide.tolist()]),
        (x * 100).int(),
        torch.where(i > 5, i, -i).to(torch.int8).int(),
        i.float().view(torch.int32),
    ]
    for row, values in zip(out, exact, strict=True):
        assert torch.equal(row, values.long().to(torch.int32))


@on_both
def test_atomics_of_all_programs_add_up(capability):
    x = torch.randint(0, 1000, (512,), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    sums, largest = torch.zeros(8), torch.zeros(1, dtype=torch.int32)
    run_clean(ptx_kernels.atomics_kernel, (2,), x, sums, largest, BINS=8, BLOCK=256, capability=capability)
    assert torch.equal(sums, torch.zeros(8).scatter_add(0, (x % 8).long(), x.float()))
    assert largest == x.max()


@pytest.mark.parametrize(
    ("x", "out", "words"),
    [
        (normal(300), poison(512), "out of bounds.*a_ptr"),
        (normal(512), poison(300), "out of bounds.*out_ptr"),
        (normal(1024)[::2], poison(512), "outside the elements of the tensor, but inside its storage.*a_ptr"),
    ],
    ids=["read past the end", "write past the end", "read between the elements"],
)
def test_an_access_outside_its_tensor_is_refused_with_the_line_and_the_thread(x, out, words):
    with pytest.raises(
        ptx.PtxError, match=rf"ptx_kernels\.py:\d+ .*program \d, thread \d+.*{words.split('.*')[-1]}"
    ) as error:
        ptx.run(ptx_kernels.unmasked_kernel, (2,), x, out, BLOCK=256, capability=89)
    assert str(error.value).startswith(words.split(".*")[0])


def test_programs_that_write_what_others_read_race():
    x, out = normal(300), poison(2, 256)
    launch = ptx.run(ptx_kernels.racing_kernel, (2,), x, out, BLOCK=256, capability=89)
    assert {fault.kind for fault in launch.faults} == {"race: unordered write"}  # both read before either writes


@pytest.mark.parametrize(
    ("pattern", "harmless"),
    [(r"bar\.sync", 2), (r"cp\.async\.wait_group", 0), (r"cp\.async\.commit_group", 2)],
    ids=["barrier", "wait", "commit"],
)
@on_both
def test_a_product_without_one_of_its_barriers_waits_or_commits_is_noticed(capability, pattern, harmless):
    """Each matching line is taken out in turn. `harmless` of them may be: a barrier between two buffers, groups that
    arrive together; the result is right there, and so is the interpreter's silence."""
    grid, arguments, constants, exact = dot_problem(64, 64, 160)
    text = ptx.compiled(ptx_kernels.dot_kernel, grid, arguments, constants, capability).asm["ptx"].split("\n")
    lines = [n for n, line in enumerate(text) if re.search(pattern, line)]
    silent = 0
    for n in lines:
        arguments[2].fill_(torch.nan)
        options = {"capability": capability, "rewrite": lambda _, n=n: "\n".join(text[:n] + text[n + 1 :])}
        launch = ptx.run(ptx_kernels.dot_kernel, grid, *arguments, **options, **constants)
        right = (arguments[2] - exact).abs().max() < 1e-3
        assert right or launch.faults, text[n]
        silent += not launch.faults
    assert len(lines) >= 2
    assert silent <= harmless


def test_counters_of_an_unmasked_product_equal_a_count_by_hand():
    """64 x 64 x 64: 4 x 8 x 4 products of 16 x 8 x 16; A and B are read once, 32-byte sectors, out is written once."""
    grid, arguments, constants, _ = dot_problem(64, 64, 64)
    launch = run_clean(ptx_kernels.dot_kernel, grid, *arguments, capability=89, **constants)
    assert launch.instructions["mma"] == 4 * 8 * 4
    assert launch.total("cp.async.global").units == 2 * 64 * 64 * 2 // 32
    stored = launch.total("st.global")
    assert (stored.units, stored.ideal_units, stored.bytes) == (64 * 64 * 4 // 32,) * 2 + (64 * 64 * 4,)
    assert (
        launch.total("ldmatrix").units == launch.total("ldmatrix").ideal_units == 4 * launch.total("ldmatrix").requests
    )
    assert "mma 128" in launch.summary()


def test_a_transpose_through_addresses_is_counted_as_many_sectors():
    x, turned, twice = normal(32, 32), poison(32, 32), poison(32, 32)
    launch = ptx.run(ptx_kernels.transpose_kernel, (1,), x, turned, twice, R=32, C=32, num_warps=1, capability=89)
    stores = sorted(launch.lines("st.global").values(), key=lambda traffic: traffic.units)
    assert stores[0].units == stores[0].ideal_units == 32 * 32 * 4 // 32
    assert sum(traffic.bytes for traffic in stores) == 2 * 32 * 32 * 4
