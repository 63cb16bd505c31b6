"""A compiled training step of a target, from shapes alone: nothing is allocated or run."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

import jax

from wings_jax import config as config_lib
from wings_jax.errors import UserError
from wings_jax.model import attention
from wings_jax.model.kernels import choice
from wings_jax.model.presets import WingsArch
from wings_jax.planning import hlo, sizes
from wings_jax.planning.targets import Target
from wings_jax.training import meshes, program
from wings_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What the compiler reports of a step, per device; all sizes are bytes.

    rows         rows of the batch, over all devices
    arguments    parameters, optimizer state and batch
    aliased      of the results, those that take the place of arguments
    temporaries  what else is alive at the peak
    peak         the most at one time, as the compiler plans it; 0 where it is not reported
    flops        operations, with the body of a loop counted once
    seconds      that the compilation took
    collectives  by kind
    largest      the largest temporaries
    problem      why there is no program although the sizes are known: it does not fit
    """

    rows: int
    arguments: int
    aliased: int
    temporaries: int
    peak: int
    flops: float
    seconds: float
    collectives: list[hlo.Traffic]
    largest: list[hlo.LargeArray]
    problem: str = ""

    @property
    def needed(self) -> int:
        """Bytes that a device needs: arguments and temporaries, and results without an argument."""
        return self.arguments + self.temporaries


def resolve_config(config: config_lib.Config, target: Target) -> config_lib.Config:
    """Returns the config with the dtypes and the attention kernel that the target would choose.

    `auto` is the TPU's kernel for a TPU topology; the CPU's compiler has only the portable ones.
    """
    # Accelerators compute in bfloat16; a target without chip and memory stands for CPU devices.
    dtype = "bfloat16" if target.chip or target.memory else "float32"

    # `auto` depends on the devices of this process, which are the CPU's even for a topology.
    kernel = config.attention
    if kernel == "auto" and target.compiler == "TPU" and "splash" in attention.KERNELS:
        kernel = "splash"
    return dataclasses.replace(
        config,
        compute_dtype=config.compute_dtype or dtype,
        frozen_dtype=config.frozen_dtype or dtype,
        attention=kernel,
    )


def abstract_step(
    config: config_lib.Config, arch: WingsArch, target: Target
) -> tuple[TrainState, jax.sharding.Mesh, Any]:
    """Returns the state as shapes, the mesh, and the optimizer.

    Raises:
      UserError: mesh, groups or batch do not fit.
    """
    mesh = meshes.make_run_mesh(config, arch, target.devices)
    shapes, optimizer = program.abstract_state(config, arch, mesh, max(config.steps, 1))
    return shapes, mesh, optimizer


def compile_step(config: config_lib.Config, arch: WingsArch, target: Target) -> CompiledStep:
    """Returns the compiler's report on the step of a resolved config.

    Raises:
      UserError: the step does not compile. If only its memory is too large, that is the report.
    """
    shapes, mesh, optimizer = abstract_step(config, arch, target)

    # Lowering and compiling take shapes only: no array is allocated.
    started = time.perf_counter()
    with jax.set_mesh(mesh), choice.compiling_for(target.devices[0]):
        batch = program.abstract_batch(config, arch, mesh)
        update = program.jit_update(config, arch, optimizer, shapes)
        try:
            compiled = update.lower(shapes, batch).compile()
        except jax.errors.JaxRuntimeError as error:
            # The TPU's compiler refuses a program that does not fit, and names the size it needs.
            arguments = sizes.tree_bytes((shapes, batch))
            step = _too_large(str(error), target, batch.targets.shape[0], arguments)
            return dataclasses.replace(step, seconds=time.perf_counter() - started)

    memory, text = compiled.memory_analysis(), compiled.as_text() or ""
    if memory is None:
        raise UserError(f"{target.name}: this compiler does not report what memory a program needs")
    return CompiledStep(
        rows=batch.targets.shape[0],
        arguments=memory.argument_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=getattr(memory, "peak_memory_in_bytes", 0),
        flops=(compiled.cost_analysis() or {}).get("flops", 0.0),
        seconds=time.perf_counter() - started,
        collectives=hlo.list_collectives(text, mesh.size),
        largest=hlo.list_large_arrays(text),
    )


def _too_large(error: str, target: Target, rows: int, arguments: int) -> CompiledStep:
    """Returns the sizes that the TPU's compiler names when a program does not fit.

    Raises:
      UserError: the error is another one.
    """
    used = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+[KMGT]) hbm", error)
    if used is None:
        reason = error.strip().splitlines()[0][:300]
        raise UserError(f"--topology: {target.name}: the step does not compile: {reason}")

    # The size in the message includes the arguments, which are known from the shapes.
    scale = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[used[2]]
    temporaries = int(float(used[1]) * scale) - arguments
    problem = f"the program needs {used[1]}{used[2]} of {used[3]}"
    return CompiledStep(rows, arguments, 0, temporaries, 0, 0.0, 0.0, [], [], problem)
