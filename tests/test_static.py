"""Every kernel compiled without a GPU: for sm_89 whole, for the others what it lacks or what is tight."""

import dataclasses

import pytest

from bench import static
from kernels import configs
from kernels.configs import Tile

pytestmark = pytest.mark.skipif(configs.INTERPRETED, reason="the interpreter replaces every kernel")


def test_no_variant_for_sm_89_or_beyond_it_spills_or_overflows():
    everywhere = [variant for c in (*static.LIMITS, 89) for variant in static.variants(c)]
    of_its_own = {v for v in everywhere if v.kernel.startswith("small")}  # near the limit of registers everywhere
    alike = {v if v in of_its_own else dataclasses.replace(v, capability=0): v for v in everywhere}
    assert {variant.capability for variant in alike.values()} > {80, 89, 90}
    results = static.compile_all(list(alike.values()))
    assert len(results) > 100
    faults = [f"sm_{r.capability} {r.kernel} {r.config}: {', '.join(r.faults())}" for r in results if r.faults()]
    assert faults == []


def test_a_spill_a_misfit_and_a_missing_instruction_are_faults():
    variant = next(v for v in static.variants(89) if v.kernel == "symmetric_matmul product, two addends")
    crowded = dict(variant.constants) | {"BLOCK_M": 128, "BLOCK_K": 64, "MASKED": True}
    crowded = dataclasses.replace(variant, constants=tuple(crowded.items()), num_warps=2, num_stages=5)
    result = static.compile_variant(crowded)
    assert result.spill_bytes > 0
    assert any("spills" in fault for fault in result.faults())
    assert "does not fit shared memory" in result.faults()
    lame = dataclasses.replace(result, tensor_core_instructions=0, asynchronous_copies=0)
    assert {"no tensor cores", "no asynchronous copies"} <= set(lame.faults())
    assert min(result.tensor_core_instructions, result.asynchronous_copies) > 0
    other = static.compile_variant(next(v for v in static.variants(89) if v.kernel == "momentum"))
    assert (other.tensor_core_instructions, other.asynchronous_copies) == (0, 0)


def test_every_tile_of_the_table_is_covered():
    for pair, row in configs.TABLE.items():
        compiled = {
            (c.get("BLOCK_M"), c.get("BLOCK_N", c.get("BLOCK_M")), c.get("BLOCK_K"), v.num_warps, v.num_stages)
            for v in static.variants(10 * pair[0] + pair[1])
            for c in (dict(v.constants),)
        }
        tiles = {tuple(field) for field in row if isinstance(field, Tile)}
        assert tiles <= compiled


@pytest.mark.parametrize(
    ("capability", "registers", "shared", "warps", "ctas"),
    [(89, 160, 65_536, 8, 1), (89, 100, 32_768, 4, 3), (90, 117, 98_304, 8, 2), (90, 164, 98_304, 8, 1)],
)
def test_occupancy_equals_worked_examples(capability, registers, shared, warps, ctas):
    assert static.ctas_per_sm(capability, registers, shared, warps) == ctas
