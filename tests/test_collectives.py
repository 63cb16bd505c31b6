"""Collectives and large arrays of a program's text; collectives of a sharded step."""

from __future__ import annotations

import math

import jax
import pytest
import test_flops
import training_cases

from wings_jax import config as config_lib
from wings_jax.planning import compiled, estimate, hlo, targets

PROGRAM = """\
HloModule jit_step, entry_computation_layout={()->f32[]}

%body (p: (s32[], f32[64,32])) -> (s32[], f32[64,32]) {
  %p = (s32[], f32[64,32]{1,0}) parameter(0)
  %x = f32[64,32]{1,0} get-tuple-element(%p), index=1
  %gathered = f32[64,256]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={1}
  %sent = (f32[8,32]{1,0}, f32[8,32]{1,0}, u32[], u32[]) collective-permute-start(%y), source_target_pairs={{0,1}}
  ROOT %out = (s32[], f32[64,32]{1,0}) tuple(%i, %x)
}

%condition (p.1: (s32[], f32[64,32])) -> pred[] {
  %p.1 = (s32[], f32[64,32]{1,0}) parameter(0)
  %limit = s32[] constant(12)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main () -> f32[] {
  %large = bf16[512,1024]{1,0} fusion(%a), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/head"}
  %loop = (s32[], f32[64,32]{1,0}) while(%start), condition=%condition, body=%body
  %loop.1 = (s32[], f32[64,32]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %sum = f32[100]{0} all-reduce(%g), replica_groups=[4,2]<=[8], to_apply=%add
  %part = f32[50]{0} reduce-scatter(%g), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, to_apply=%add
}
"""  # noqa: E501


def test_collectives_count_as_often_as_their_loops_run():
    found = {traffic.kind: traffic for traffic in hlo.list_collectives(PROGRAM, devices=8)}
    gathered = 64 * 256 * 4 * 7 / 8
    assert found["all-gather"] == hlo.Traffic("all-gather", 15, 15 * gathered)
    assert found["collective-permute"].bytes == 15 * 8 * 32 * 4
    assert found["all-reduce"] == hlo.Traffic("all-reduce", 1, 2 * 400 / 2)
    assert found["reduce-scatter"] == hlo.Traffic("reduce-scatter", 1, 200.0)


UNROLLED = """\
%body (p: (f32[4,8], u32[])) -> (f32[4,8], u32[]) {
  %two = u32[]{:T(128)} constant(2), metadata={op_name="step"}
  %p = (f32[4,8]{1,0}, u32[]) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=0
  %counter = u32[]{:T(128)} get-tuple-element(%p), index=1
  %there = f32[4,8]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  %back = f32[4,8]{1,0} collective-permute(%there), source_target_pairs={{0,1},{1,0}}
  %next = u32[]{:T(128)} add(%counter, %two), backend_config={}
  ROOT %out = (f32[4,8]{1,0}, u32[]) tuple(%back, %next)
}

%condition (p.1: (f32[4,8], u32[])) -> pred[] {
  %p.1 = (f32[4,8]{1,0}, u32[]) parameter(0)
  %limit = u32[] constant(7)
  %counter.1 = u32[] get-tuple-element(%p.1), index=1
  ROOT %less = pred[] compare(%counter.1, %limit), direction=LT
}

ENTRY %main () -> f32[4,8] {
  %loop = (f32[4,8]{1,0}, u32[]) while(%start), condition=%condition, body=%body
  ROOT %result = f32[4,8]{1,0} get-tuple-element(%loop), index=0
}
"""


def test_unrolled_loops_run_as_often_as_their_counter_steps():
    """The TPU's loops over shards of a product count in steps of 2: here 0, 2, 4, 6."""
    (traffic,) = hlo.list_collectives(UNROLLED, devices=2)
    assert traffic == hlo.Traffic("collective-permute", 8, 8 * 4 * 8 * 4)


PIECES = """\
%first (p: f32[4]) -> f32[32] {
  %begun = f32[32]{0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
}

%middle (p.1: f32[4]) -> f32[32] {
  %continued = f32[32]{0} all-gather(%p.1), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  %other = f32[32]{0} all-gather(%p.1), channel_id=8, replica_groups=[1,8]<=[8], dimensions={0}
}

%body (p.2: f32[4]) -> f32[4] {
  ROOT %computed = f32[4]{0} fusion(%p.2), kind=kOutput, calls=%middle
}

ENTRY %main () -> f32[4] {
  %start = f32[4]{0} fusion(%a), kind=kCustom, calls=%first
  %loop = f32[4]{0} while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""  # noqa: E501


def test_a_collective_in_pieces_counts_once():
    """The TPU's compiler writes one that runs beside a loop as a piece in each of its fusions."""
    (traffic,) = hlo.list_collectives(PIECES, devices=8)
    assert traffic == hlo.Traffic("all-gather", 1 + 3, 4 * 32 * 4 * 7 / 8)


def test_large_arrays_are_sorted_and_named():
    largest = hlo.list_large_arrays(PROGRAM, count=2)
    assert largest[0] == hlo.LargeArray("bf16[512,1024]", 2**20, "jit(step)/head")
    assert largest[1].shape == "f32[64,256]"


def test_large_arrays_of_branches_are_found():
    program = """\
%first (p: f32[8]) -> f32[4,8] {
  ROOT %small = f32[4,8]{1,0} broadcast(%p), dimensions={1}
}

%second (p.1: f32[8]) -> f32[4,8] {
  %wide = f32[400,800]{1,0} broadcast(%p.1), metadata={op_name="jit(step)/skip"}
  ROOT %cut = f32[4,8]{1,0} slice(%wide), slice={[0:4], [0:8]}
}

ENTRY %main () -> f32[4,8] {
  ROOT %chosen = f32[4,8]{1,0} conditional(%index, %a, %b), branch_computations={%first, %second}
}
"""
    (largest,) = hlo.list_large_arrays(program, count=1)
    assert largest == hlo.LargeArray("f32[400,800]", 4 * 400 * 800, "jit(step)/skip")


LAYERS = "decoder/layers/"
CHUNKS = 2  # of the loss


SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in (("none", 1), ("full", 2))]


@pytest.fixture(scope="module", params=[("full", 1), *SLOW])
def sharded_step(request):
    """Returns config, model, state, mesh and collectives of a text-only step on 8 devices."""
    remat, accumulation = request.param
    assert len(jax.devices()) == 8
    tree = training_cases.tree_of(
        "stage2",
        data__sequence_length=test_flops.SLOTS,
        data__images_per_row=0,
        batch_size=8 * accumulation,
        loss_chunk=test_flops.SLOTS // CHUNKS,
        optimizer__accumulation=accumulation,
        **{"attention": "einsum", "remat": remat, "mesh__fsdp": 8},
    )
    target = targets.open_devices(8, "", 0)
    config = compiled.resolve_config(config_lib.from_config_dict(tree), target)
    arch = test_flops.arch(("visual", "textual"))
    state, mesh, _ = compiled.abstract_step(config, arch, target)
    step = compiled.compile_step(config, arch, target)
    found = {traffic.kind: traffic for traffic in step.collectives}
    return config, arch, state, mesh, found


def test_a_sharded_step_sends_its_weights_and_gradients(sharded_step):
    """Counted by hand, within 5 %; float32.

    Of a layer, what is sharded over `fsdp` is gathered once for the forward and once for the
    backward pass, which computes the layer again from the same weights. The head is gathered once.
    Gradients are summed over all devices: the CPU's compiler has no reduce-scatter.
    """
    config, _, state, _, found = sharded_step
    times = config.optimizer.accumulation
    layers = {path: leaf for path, leaf in state.trained.items() if path.startswith(LAYERS)}
    sharded = sum(leaf.size for leaf in layers.values() if "fsdp" in leaf.sharding.spec)
    head = math.prod(state.trained["decoder/head/kernel"].shape)

    gathered = 4 * (2 * sharded + head) * 7 / 8
    assert found["all-gather"].bytes == pytest.approx(times * gathered, rel=0.05)
    summed = 2 * 4 * (sum(leaf.size for leaf in layers.values()) + CHUNKS * head) * 7 / 8
    assert found["all-reduce"].bytes == pytest.approx(times * summed, rel=0.05)


def test_the_estimate_gathers_as_much_as_the_step(sharded_step):
    config, arch, state, mesh, found = sharded_step
    estimated = {
        traffic.kind: traffic.bytes
        for traffic in estimate.estimate_collectives(config, arch, state, mesh.shape)
    }
    assert found["all-gather"].bytes == pytest.approx(estimated["all-gather"], rel=0.05)
