"""The plan of a step: against the compiled program, and its messages about mistakes."""

from __future__ import annotations

import dataclasses
import json
import sys

import jax
import pytest
import test_flops
import training_cases

from wings_jax import config as config_lib
from wings_jax import plan
from wings_jax.errors import UserError
from wings_jax.model.flops import PartFlops
from wings_jax.planning import compiled, hlo, memory, report, roofline, targets
from wings_jax.training import chips


@pytest.fixture(autouse=True, scope="module")
def initialized_devices() -> None:
    """Uses JAX first: a plan would fix the number of devices for all later tests of the process."""
    assert len(jax.devices()) == 8


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


def make_config(stage: str = "stage2", **changes) -> config_lib.Config:
    sizes = {"data__sequence_length": test_flops.SLOTS, "data__images_per_row": 1}
    tree = training_cases.tree_of(stage, **{**sizes, "batch_size": 4, **changes})
    return config_lib.from_config_dict(tree)


LORA = test_flops.arch((), lora_rank=4, lora_targets=("q", "v"))
# Config, model, rematerialization, images in a row.
COMPILED = {
    "stage 2": ("stage2", test_flops.arch(("visual", "textual")), "full", 1),
    "text only": ("stage2", test_flops.arch(("visual", "textual")), "none", 0),
    "stage 1": ("stage1", test_flops.arch(("visual",)), "none", 1),
    "lora": ("lora", LORA, "full", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED)
def test_plan_agrees_with_the_compiled_program(case):
    """Arguments and operations within 5 %, sharded over two devices.

    In float32: XLA counts a conversion to bfloat16 as an operation.
    """
    stage, arch, remat, images = COMPILED[case]
    changes = {"attention": "einsum", "remat": remat, "loss_chunk": 80, "mesh__fsdp": 2}
    changes |= {"compute_dtype": "float32", "frozen_dtype": "float32"}
    target = targets.open_devices(2, "h100", 0)
    config = make_config(stage, data__images_per_row=images, **changes)
    planned = report.make_plan(
        compiled.resolve_config(config, target),
        arch,
        target,
        is_compiled=True,
        find_fit=False,
        report=lambda line: None,
    )

    state, step = planned.state, planned.step
    arguments = state.trained + state.frozen + state.optimizer + state.batch
    assert arguments == pytest.approx(step.arguments, rel=0.05)
    assert state.gradients < step.temporaries
    counted, ours = planned.xla_flops
    assert ours == pytest.approx(counted, rel=0.05)
    assert {traffic.kind for traffic in step.collectives} >= {"all-gather"}
    if case != "stage 2":
        return

    # All of it is in the text and in the JSON.
    text = report.format_plan(planned)
    for part in ("2 x H100-80", "textual", "all-gather", "MFU", "fits: ", "XLA counts"):
        assert part in text
    content = json.loads(json.dumps(report.to_json(planned)))
    assert content["step"]["arguments"] == step.arguments
    assert content["times"]["mfu"] == planned.times.mfu


def test_dtypes_and_kernel_follow_the_target():
    here, gpu = targets.open_devices(1, "", 0), targets.open_devices(1, "h100", 0)
    tpu = dataclasses.replace(gpu, compiler="TPU")
    assert compiled.resolve_config(make_config(), here).compute_dtype == "float32"
    assert compiled.resolve_config(make_config(), gpu).frozen_dtype == "bfloat16"
    assert compiled.resolve_config(make_config(), gpu).attention == "auto"
    assert compiled.resolve_config(make_config(), tpu).attention == "splash"
    chosen = make_config(attention="chunked", compute_dtype="float32")
    assert compiled.resolve_config(chosen, tpu) == dataclasses.replace(
        chosen, frozen_dtype="bfloat16"
    )


def fake_step(rows: int, temporaries: int) -> compiled.CompiledStep:
    return compiled.CompiledStep(rows, 1000, 0, temporaries, 0, 0.0, 0.0, [], [])


def test_largest_batch_is_compiled_and_lowered_until_it_fits():
    """Above 10 rows the program needs more than the line of the first two."""
    asked = []

    def compile_rows(rows: int) -> compiled.CompiledStep:
        asked.append(rows)
        return fake_step(rows, 100 * rows // 2 + (130 if rows > 10 else 0))

    fit = memory.largest_batch(compile_rows, 2, 1900 / memory.USABLE)
    assert asked[:2] == [2, 4]
    assert fit.rows == asked[-1] == 14
    assert fit.verified <= 1900 < fit.next_needed + 2 * 130
    assert memory.largest_batch(compile_rows, 2, 900) is None
    assert memory.largest_batch(compile_rows, 2, 1120 / memory.USABLE).rows == 2


def test_times_are_those_of_the_roofline():
    chip = chips.Chip("x", flops=1e12, bandwidth=1e9, memory=1.0, link=1e8)
    parts = {"head and loss": PartFlops(1e12, 2e12, 1e12)}
    sent = [hlo.Traffic("all-gather", 1, 1e8)]
    times = roofline.estimate_times(chip, parts, sent, devices=2, memory_traffic=5e8)
    assert (times.compute, times.memory, times.links) == (2.0, 0.5, 1.0)
    assert (times.overlapped, times.serial) == (2.0, 3.5)
    assert (times.mfu, times.mfu_serial) == (0.75, pytest.approx(1.5 / 3.5))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v9:2x2"], "--topology: 'v9:2x2' is not GENERATION:SHAPE"),
        (["--topology=v6e-3"], "--topology: 'v6e-3': there are slices of 1, 4, 8"),
        (["--topology=v6e-8", "--hbm=3"], "--topology: has its own devices"),
        (["--devices=0"], "--devices: 0 is less than 1"),
        (["--devices=x"], "argument --devices: invalid int value: 'x'"),
        (["--chip=b200"], "--chip: 'b200' is not one of a100-40"),
        (["--hbm=-1"], "--hbm: -1 is less than 0"),
        (["--fit"], "--fit: into how much"),
        (["--fit", "--no-compile", "--hbm=1"], "--fit: compiles"),
        (["--workdir=x"], "--workdir and --distributed"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_mistakes_are_named(flags, message, monkeypatch):
    arguments = ["plan", "--config=configs/stage2.py", *flags]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(UserError) as raised:
        plan.main()
    assert message in str(raised.value)


def test_missing_libtpu_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs libtpu.*pip install 'jax\[tpu\]==") as raised:
        targets.open_topology("v5p:2x2x2")
    assert "\n" not in str(raised.value)


def test_a_program_that_is_too_large_for_a_tpu_is_a_result():
    error = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 31.50G of 15.75G hbm. Exceeded hbm capacity by 15.75G."
    )
    target = dataclasses.replace(targets.open_devices(1, "v5e", 0), name="v5e-1")
    step = compiled._too_large(error, target, 8, 2**30)
    assert step.needed == int(31.5 * 2**30)
    assert step.problem == "the program needs 31.50G of 15.75G"
    with pytest.raises(UserError, match="v5e-1: the step does not compile: INTERNAL"):
        compiled._too_large("INTERNAL: x", target, 8, 0)
