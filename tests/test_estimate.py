"""Every preset on the usual chips: its mesh divides it, and what fits is as it is documented."""

from __future__ import annotations

import dataclasses
import pathlib
import subprocess
import sys

import pytest

from configs import base
from tools import plan_table
from wings_jax import axes
from wings_jax.model import decoder
from wings_jax.planning import estimate, memory, report, residuals, targets
from wings_jax.training.chips import CHIPS, GIB
from wings_jax.weights import starting

# The usual machines and slices: chip -> numbers of chips.
COUNTS = {"v5p": (8, 16, 64), "v5e": (16, 64), "v6e": (8, 16, 64)}
COUNTS |= {"h100": (8, 16), "a100-80": (4, 8, 16)}
# What does not fit in stage 2 with one row per device, by calculation.
TOO_LARGE = {("vicuna_13b", "v5e", 16)}


def prepare(preset: str, stage: str = "stage2", **changes):
    """Returns config, architecture and abstract state of a preset."""
    config = dataclasses.replace(plan_table.make_config(stage, preset), **changes)
    arch = starting.resolve_arch(config.model)
    return config, arch, estimate.abstract_state(config, arch)


@pytest.mark.parametrize("preset", base.REAL)
def test_preset_divides_and_fits(preset):
    prepared = prepare(preset)
    for chip, counts in COUNTS.items():
        for count in counts:
            step = estimate.estimate_step(*prepared, CHIPS[chip], count)
            assert step.mesh["data"] * step.mesh["fsdp"] == count
            assert bool(step.largest) == ((preset, chip, count) not in TOO_LARGE), (chip, count)
            if step.largest:
                assert step.needed <= CHIPS[chip].memory * memory.USABLE
                assert step.largest % count == 0
                assert step.rows <= max(step.largest, count)


def test_mesh_that_does_not_divide_is_named():
    config, arch, state = prepare("qwen1_5_0_5b")
    mesh = dataclasses.replace(config.mesh, data=1, fsdp=7, tensor=1)
    with pytest.raises(axes.MeshError, match=r"--config.mesh: the LLM: .*D"):
        estimate.estimate_step(dataclasses.replace(config, mesh=mesh), arch, state, CHIPS["v5p"], 7)
    with pytest.raises(axes.MeshError, match="does not fit 8 devices"):
        estimate.estimate_step(dataclasses.replace(config, mesh=mesh), arch, state, CHIPS["v5p"], 8)


def test_estimate_needs_no_devices_and_equals_the_plan_on_them():
    """The same state on 8 devices that exist, and as axes of a mesh only."""
    config, arch, state = prepare("qwen1_5_0_5b")
    target = targets.open_devices(8, "h100", 0)
    planned = report.make_plan(
        config, arch, target, is_compiled=False, find_fit=False, report=lambda line: None
    )
    step = estimate.estimate_step(config, arch, state, CHIPS["h100"], 8)
    assert step.state == planned.state
    assert planned.estimated == (step.needed, step.largest)
    assert "largest batch about" in report.format_plan(planned)
    assert step.times == planned.times
    assert step.times.links > 0


def test_batch_of_the_largest_size_fits_and_one_row_more_does_not():
    config, arch, state = prepare("qwen1_5_7b")
    largest = estimate.estimate_step(config, arch, state, CHIPS["v5e"], 16).largest
    for rows, does_fit in ((largest, True), (largest + 16, False)):
        mesh = estimate.abstract_mesh({"data": 1, "fsdp": 16})
        changed = dataclasses.replace(config, batch_size=rows)
        moved = estimate.on_mesh(state, mesh)
        needed = estimate.count_needed(changed, arch, moved, mesh, is_tpu=True)
        assert (needed <= 16 * GIB * memory.USABLE) == does_fit


@pytest.mark.parametrize(
    ("stage", "is_tpu"), [("stage2", False), ("stage2", True), ("stage1", True)]
)
def test_every_remat_policy_is_estimated_by_what_it_saves(stage, is_tpu):
    """In the order of what they keep; what a frozen projection reads is not kept."""
    config, arch, state = prepare("qwen1_5_0_5b", stage)

    def saved(remat: str, rows: int = 1) -> float:
        changed = dataclasses.replace(config, remat=remat, batch_size=rows)
        mesh = {"data": 1, "fsdp": 1, "tensor": 1}
        return estimate.count_working(changed, arch, state, mesh, rows, is_tpu=is_tpu)

    order = ["full", "save_attn", "dots", "save_dots", "none"]
    assert sorted(order) == sorted(decoder.REMAT)
    counted = [saved(remat) for remat in order]
    assert counted == sorted(counted)
    assert len(set(counted)) == len(counted)
    assert saved("none", 3) - saved("full", 3) == 3 * (counted[-1] - counted[0])


def test_what_save_attn_saves_is_what_the_attentions_return():
    """[T,N,H] and a log-sum per head for three attentions, and the router's two sums per head."""
    config, arch, state = prepare("qwen1_5_7b")
    llm, slots = arch.decoder, config.data.sequence_length
    values = 3 * llm.hidden_size * 2 + 3 * llm.num_heads * 4 + 2 * llm.num_heads * 4
    counted = residuals.saved_bytes(
        arch,
        frozenset(state.trained),
        remat="save_attn",
        slots=slots,
        images=config.data.images_per_row,
        dtype="bfloat16",
        tensor=1,
        is_tpu=False,
    )
    assert counted == pytest.approx(llm.num_layers * slots * values, rel=1e-6)


# Of programs that were compiled for the chips (docs/performance.md): model, stage, chip, devices,
# rows, GiB of arguments and temporaries.
COMPILED = [
    ("qwen1_5_7b", "stage2", "v5p", 8, 8, 18.69),
    ("qwen1_5_7b", "stage2", "v5p", 8, 256, 78.38),
    ("qwen1_5_7b", "stage1", "v5p", 8, 8, 5.23),
    ("qwen1_5_1_8b", "stage2", "v5p", 8, 8, 5.34),
    ("qwen1_5_1_8b", "stage1", "v5p", 8, 8, 2.23),
    ("qwen1_5_7b", "stage2", "v5e", 16, 16, 11.51),
    ("qwen1_5_7b", "stage2", "v6e", 8, 8, 18.64),
    ("qwen1_5_1_8b", "stage2", "v6e", 8, 8, 5.24),
    ("qwen1_5_7b", "stage2", "h100", 8, 8, 19.91),
    ("qwen1_5_7b", "stage2", "h100", 8, 16, 20.78),
    ("qwen1_5_7b", "stage2", "h100", 8, 128, 36.19),
    ("qwen1_5_7b", "stage1", "h100", 8, 8, 4.99),
]


@pytest.mark.parametrize(("preset", "stage", "chip", "count", "rows", "needed"), COMPILED)
def test_estimate_is_near_what_was_compiled(preset, stage, chip, count, rows, needed):
    step = estimate.estimate_step(*prepare(preset, stage, batch_size=rows), CHIPS[chip], count)
    assert step.needed / GIB == pytest.approx(needed, rel=0.05)


@pytest.mark.parametrize(("remat", "needed"), [("save_attn", 22.50), ("save_dots", 30.07)])
def test_estimate_of_a_remat_policy_is_near_what_was_compiled(remat, needed):
    """7B, stage 2, one row per chip of 8 v5p: the compiler's temporaries have gaps (docs)."""
    prepared = prepare("qwen1_5_7b", batch_size=8, remat=remat)
    step = estimate.estimate_step(*prepared, CHIPS["v5p"], 8)
    assert step.needed / GIB == pytest.approx(needed, rel=0.09)


def test_table_of_the_documentation_is_that_of_the_command():
    page = plan_table.PAGE.read_text()
    table = page.split(plan_table.BEGIN)[1].split(plan_table.END)[0]
    assert table == plan_table.make_table(), "python tools/plan_table.py --write"


@pytest.mark.slow
def test_table_command_runs_from_a_clone(tmp_path):
    script = pathlib.Path(plan_table.__file__)
    completed = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert completed.stdout.startswith(plan_table.HEADING)
