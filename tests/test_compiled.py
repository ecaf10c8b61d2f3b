"""The project's kernels as compiled code, executed on the CPU; and whether a broken kernel would be noticed."""

import re

import pytest
import torch

from kernels import configs, matmul_add, newton_schulz, symmetric

if configs.INTERPRETED or not configs.HAS_TRITON:
    pytest.skip("the interpreter of Triton replaces every kernel", allow_module_level=True)

import ptx
from bench import compiled, compiled_cases, compiled_counts
from bench.compiled_launches import compiled_launches, faults_of, only_tile
from bench.cycles import RTX_4090, Work, tiled_launches
from bench.half_sums import half_summed
from kernels.configs import Tile
from kernels.cross_entropy import launch_softmax_gradient

# For 120 each product's first tile; `python -m bench.compiled` runs all of them.
FIRST_FOR_120 = {group.name: group for group in reversed(compiled_cases.groups(120, quick=True))}.values()
QUICK = [(89, group) for group in compiled_cases.groups(89, quick=True)] + [(120, group) for group in FIRST_FOR_120]


@pytest.mark.parametrize(("capability", "group"), QUICK, ids=lambda value: getattr(value, "name", value))
def test_a_kernel_compiled_is_right_and_touches_only_its_own(capability, group):
    outcome = compiled_cases.run_group(group, capability, quick=True)
    assert outcome.wrong == []
    assert outcome.launches > 0


def test_every_tile_and_every_kernel_is_checked():
    for capability in compiled.CAPABILITIES:
        row = configs.row(divmod(capability, 10))
        checked = {group.tile for group in compiled_cases.groups(capability, quick=True)}
        assert {tile for tile in row if isinstance(tile, Tile)} <= checked
    names = {group.name for group in compiled_cases.groups(89, quick=False)}
    assert names == {*compiled_cases.PRODUCTS, *compiled_cases.OTHERS}


def product_with(rewrite=None):
    """(result, exact, faults) of two Gram matrices whose PTX is rewritten first. Each has three tiles, three steps of K
    and an edge, so that masks, barriers, waits and strides all matter."""
    X = torch.randn(2, 96, 144, generator=torch.Generator().manual_seed(0)).half()
    with compiled_launches(89, rewrite=rewrite) as launches:
        try:
            found = symmetric.launch_symmetric_matmul(X, X.mT, None, 1.0, 0.0)
        except ptx.PtxError as error:
            return None, None, [str(error)]
    return found, X.double() @ X.double().mT, faults_of(launches)


def noticed(rewrite):
    """Whether a changed kernel is reported, or gives a wrong result."""
    found, exact, faults = product_with(rewrite)
    return bool(faults) or not (found.double() - exact).abs().max() < 0.2


def compiled_text():
    texts = []
    product_with(lambda text: texts.append(text) or text)
    return texts[0]


MUTANTS = {
    "a barrier": (r"\tbar\.sync \t0;\n", "", 0.7),
    "a wait for copies": (r"\tcp\.async\.wait_group .*\n", "", 0.7),
    "a commit of copies": (r"\tcp\.async\.commit_group.*\n", "", 0.5),
    "the mask of a store": (r"@%p\d+ (?=st\.global)", "", 0.9),
    "the mask of a copy": (
        r"(?<=0x10), %r\d+(?=;)",
        "",
        0.5,
    ),  # the others: rows that all tiles have, K where B is zero
    "a stride or a size": (
        r"ld\.param\.b32 \t(%r\d+), \[symmetric_matmul_kernel_param_(?:5|6|\d\d)\];",
        r"mov.b32 \1, 3;",
        0.9,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_kernel_without(name):
    """Matches of the pattern are replaced in turn; at least this share must be noticed. The others may change nothing,
    such as a barrier between two buffers."""
    pattern, replacement, share = MUTANTS[name]
    text = compiled_text()
    matches = list(re.finditer(pattern, text))
    matches = matches[:: -(-len(matches) // 12)]  # 128 stores have a mask
    assert len(matches) > 1
    changed = [text[: m.start()] + m.expand(replacement) + text[m.end() :] for m in matches]
    found = [noticed(lambda _, mutant=mutant: mutant) for mutant in changed]
    assert sum(found) >= share * len(found), f"{sum(found)} of {len(found)}"


def test_a_short_row_of_the_softmax_pass_is_held_by_one_warp_and_a_long_one_by_sixteen():
    with compiled_launches(89) as launches:
        for V, warps in ((2, 1), (256, 1), (512, 2), (1000, 4), (5000, 16)):
            launch_softmax_gradient(torch.zeros(1, V), torch.zeros(1, dtype=torch.int64))
            assert launches[-1].constants["num_warps"] == warps
    assert faults_of(launches) == []


def test_fp16_sums_of_compiled_code_equal_the_simulation_to_the_bit():
    """Integers, so that fp32 is exact; their sums of 32 products pass 2,048, where fp16 rounds them."""
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randint(-40, 41, shape, generator=generator).half() for shape in ((1, 128, 96), (1, 96, 128)))
    with compiled_launches(89) as launches, only_tile(89, configs.T128_TWO):
        found = matmul_add.launch_matmul_add(A, B, torch.zeros(1, 128, 128).half(), 0.0)
    assert faults_of(launches) == []
    assert torch.equal(found, half_summed(A, B, 32).half())
    assert not torch.equal(found, (A.float() @ B.float()).half())


@pytest.mark.parametrize(
    ("capability", "summed"), [(86, [10, 17]), (89, [10, 17]), (120, [10, 17]), (80, []), (90, [])]
)
def test_the_full_products_sum_in_fp16_on_geforce_cards_alone(capability, summed):
    """Of the 18 launches of the Gram form, the last of each segment; up to 512 long."""
    works = [launch.work for launch in tiled_launches((1, 512, 2048), "gram", capability)]
    assert [n for n, work in enumerate(works) if work.half_summed_flops] == summed
    assert all(work.half_summed_flops in (0, work.flops) for work in works)
    assert not any(launch.work.half_summed_flops for launch in tiled_launches((1, 1024, 2048), "gram", capability))


@pytest.mark.parametrize(("shape", "method", "steps"), [((1, 128, 256), "gram", 5), ((1, 256, 256), "standard", 1)])
def test_work_counted_by_tiles_equals_what_the_compiled_code_executes(shape, method, steps, monkeypatch):
    """FLOPs, sectors read and sectors stored; at 256 a tile on the diagonal is three squares of half its side."""
    monkeypatch.setattr(configs, "SMALL_SIDE", 256)
    X = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half() / 16
    with compiled_launches(89, check=False) as launches:
        newton_schulz.iterate(X, newton_schulz.coefficient_schedule("polar_express", steps), method)
    predicted = tiled_launches(shape, method)[: len(launches)]
    assert len(predicted) == (18 if method == "gram" else 3)
    assert any(launch.constants.get("SPLIT") for launch in launches) == (shape[1] == 256)
    for launch, (kernel, work) in zip(launches, predicted, strict=True):
        executed = compiled_counts.work_of(launch)
        assert (launch.kernel, executed.flops, executed.l2_bytes) == (kernel, work.flops, work.l2_bytes)


def test_the_busiest_part_of_a_launch_is_its_time():
    work = Work(flops=512 * 128 * 1000.0, l2_bytes=2048 * 800.0, instructions=4 * 128 * 300.0)
    assert RTX_4090.cycles(work) == {"tensor": 1000, "L2": 800, "issue": 300}
    assert RTX_4090.seconds(work) == 1000 / 2.52e9
    halved = Work(flops=512 * 128 * 1000.0, half_summed_flops=512 * 128 * 400.0)
    assert RTX_4090.cycles(halved) == {"tensor": 800}
    assert RTX_4090.flops * RTX_4090.sms * RTX_4090.clock_hz == pytest.approx(165.2e12, rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--capability", "90"), "choose from 80, 86, 89, 120"),
        (("--tile", "64", "64", "64", "4", "3"), "goes with --count"),
        (("--count", "--capability", "80", "89"), "takes one --capability"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, words, run_main):
    code, _, said = run_main(compiled.main, *flags)
    assert code == 2
    assert words in said


def test_a_wrong_kernel_is_named_and_the_exit_code_is_1(run_main, monkeypatch):
    group = compiled_cases.Group("softmax_gradient")
    outcomes = [compiled_cases.Outcome(group, 89, checks=3, launches=2, wrong=["losses 3x7: 2 of 3 elements wrong"])]
    monkeypatch.setattr(compiled, "run_all", lambda capabilities, quick: outcomes)
    code, said, _ = run_main(compiled.main)
    assert code == 1
    assert "WRONG sm_89 softmax_gradient as chosen: losses 3x7: 2 of 3 elements wrong" in said
    assert said.splitlines()[-1] == "3 checks, 2 launches, 1 wrong"
