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


@pytest.mark.slow
def test_the_largest_batch_of_a_real_program():
    """The compiler's report on the batch is within the limit, that on the next is not."""
    arch = test_flops.arch(("visual", "textual"))
    config = make_config(mesh__fsdp=2, loss_chunk=80)
    target = targets.open_devices(2, "", 0)
    config = compiled.resolve_config(config, target)

    def compile_rows(rows: int) -> compiled.CompiledStep:
        changed = dataclasses.replace(config, batch_size=rows)
        return compiled.compile_step(changed, arch, target)

    # Between the needs of 5 and 7 rows per device.
    needed = (compile_rows(10).needed + compile_rows(14).needed) / 2
    target = dataclasses.replace(target, memory=needed / memory.USABLE)
    lines = []
    planned = report.make_plan(
        config, arch, target, is_compiled=True, find_fit=True, report=lines.append
    )
    assert planned.fit.rows in (10, 12)
    assert lines[0] == "compiling 4 rows for 2 x device"
    assert compile_rows(planned.fit.rows).needed == planned.fit.needed <= needed
    following = compile_rows(planned.fit.rows + 2)
    assert following.needed == planned.fit.next_needed > needed
    assert f"largest batch: {planned.fit.rows} rows" in report.format_plan(planned)


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


# Temporary bytes of so many rows per device: a line, and where the peak moves to another place.
PROFILES = {
    "line": lambda rows: 100 * rows,
    "step": lambda rows: 100 * rows + (130 if rows > 5 else 0),
    "flat, then steep": lambda rows: max(700 + 10 * rows, 100 * rows),
    "steep, then flat": lambda rows: min(700 * rows, 7000 + 10 * rows),
}


def search(temporaries, limit: float, *, tried: int = 1, guess: int = 1):
    """Returns the largest batch for two shares of the rows, and the batches that were compiled."""
    asked = []

    def compile_rows(rows: int) -> compiled.CompiledStep:
        asked.append(rows)
        return fake_step(rows, temporaries(rows // 2))

    usable = limit / memory.USABLE
    fit = memory.largest_batch(compile_rows, 2, usable, tried=tried, guess=guess)
    return fit, asked


@pytest.mark.parametrize("guess", [1, 8, 90, 10**6])
@pytest.mark.parametrize("tried", [1, 7, 200])
@pytest.mark.parametrize("profile", PROFILES)
def test_largest_batch_fits_and_the_next_does_not(profile, tried, guess):
    """Both are compiled, in few compilations whatever the guess is."""
    temporaries = PROFILES[profile]
    fit, asked = search(temporaries, 9000, tried=tried, guess=guess)
    count = fit.rows // 2
    assert 1000 + temporaries(count) == fit.needed <= 9000
    assert 1000 + temporaries(count + 1) == fit.next_needed > 9000
    assert {fit.rows, fit.rows + 2} <= set(asked)
    assert len(asked) == len(set(asked)) <= 9


def test_largest_batch_of_nothing_of_one_and_of_all():
    line = PROFILES["line"]
    assert search(line, 1050) == (None, [2])
    assert search(line, 1050, tried=9)[0] is None
    assert search(line, 1150)[0].rows == 2
    largest, _ = search(lambda rows: 0, 2000)
    assert (largest.rows, largest.next_needed) == (2 * memory.MAX_ROWS, None)


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
