"""A checkpoint's attention on a list of samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from wings_jax import checkpoint
from wings_jax.analysis import laws, probes, results
from wings_jax.data import examples, samples
from wings_jax.errors import UserError
from wings_jax.inference.generator import missing_parts
from wings_jax.model import parameters
from wings_jax.model.wings import Wings


@dataclasses.dataclass(frozen=True)
class MeasurementSettings:
    """How one checkpoint is measured.

    variant     how attention is averaged
    max_slots   slots of a probe; longer samples are skipped
    batch_size  probes at once, rounded up to what the mesh divides
    dtype       of the matmuls, by default that of the model's config
    mesh        devices that share the model, which must be loaded on it; None for one device
    """

    variant: probes.Variant = dataclasses.field(default_factory=probes.Variant)
    max_slots: int = 2048
    batch_size: int = 8
    dtype: str | None = None
    mesh: Mesh | None = None


def measure_checkpoint(
    model: checkpoint.Checkpoint,
    sample_list: Sequence[samples.Sample | samples.BadSample],
    settings: MeasurementSettings | None = None,
    *,
    name: str = "model",
    origin: str | None = None,
    step: int | None = None,
    source: str = "samples",
) -> results.ShiftResult:
    """Returns the attention of a model on samples.

    Args:
      model: a loaded checkpoint.
      sample_list: conversations with text before and after an image; others are skipped.
      settings: the default ones if None.
      name: of the model, in tables, plots and messages.
      origin: where the model comes from, by default its directory.
      step: optimizer steps of its stage, if known.
      source: name of the samples, in messages.

    Raises:
      UserError: the model has too few layers, or no sample can be measured.
    """
    settings = settings or MeasurementSettings()
    arch = model.arch
    laws.check_layers(arch.decoder.num_layers, f"--checkpoint {name}")
    missing = missing_parts(arch, model.params)
    if missing:
        raise UserError(
            f"--checkpoint {name}: the model has no {' and no '.join(missing)}; "
            "attention shift is measured on images"
        )

    # Samples become probes, which depend on the model's tokenizer and image size.
    recipe = probes.make_recipe(model.config, arch, model.tokenizer, settings.max_slots)
    probe_list, tally = probes.read_probes(sample_list, recipe, settings.variant)
    probes.check_any(len(probe_list), tally, source)

    measurement = _measure(model, probe_list, recipe, settings)
    result = results.ShiftResult(
        name=name,
        origin=origin or str(model.directory),
        step=step,
        variant=settings.variant,
        learners=arch.learners,
        ids=[probe.example.id for probe in probe_list],
        measurement=measurement,
        tally=tally,
    )

    # Probes whose curves are flat have no shift; at least one must have one.
    probes.check_any(int(result.used.sum()), result.skipped, source)
    return result


def _measure(
    model: checkpoint.Checkpoint,
    probe_list: Sequence[probes.Probe],
    recipe: examples.Recipe,
    settings: MeasurementSettings,
) -> laws.Measurement:
    """Returns the measurement of all probes, on the mesh of the settings if there is one."""
    dtype = settings.dtype or model.config.compute_dtype or parameters.default_dtype()
    wings = Wings(model.arch, jnp.dtype(dtype))
    batch_size = min(settings.batch_size, len(probe_list))

    if settings.mesh is None:
        batches = probes.batch_probes(probe_list, recipe, batch_size)
        return laws.measure_batches(wings, model.params, batches)

    # Rows beyond the probes are padding.
    batch_size = probes.sharded_batch_size(batch_size, settings.mesh)
    sharded = (
        (numbers, probes.shard_rows(rows, settings.mesh))
        for numbers, rows in probes.batch_probes(probe_list, recipe, batch_size)
    )
    with jax.set_mesh(settings.mesh):
        return laws.measure_batches(wings, model.params, sharded)
