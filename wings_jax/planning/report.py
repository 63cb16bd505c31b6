"""The plan of a step: everything put together, as a text and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from wings_jax import config as config_lib
from wings_jax.formatting import text_table
from wings_jax.model import attention, flops
from wings_jax.model.presets import WingsArch
from wings_jax.planning import compiled, estimate, memory, roofline
from wings_jax.planning.targets import Target
from wings_jax.training import program
from wings_jax.training.chips import GIB
from wings_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What a training step needs on a target.

    target       name of the devices
    compiler     "TPU" or "CPU": whose program the compiled numbers are of
    mesh         devices per axis
    kernel       attention kernel of the compiled program
    remat        rematerialization policy
    scan_layers  whether the layers are one loop in the compiled program
    rows         of the batch
    slots        of a row
    groups       parameters
    state        bytes per device that follow from the shardings
    flops        part of the model -> operations of a step, over all devices
    step         the compiler's report; None where nothing was compiled
    xla_flops    operations per device as XLA counts them (loop bodies once): its number and ours;
                 None where a kernel hides them
    times        None where no chip is named
    estimated    bytes of one device and rows of the largest batch (0 where the memory is not
                 known), without a compiler; None where it was compiled
    fit          the largest batch; None where it was not asked for, or not one row fits
    limit        bytes of one device; None where they are not known
    """

    target: str
    compiler: str
    mesh: Mapping[str, int]
    kernel: str
    remat: str
    scan_layers: bool
    rows: int
    slots: int
    groups: list[memory.Group]
    state: memory.StateBytes
    flops: Mapping[str, flops.PartFlops]
    step: compiled.CompiledStep | None
    xla_flops: tuple[float, float] | None
    times: roofline.Times | None
    estimated: tuple[float, int] | None
    fit: memory.Fit | None
    limit: float | None


def make_plan(
    config: config_lib.Config,
    arch: WingsArch,
    target: Target,
    *,
    is_compiled: bool,
    find_fit: bool,
    report: Callable[[str], None],
) -> StepPlan:
    """Returns the plan of a resolved config.

    `report` gets a line before and after each compilation.

    Raises:
      UserError: the config does not fit the devices, or does not compile for them.
    """
    # The state and the batch as shapes with shardings: no array is allocated.
    state, mesh, _ = compiled.abstract_step(config, arch, target)
    batch = program.abstract_batch(config, arch, mesh)
    rows, slots = batch.targets.shape

    # The search for the largest batch may try a batch size again: each is compiled once.
    def compile_rows(count: int) -> compiled.CompiledStep:
        if count not in compiled_steps:
            report(f"compiling {count} rows for {target.name}")
            changed = dataclasses.replace(config, batch_size=count)
            compiled_steps[count] = done = compiled.compile_step(changed, arch, target)
            report(f"  {_gib(done.needed)} GiB per device, compiled in {done.seconds:.0f} s")
        return compiled_steps[count]

    compiled_steps: dict[int, compiled.CompiledStep] = {}
    step = compile_rows(rows) if is_compiled else None
    fit = None
    if find_fit and target.memory:
        # The rows of a batch are divided by these axes and by gradient accumulation.
        devices = mesh.shape["data"] * mesh.shape["fsdp"]
        shares = devices * config.optimizer.accumulation
        is_tpu = target.chip is not None and target.chip.is_tpu
        guess = estimate.largest_batch(config, arch, state, mesh, target.memory, is_tpu=is_tpu)
        fit = memory.largest_batch(
            compile_rows, shares, target.memory, tried=rows // shares, guess=guess // devices
        )

    # Operations of rows without padding.
    work = flops.full_rows(arch, rows, slots, config.data.images_per_row)
    parts = flops.count_flops(arch, work, state.trained, config.remat)
    return StepPlan(
        target=target.name,
        compiler=target.compiler,
        mesh=dict(mesh.shape),
        kernel=attention_kernel(config),
        remat=config.remat,
        scan_layers=config.scan_layers,
        rows=rows,
        slots=slots,
        groups=memory.count_groups(state, config),
        state=memory.count_state(state, batch, config, arch),
        flops=parts,
        step=step,
        xla_flops=compare_with_xla(config, arch, step, state.trained, mesh.size) if step else None,
        times=estimate_times(config, arch, target, parts, step, state, mesh.shape, rows),
        estimated=None if step else estimate_memory(config, arch, state, mesh, target),
        fit=fit,
        limit=target.memory,
    )


def estimate_memory(
    config: config_lib.Config, arch: WingsArch, state: TrainState, mesh: Mesh, target: Target
) -> tuple[float, int]:
    """Returns estimated bytes of a device, and the rows of the largest batch (0: not known)."""
    is_tpu = target.chip is not None and target.chip.is_tpu
    needed = estimate.count_needed(config, arch, state, mesh, is_tpu=is_tpu)
    if not target.memory:
        return needed, 0
    rows = estimate.largest_batch(config, arch, state, mesh, target.memory, is_tpu=is_tpu)
    return needed, rows


def attention_kernel(config: config_lib.Config) -> str:
    """Returns the kernel that the main attention of a resolved config runs."""
    slots = config.data.sequence_length
    if config.attention != "auto":
        return config.attention
    return attention.choose_kernel("auto", slots, slots, is_cache=False)


def estimate_times(
    config: config_lib.Config,
    arch: WingsArch,
    target: Target,
    parts: Mapping[str, flops.PartFlops],
    step: compiled.CompiledStep | None,
    state: TrainState,
    mesh: Mapping[str, int],
    rows: int,
) -> roofline.Times | None:
    """Returns the roofline's times, or None without a chip."""
    if target.chip is None:
        return None

    return roofline.estimate_times(
        target.chip,
        parts,
        step.collectives if step else estimate.estimate_collectives(config, arch, state, mesh),
        devices=len(target.devices),
        memory_traffic=roofline.step_memory_traffic(config, arch, state.trained, mesh, rows),
    )


def compare_with_xla(
    config: config_lib.Config,
    arch: WingsArch,
    step: compiled.CompiledStep,
    trained: Mapping[str, Any],
    devices: int,
) -> tuple[float, float] | None:
    """Returns operations per device with the body of each loop once: XLA's count, and ours.

    The loops are those over layers, over the tower's layers, and over chunks of the loss. XLA does
    not count what a pallas or library kernel computes, and a loop over blocks of the attention has
    a body of a size of its own: with such kernels there is nothing to compare.
    """
    if step.problem or attention_kernel(config) != "einsum" or config.optimizer.accumulation > 1:
        return None

    # One layer each, as XLA counts the body of a loop over layers once.
    decoder = dataclasses.replace(arch.decoder, num_layers=1)
    tower = dataclasses.replace(arch.vision, num_layers=1, feature_layer=-1)
    one_layer = dataclasses.replace(arch, decoder=decoder, vision=tower)

    slots, images = config.data.sequence_length, config.data.images_per_row
    work = flops.padded_workload(one_layer, step.rows, slots, images)
    parts = flops.count_flops(one_layer, work, trained, config.remat)
    total = sum(part.executed for part in parts.values())

    # The loss is a loop over chunks of slots, of which XLA counts one.
    chunks = -(-slots // min(config.loss_chunk, slots))
    total -= parts["head and loss"].executed * (1 - 1 / chunks)
    return step.flops, total / devices


def to_json(plan: StepPlan) -> dict[str, Any]:
    """Returns the plan as JSON can hold it; sizes in bytes, times in seconds."""
    return dataclasses.asdict(plan)


def format_plan(plan: StepPlan) -> str:
    """Returns the plan as text."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    title = (
        f"{plan.target}, mesh {mesh}; {plan.rows} rows of {plan.slots} slots; attention "
        f"{plan.kernel}, remat {plan.remat}"
    )
    blocks = [title, _groups_table(plan), _memory_table(plan), _flops_table(plan)]
    # Only a program that is compiled for several devices has collectives.
    blocks += [_collectives_table(plan)] if plan.step and plan.step.collectives else []

    return "\n\n".join([*blocks, *_conclusions(plan)])


def _gib(size: float) -> str:
    return f"{size / GIB:,.3f}"


def _groups_table(plan: StepPlan) -> str:
    cells = [("group", "parameters", "", "GiB per device")]
    cells += [
        (g.name, f"{g.parameters:,}", "trained" if g.is_trained else "frozen", _gib(g.bytes))
        for g in plan.groups
    ]
    return text_table(cells)


def _memory_table(plan: StepPlan) -> str:
    state, step = plan.state, plan.step
    cells = [
        ("memory of one device", "GiB"),
        ("trained parameters", _gib(state.trained)),
        ("frozen parameters", _gib(state.frozen)),
        ("optimizer", _gib(state.optimizer)),
        ("batch", _gib(state.batch)),
        ("gradients", _gib(state.gradients)),
        ("between the layers", _gib(state.boundaries)),
    ]

    # What the compiler adds to the sizes that follow from shapes.
    if step:
        # The compiler's temporaries include the gradients and what is stored between the layers.
        other = step.temporaries - state.gradients - state.boundaries
        cells += [
            ("other temporaries (compiled)", _gib(max(other, 0))),
            ("arguments (compiled)", _gib(step.arguments)),
            ("temporaries (compiled)", _gib(step.temporaries)),
            ("arguments and temporaries (compiled)", _gib(step.needed)),
        ]
        cells += [("peak (compiled)", _gib(step.peak))] if plan.compiler == "TPU" else []
        cells += [(f"  largest: {a.shape} {a.source[-60:]}", _gib(a.bytes)) for a in step.largest]
    return text_table(cells)


def _flops_table(plan: StepPlan) -> str:
    cells: list[tuple[str, ...]] = [("TFLOP per step", "forward", "backward", "recomputed")]
    # Parts that the model does not have are left out.
    rows = {name: part for name, part in plan.flops.items() if part.executed}
    total = flops.PartFlops(
        sum(part.forward for part in rows.values()),
        sum(part.backward for part in rows.values()),
        sum(part.recomputed for part in rows.values()),
    )

    for name, part in [*rows.items(), ("all", total)]:
        values = (part.forward, part.backward, part.recomputed)
        cells.append((name, *(f"{value / 1e12:,.3f}" for value in values)))
    return text_table(cells)


def _collectives_table(plan: StepPlan) -> str:
    cells = [("collectives of a step", "count", "GiB sent per device")]
    steps = plan.step.collectives if plan.step else []
    # `bytes` counts what one device sends, over all runs of a collective.
    cells += [(t.kind, f"{t.count:,}", _gib(t.bytes)) for t in steps]
    return text_table(cells)


def _conclusions(plan: StepPlan) -> list[str]:
    """Returns lines: XLA's count, time and MFU, and whether and how much fits."""
    lines = []

    # XLA's count of operations against that of `model.flops`.
    if plan.xla_flops:
        counted, ours = plan.xla_flops
        lines.append(
            f"XLA counts {counted:.4g} operations per device with loop bodies once, we "
            f"{ours:.4g} ({ours / counted - 1:+.1%}; XLA counts norms, softmax and the optimizer "
            "too, which matter at small widths)"
        )

    # Bounds of the step time, from the roofline.
    if plan.times:
        t = plan.times
        links = "" if plan.step else " (estimate)"
        lines.append(
            f"step at least {t.overlapped:.3g} s if everything overlaps (MFU {t.mfu:.0%}), "
            f"{t.serial:.3g} s if nothing does ({t.mfu_serial:.0%}): compute {t.compute:.3g} s, "
            f"memory {t.memory:.3g} s (estimate), links {t.links:.3g} s{links}"
        )

    # Whether it fits, and how much does.
    if plan.limit and plan.step:
        share = plan.step.needed / plan.limit
        verdict = "fits" if share <= memory.USABLE else "does not fit"
        reason = f" ({plan.step.problem})" if plan.step.problem else ""
        lines.append(f"{verdict}{reason}: {share:.0%} of {_gib(plan.limit)} GiB per device")

    # Without a compiler the temporaries are an estimate.
    if plan.estimated:
        needed, rows = plan.estimated
        limit = f", {needed / plan.limit:.0%} of {_gib(plan.limit)}" if plan.limit else ""
        fit = f"; largest batch about {rows} rows" if rows else ""
        kind = "estimate" if plan.scan_layers else "estimate of a loop; unrolled layers need more"
        lines.append(f"needs about {_gib(needed)} GiB per device ({kind}){limit}{fit}")

    if plan.fit:
        following = plan.fit.next_needed
        larger = "no larger one was compiled"
        if following:
            larger = f"the next larger one needs {_gib(following)}"
        lines.append(
            f"largest batch: {plan.fit.rows} rows, {_gib(plan.fit.needed)} GiB per device; {larger}"
        )

    if plan.compiler == "CPU" and plan.step and plan.limit:
        lines.append(
            "compiled by the CPU's compiler, which stands for a GPU's: arguments are exact, "
            "temporaries are an estimate (bfloat16 is partly computed in float32)"
        )
    return ["\n".join(lines)] if lines else []
