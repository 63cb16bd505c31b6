"""A checkpoint's attention on a list of samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from wings_jax import checkpoint
from wings_jax.analysis import laws, probes, results
from wings_jax.data import samples
from wings_jax.errors import UserError
from wings_jax.inference.generator import missing_parts
from wings_jax.model import parameters
from wings_jax.model.wings import Wings


@dataclasses.dataclass(frozen=True)
class MeasurementSettings:
    """How one checkpoint is measured.

    variant     how attention is averaged
    max_slots   slots of a probe; longer samples are skipped
    batch_size  probes at once
    """

    variant: probes.Variant = dataclasses.field(default_factory=probes.Variant)
    max_slots: int = 2048
    batch_size: int = 8


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

    compute_dtype = jnp.dtype(model.config.compute_dtype or parameters.default_dtype())
    batch_size = min(settings.batch_size, len(probe_list))
    batches = probes.batch_probes(probe_list, recipe, batch_size)
    result = results.ShiftResult(
        name=name,
        origin=origin or str(model.directory),
        step=step,
        variant=settings.variant,
        learners=arch.learners,
        ids=[probe.example.id for probe in probe_list],
        measurement=laws.measure_batches(Wings(arch, compute_dtype), model.params, batches),
        tally=tally,
    )
    probes.check_any(int(result.used.sum()), result.skipped, source)
    return result
