"""Conversations to measure attention on: what every slot counts as, and which rows are averaged.

With `i` an image's slots, and the first two slots excluded by `Variant.exclude_prefix`:

    slot    s        s        t      i     i     t       i     t     t
    class   excluded excluded before image image between image after after

A slot belongs to exactly one class, so the masses of a query's attention row add up to 1.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from wings_jax import config as config_lib
from wings_jax.data import conversation, examples, images, pipeline, samples, sources
from wings_jax.data import turns as turns_lib
from wings_jax.errors import UserError
from wings_jax.model.layout import IGNORE, IMAGE, TEXT, Batch
from wings_jax.model.presets import WingsArch
from wings_jax.scenes import dataset, drawings, questions, skills

CLASSES = ("excluded", "before", "image", "between", "after")
ROWS = ("all", "after")
KINDS = ("text", "image")
SPANS = ("before", "image", "after")
BINS = 8  # of each span, for the shares by query position
GROUPS = (*ROWS, *KINDS, *(f"{span}-{part}" for span in SPANS for part in range(BINS)))
LEAST = 8  # text slots on either side of the images, those of the system turn aside
SHORTEST = 64  # slots of the smallest shape; the others are its doubles

TEXT_ONLY = "text only"
FEW_BEFORE = f"fewer than {LEAST} text slots before the image"
FEW_AFTER = f"fewer than {LEAST} text slots after the image"
TOO_LONG = "too long"


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is averaged, where the paper leaves it open.

    rows            queries: `all`, or those `after` the last image
    exclude_prefix  so many first slots are no keys of "before" (a class of their own)
    prompt_only     queries end before the last answer
    """

    rows: str = "all"
    exclude_prefix: int = 0
    prompt_only: bool = False

    def __str__(self) -> str:
        return f"rows: {self.rows}, {self.beside_rows}"

    @property
    def beside_rows(self) -> str:
        """Returns it for what is told by kind or place of the query, whatever `rows` is."""
        prompt = "prompt only" if self.prompt_only else "prompt and answer"
        return f"excluded prefix: {self.exclude_prefix}, {prompt}"


@dataclasses.dataclass(frozen=True)
class Probe:
    """A conversation with an image.

    example  its slots and pictures
    classes  i32[n], indices of CLASSES
    groups   f32[n,Q], for each of GROUPS the weights of a mean over its queries (0: no query)
    """

    example: examples.Example
    classes: np.ndarray
    groups: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProbeRows:
    """Probes as the model reads them, one a row, rows of padding at the end.

    batch    Batch of [B,T]
    classes  f32[B,T,C], one-hot
    groups   f32[B,T,Q]
    """

    batch: Batch
    classes: np.ndarray
    groups: np.ndarray


def embedded(count: int, seed: int = 0) -> list[samples.Sample]:
    """Returns conversations with a held-out picture in the middle: two text-only turns, two
    questions about the picture, two text-only turns, all answered."""
    rng = random.Random(f"{seed}-laws")
    album = dataset.Album("test", rng)
    found = []
    for number in range(count):
        name, scene = album.add()
        before, after = (dataset.text_turns(rng, list(skills.SKILLS), "test", 2) for _ in range(2))
        turns = [*before, *questions.ask_turns(rng, [scene], 2), *after]
        record = dataset.make_record(
            f"probe-{number}", "interleaved", turns, [name], at=len(before)
        )
        picture = drawings.render(scene, album.glyphs)
        found.append(samples.Sample(record["id"], (picture,), record["conversations"]))
    return found


def sample(
    source: sources.SampleSource, limit: int
) -> Iterator[samples.Sample | samples.BadSample]:
    """Yields up to `limit` samples, spread over the source, or what is wrong with them."""
    count = len(source)
    for index in sorted({i * count // limit for i in range(limit)}):
        try:
            yield source[index]
        except samples.BadSample as reason:
            yield samples.BadSample(reason.cause, f"record {index}: {reason.detail}")


def read_probes(
    found: Iterable[samples.Sample | samples.BadSample],
    recipe: examples.Recipe,
    variant: Variant,
) -> tuple[list[Probe], samples.Tally]:
    """Returns the probes, and a tally of the samples that are none, by cause.

    `recipe.length` is the longest conversation; longer ones are skipped, not cut.
    """
    probes, tally = [], samples.Tally()
    for number, one in enumerate(found):
        try:
            if isinstance(one, samples.BadSample):
                raise one
            probes.append(make_probe(one, recipe, variant))
            tally.add(1, [])
        except samples.BadSample as reason:
            name = one.id if isinstance(one, samples.Sample) else f"sample {number + 1}"
            tally.add(1, [(name, reason)])
    return probes, tally


def make_probe(one: samples.Sample, recipe: examples.Recipe, variant: Variant) -> Probe:
    """Returns the probe of a sample; one whose last answer is missing ends where it would begin.

    Raises:
      BadSample: it is malformed, text only, too long, or has too little text around its images.
    """
    turns = turns_lib.normalize_sample(one, needs_answer=False)
    if not one.images:
        raise samples.BadSample(TEXT_ONLY, "no image")
    is_open = turns[-1]["from"] != "gpt"
    encoded = conversation.encode(turns, recipe.tokenizer, recipe.template, open_answer=is_open)
    slots = conversation.expand(encoded, recipe.vision.num_patches)
    if len(slots.tokens) > recipe.length:
        detail = f"{len(slots.tokens)} slots, at most {recipe.length} are read"
        raise samples.BadSample(TOO_LONG, detail)
    end = len(slots.tokens)
    if variant.prompt_only and not is_open:
        end = last_prompt_slot(slots.targets)
    system = _system_slots(turns, recipe)
    _check_text(slots.modality[:end], max(system, variant.exclude_prefix))
    pictures = [
        images.prepare_image(
            images.load_image(picture), recipe.vision.image_size, recipe.vision.mean
        )
        for picture in one.images
    ]
    example = examples.Example(one.id, slots.tokens, slots.modality, slots.targets, pictures)
    classes = classify(slots.modality, variant.exclude_prefix)
    return Probe(example, classes, group(slots.modality, end))


def last_prompt_slot(targets: np.ndarray) -> int:
    """Returns how many slots stand before the last answer, all of them if there is none.

    targets  -  -  a  a  -  -  b  b  -      gives 7: the slot that "b" is the next token of
    """
    learned = targets != IGNORE
    starts = np.flatnonzero(learned & ~np.append(False, learned[:-1]))
    return int(starts[-1]) + 1 if len(starts) else len(targets)


def _system_slots(turns: turns_lib.Turns, recipe: examples.Recipe) -> int:
    """Returns how many slots a conversation's system turn takes, its own or the template's."""
    own = [turns[0]] if turns[0]["from"] == "system" else []
    if not own and not recipe.template.system:
        return 0
    return len(conversation.encode(own, recipe.tokenizer, recipe.template).ids)


def _check_text(modality: np.ndarray, system: int) -> None:
    """Raises BadSample unless there is enough text before and after the images."""
    where = np.flatnonzero(modality == IMAGE)
    before = max(0, int(where[0]) - system)
    after = int((modality[where[-1] :] == TEXT).sum())
    for cause, number in ((FEW_BEFORE, before), (FEW_AFTER, after)):
        if number < LEAST:
            raise samples.BadSample(cause, f"{number} without the system turn")


def classify(modality: np.ndarray, exclude_prefix: int = 0) -> np.ndarray:
    """Returns i32[n], the class of every slot of one conversation with images."""
    slots, is_image = np.arange(len(modality)), modality == IMAGE
    first, last = np.flatnonzero(is_image)[[0, -1]]
    is_class = {
        "excluded": slots < min(exclude_prefix, first),
        "before": slots < first,
        "image": is_image,
        "between": slots < last,
        "after": slots > last,
    }
    return np.argmax([is_class[name] for name in CLASSES], axis=0).astype(np.int32)


def group(modality: np.ndarray, end: int) -> np.ndarray:
    """Returns f32[n,Q]: for each of GROUPS weights that add up to 1, or to 0 without a query.

    Only the first `end` slots are queries. The text between images belongs to the span "image".
    """
    slots, is_image = np.arange(len(modality)), modality == IMAGE
    used = slots < end
    first, last = np.flatnonzero(is_image)[[0, -1]]
    masks = [used, used & (slots > last), used & ~is_image, used & is_image]
    for span in (used & (slots < first), used & (slots >= first) & (slots <= last), masks[1]):
        place = np.cumsum(span) - 1
        part = place * BINS // max(span.sum(), 1)
        masks += [span & (part == number) for number in range(BINS)]
    weights = np.stack(masks, axis=-1).astype(np.float32)
    return weights / np.maximum(weights.sum(0), 1.0)


def make_recipe(
    config: config_lib.Config, arch: WingsArch, tokenizer: Any, longest: int
) -> examples.Recipe:
    """Returns how samples become slots for a model, at most `longest` or what the model can read.

    Raises:
      UserError: its template is unknown, or does not fit its tokenizer.
    """
    limit = min(longest, arch.decoder.max_positions)
    limit = min(limit, arch.router_positions) if arch.router else limit
    data = dataclasses.replace(config.data, sequence_length=limit, images_per_row=1)
    return examples.make_recipe(
        data, tokenizer, arch.vision, prompt_length=arch.semantics.prompt_length
    )


def in_batches(
    probes: Sequence[Probe], recipe: examples.Recipe, rows: int
) -> Iterator[tuple[list[int], ProbeRows]]:
    """Yields the numbers of up to `rows` probes of similar length, and them as a batch."""
    order = sorted(range(len(probes)), key=lambda i: len(probes[i].classes))
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        yield chosen, assemble([probes[i] for i in chosen], recipe, rows)


def assemble(probes: Sequence[Probe], recipe: examples.Recipe, rows: int) -> ProbeRows:
    """Returns `rows` rows, one probe in each, filled up with padding to one of few lengths."""
    length = SHORTEST
    while length < max(len(probe.classes) for probe in probes):
        length *= 2
    shape = dataclasses.replace(
        recipe,
        length=length,
        images_per_row=max(len(probe.example.images) for probe in probes),
    )
    filling = [[] for _ in range(rows - len(probes))]
    batch = pipeline.assemble([[probe.example] for probe in probes] + filling, shape)
    classes = np.zeros((rows, length, len(CLASSES)), np.float32)
    groups = np.zeros((rows, length, len(GROUPS)), np.float32)
    for row, probe in enumerate(probes):
        slots = np.arange(len(probe.classes))
        classes[row, slots, probe.classes] = 1.0
        groups[row, slots] = probe.groups
    return ProbeRows(batch, classes, groups)


def check_any(count: int, tally: samples.Tally, where: str) -> None:
    """Raises UserError, telling why, if of all samples none is left."""
    if not count:
        raise UserError(f"{where}: no sample can be measured: {reasons(tally)}")


def reasons(tally: samples.Tally) -> str:
    """Returns why samples were skipped: each cause, how often, and the first sample."""
    return "; ".join(
        f"{count} x {cause} (first: {tally.first[cause][0]})"
        for cause, count in tally.causes.most_common()
    )
