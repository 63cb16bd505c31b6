"""Probes: conversations with images on which attention is measured, and batches of them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from wings_jax import axes
from wings_jax import config as config_lib
from wings_jax.analysis.slot_classes import (
    CLASSES,
    GROUPS,
    ROWS,
    classify,
    count_text,
    group,
    last_prompt_slot,
)
from wings_jax.data import conversation, examples, pipeline, samples, sources
from wings_jax.data import turns as turns_lib
from wings_jax.errors import UserError
from wings_jax.model.layout import Batch
from wings_jax.model.presets import WingsArch
from wings_jax.scenes import dataset, drawings, questions, skills

MIN_TEXT = 8  # text slots on either side of the images, not counting the system turn
SHORTEST_ROW = 64  # slots; longer rows have this length times a power of two

TEXT_ONLY = "text only"
FEW_BEFORE = f"fewer than {MIN_TEXT} text slots before the image"
FEW_AFTER = f"fewer than {MIN_TEXT} text slots after the image"
TOO_LONG = "too long"


@dataclasses.dataclass(frozen=True)
class Variant:
    """How attention is averaged, where the paper leaves it open.

    rows            queries: `all`, or those `after` the last image
    exclude_prefix  number of first slots that form a class of keys beside "before"
    prompt_only     queries end before the last answer
    """

    rows: str = ROWS[0]
    exclude_prefix: int = 0
    prompt_only: bool = False

    def __str__(self) -> str:
        return f"rows: {self.rows}, {self.without_rows}"

    @property
    def without_rows(self) -> str:
        """Returns its text for values that are split by kind or position of the query."""
        prompt = "prompt only" if self.prompt_only else "prompt and answer"
        return f"excluded prefix: {self.exclude_prefix}, {prompt}"


@dataclasses.dataclass(frozen=True)
class Probe:
    """A conversation with an image, in n slots.

    example  its tokens, modality, targets and images
    classes  i32[n], indices of CLASSES
    groups   f32[n,Q], for each of GROUPS the weights of a mean over its queries (0: no query)
    """

    example: examples.Example
    classes: np.ndarray
    groups: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProbeRows:
    """Probes as input of the model, one per row, rows of padding at the end.

    batch    Batch of [B,T]
    classes  f32[B,T,C], one-hot
    groups   f32[B,T,Q]
    """

    batch: Batch
    classes: np.ndarray
    groups: np.ndarray


def embedded_samples(count: int, seed: int = 0) -> list[samples.Sample]:
    """Returns conversations about held-out images of the embedded data set.

    Each has two text-only turns, two questions about one image, and two text-only turns, all with
    answers, so that there is text on both sides of the image.
    """
    rng = random.Random(f"{seed}-laws")
    album = dataset.Album("test", rng)
    skill_names = list(skills.SKILLS)

    probe_samples = []
    for number in range(count):
        file_name, scene = album.add()
        before = dataset.text_turns(rng, skill_names, "test", 2)
        after = dataset.text_turns(rng, skill_names, "test", 2)
        turns = [*before, *questions.ask_turns(rng, [scene], 2), *after]

        # `at` is the turn that the image marker is put into.
        record = dataset.make_record(
            f"probe-{number}", "interleaved", turns, [file_name], at=len(before)
        )
        image = drawings.render(scene, album.glyphs)
        probe_samples.append(samples.Sample(record["id"], (image,), record["conversations"]))

    return probe_samples


def spread_samples(
    source: sources.SampleSource, limit: int
) -> Iterator[samples.Sample | samples.BadSample]:
    """Yields up to `limit` samples, spread evenly over the source; the error of a bad one."""
    count = len(source)
    # Equal distances, whatever the length of the source.
    for index in sorted({i * count // limit for i in range(limit)}):
        try:
            yield source[index]
        except samples.BadSample as reason:
            yield samples.BadSample(reason.cause, f"record {index}: {reason.detail}")


def read_probes(
    sample_list: Iterable[samples.Sample | samples.BadSample],
    recipe: examples.Recipe,
    variant: Variant,
) -> tuple[list[Probe], samples.Tally]:
    """Returns the probes, and a tally of the skipped samples by cause.

    `recipe.length` is the length of the longest conversation; longer ones are skipped, not cut.
    """
    probes, tally = [], samples.Tally()
    for number, sample in enumerate(sample_list):
        # A sample that its source could not read is counted as one that is not usable.
        try:
            if isinstance(sample, samples.BadSample):
                raise sample
            probes.append(make_probe(sample, recipe, variant))
            tally.add(1, [])
        except samples.BadSample as reason:
            name = sample.id if isinstance(sample, samples.Sample) else f"sample {number + 1}"
            tally.add(1, [(name, reason)])

    return probes, tally


def make_probe(sample: samples.Sample, recipe: examples.Recipe, variant: Variant) -> Probe:
    """Returns the probe of a sample; without a last answer it ends with the answer's header.

    Raises:
      BadSample: it is malformed, text only, too long, or has too little text around its images.
    """
    turns = turns_lib.normalize_sample(sample, needs_answer=False)
    if not sample.images:
        raise samples.BadSample(TEXT_ONLY, "no image")

    # Tokens, then one slot for each patch of an image.
    is_open = turns[-1]["from"] != "gpt"
    encoded = conversation.encode(turns, recipe.tokenizer, recipe.template, open_answer=is_open)
    expanded = conversation.expand(encoded, recipe.vision.num_patches)
    length = len(expanded.tokens)
    if length > recipe.length:
        detail = f"{length} slots, the limit is {recipe.length}"
        raise samples.BadSample(TOO_LONG, detail)

    # Queries are the slots before `end`. They need enough text on both sides of the images.
    end = length
    if variant.prompt_only and not is_open:
        end = last_prompt_slot(expanded.targets)
    ignored = max(_count_system_slots(turns, recipe), variant.exclude_prefix)
    before, after = count_text(expanded.modality[:end])
    for cause, num_slots in ((FEW_BEFORE, max(before - ignored, 0)), (FEW_AFTER, after)):
        if num_slots < MIN_TEXT:
            raise samples.BadSample(cause, f"{num_slots} without the system turn")

    prepared = [examples.load_square(image, recipe.vision) for image in sample.images]
    example = examples.Example(
        sample.id, expanded.tokens, expanded.modality, expanded.targets, prepared
    )
    classes = classify(expanded.modality, variant.exclude_prefix)
    return Probe(example, classes, group(expanded.modality, end))


def _count_system_slots(turns: turns_lib.Turns, recipe: examples.Recipe) -> int:
    """Returns the number of slots of the system turn, the conversation's or the template's."""
    system_turns = [turns[0]] if turns[0]["from"] == "system" else []
    if not system_turns and not recipe.template.system:
        return 0
    return len(conversation.encode(system_turns, recipe.tokenizer, recipe.template).ids)


def make_recipe(
    config: config_lib.Config, arch: WingsArch, tokenizer: Any, max_slots: int
) -> examples.Recipe:
    """Returns how samples become slots for a model, in at most `max_slots` or the model's limit.

    Raises:
      UserError: its template is unknown, or does not fit its tokenizer.
    """
    # The router has weights for so many key positions only.
    limit = min(max_slots, arch.decoder.max_positions)
    if arch.router:
        limit = min(limit, arch.router_positions)

    data = dataclasses.replace(config.data, sequence_length=limit, images_per_row=1)
    return examples.make_recipe(
        data, tokenizer, arch.vision, prompt_length=arch.semantics.prompt_length
    )


def batch_probes(
    probes: Sequence[Probe], recipe: examples.Recipe, batch_size: int
) -> Iterator[tuple[list[int], ProbeRows]]:
    """Yields the numbers of up to `batch_size` probes of similar length, and their rows."""
    by_length = sorted(range(len(probes)), key=lambda number: len(probes[number].classes))
    for start in range(0, len(by_length), batch_size):
        numbers = by_length[start : start + batch_size]
        yield numbers, assemble_rows([probes[number] for number in numbers], recipe, batch_size)


def assemble_rows(probes: Sequence[Probe], recipe: examples.Recipe, batch_size: int) -> ProbeRows:
    """Returns `batch_size` rows with one probe each, padded to one of few lengths.

    Rows without a probe are padding.
    """
    # Few different lengths, so that few programs are compiled.
    length = SHORTEST_ROW
    while length < max(len(probe.classes) for probe in probes):
        length *= 2

    max_images = max(len(probe.example.images) for probe in probes)
    row_recipe = dataclasses.replace(recipe, length=length, images_per_row=max_images)

    padding: list[list[examples.Example]] = [[] for _ in range(batch_size - len(probes))]
    batch = pipeline.assemble([[probe.example] for probe in probes] + padding, row_recipe)

    # Padding slots belong to no class and to no group.
    classes = np.zeros((batch_size, length, len(CLASSES)), np.float32)
    groups = np.zeros((batch_size, length, len(GROUPS)), np.float32)
    for row, probe in enumerate(probes):
        slots = np.arange(len(probe.classes))
        classes[row, slots, probe.classes] = 1.0
        groups[row, slots] = probe.groups

    return ProbeRows(batch, classes, groups)


def sharded_batch_size(batch_size: int, mesh: Mesh) -> int:
    """Returns the next batch size that the mesh divides; its axes data and fsdp share a batch."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-batch_size // shards) * shards


def shard_rows(rows: ProbeRows, mesh: Mesh) -> ProbeRows:
    """Returns the rows on the mesh; every host has all of them and passes its shards."""
    sharding = axes.sharding_of(mesh, ("B",))

    def shard(values: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(shard, rows)


def check_any(count: int, tally: samples.Tally, where: str) -> None:
    """Raises UserError with the causes if no sample is left."""
    if not count:
        raise UserError(f"{where}: no sample can be measured: {format_causes(tally)}")


def format_causes(tally: samples.Tally) -> str:
    """Returns why samples were skipped: each cause, its count, and the first sample."""
    return "; ".join(
        f"{count} x {cause} (first: {tally.first[cause][0]})"
        for cause, count in tally.causes.most_common()
    )
