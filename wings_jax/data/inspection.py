"""What training would make of every sample of a source: findings, and the report of them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wings_jax.data import examples, images, parallel, samples, sources, turns


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one sample.

    id      the sample's
    images  number of its images
    slots   slots it takes before truncation; None without a tokenizer, or if it is bad
    reason  why it is bad, or None
    form    name of the record's form (`records.FORMS`), None if it has none
    modes   PIL modes of its images
    pixels  of its largest image; 0 without images
    word    whether it has no image, but the word `<image>` in a question, which is text then
    """

    id: str
    images: int = 0
    slots: int | None = None
    reason: samples.BadSample | None = None
    form: str | None = None
    modes: tuple[str, ...] = ()
    pixels: int = 0
    word: bool = False


@dataclasses.dataclass(frozen=True)
class ImageSlots:
    """A `VisionFormat` for measuring lengths: only the number of slots is used.

    num_patches  P, slots of an image
    image_size   height and width in pixels; not used
    mean         color of the padding, in 0..1; not used
    resample     how images are resized; not used
    """

    num_patches: int
    image_size: int = 1
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    resample: str = "bicubic"


def inspect_sample(
    source: sources.SampleSource, index: int, recipe: examples.Recipe | None
) -> Finding:
    """Returns why a sample is bad, or its size; slots are counted only with a recipe."""
    # Replaced by more as more of the sample turns out to be good.
    finding = Finding(f"#{index}")
    try:
        sample = source[index]
        finding = Finding(sample.id, len(sample.images), form=sample.form)

        # The same functions in the same order as in training (`examples.make_example`).
        slots = None
        conversation = turns.normalize_sample(sample)
        has_word = any(turns.ESCAPED_MARKER in turn["value"] for turn in conversation)
        if recipe is not None:
            encoded = examples.encode_sample(sample, recipe)
            # An image is one id, and takes P slots.
            slots = len(encoded.ids) + finding.images * (recipe.vision.num_patches - 1)
            examples.truncate(encoded, recipe)

        # Every image is decoded, as in training: a damaged one shows only then.
        modes, pixels = [], 0
        for image in sample.images:
            opened = images.open_image(image)
            images.to_rgb(opened)
            modes.append(opened.mode)
            pixels = max(pixels, opened.width * opened.height)

        word = has_word and not sample.images
        return dataclasses.replace(
            finding, slots=slots, modes=tuple(modes), pixels=pixels, word=word
        )
    except samples.BadSample as reason:
        identity = reason.sample_id or finding.id
        return dataclasses.replace(finding, id=identity, reason=reason)


def inspect_source(
    source: sources.SampleSource, recipe: examples.Recipe | None = None, *, workers: int = 0
) -> list[Finding]:
    """Returns the findings of all samples in order, with a progress bar on a terminal.

    Args:
      recipe: how samples become examples; without it slots are not counted.
      workers: processes that share the work; 0 for this one alone.
    """
    findings: list[Finding] = []
    for _, found in parallel.map_samples(
        _inspect, (source, recipe), len(source), workers=workers, title="checking samples"
    ):
        findings += found
    return findings


def _inspect(shared: tuple[sources.SampleSource, examples.Recipe | None], index: int) -> Finding:
    source, recipe = shared
    return inspect_sample(source, index, recipe)


def summarize(
    name: str, findings: Sequence[Finding], recipe: examples.Recipe | None
) -> dict[str, Any]:
    """Returns the report: forms, counts by cause with all ids, images per sample, lengths."""
    # Bad samples by cause, with the ids of all of them.
    bad_samples = [
        (finding.id, finding.reason) for finding in findings if finding.reason is not None
    ]
    tally = samples.Tally()
    tally.add(len(findings), bad_samples)
    counts = tally.as_dict()

    report = {"file": name, "samples": tally.seen, "bad": tally.bad, "causes": counts["causes"]}
    for cause, entry in report["causes"].items():
        entry["ids"] = [identity for identity, reason in bad_samples if reason.cause == cause]

    forms = collections.Counter(finding.form or "none" for finding in findings)
    report["forms"] = dict(forms.most_common())
    report["images"] = _image_statistics(findings)

    words = [finding.id for finding in findings if finding.word]
    report["image_word_without_images"] = {"count": len(words), "first": words[:5]}

    image_counts = np.bincount([finding.images for finding in findings]).tolist()
    report["images_per_sample"] = {
        str(number): count for number, count in enumerate(image_counts) if count
    }

    slots = np.array([finding.slots for finding in findings if finding.slots is not None])
    if recipe is not None and len(slots):
        report["slots"] = _slot_statistics(slots, recipe.length)
    return report


def _image_statistics(findings: Sequence[Finding]) -> dict[str, Any]:
    """Returns how many images have more than 8 bits per channel, and the largest image.

    A thread that loads an image holds its file, its pixels of 3 bytes and a copy of them.
    """
    modes = collections.Counter(mode for finding in findings for mode in finding.modes)
    # Modes of more than 8 bits per channel (`images.to_8_bit`).
    deep = {mode: modes[mode] for mode in sorted(modes) if mode == "F" or mode.startswith("I")}

    largest = max(findings, key=lambda finding: finding.pixels)
    return {
        "scaled_to_8_bit": deep,
        "largest_pixels": largest.pixels,
        "largest_id": largest.id if largest.pixels else None,
        "bytes_per_thread": 6 * largest.pixels,
    }


def _slot_statistics(slots: np.ndarray, length: int) -> dict[str, int | float]:
    """Returns quantiles of the samples' slots, and how many samples are longer than `length`."""
    return {
        "least": int(slots.min()),
        "median": int(np.median(slots)),
        "mean": round(float(slots.mean()), 1),
        "95%": int(np.quantile(slots, 0.95)),
        "99%": int(np.quantile(slots, 0.99)),
        "most": int(slots.max()),
        "sequence_length": length,
        "cut": int((slots > length).sum()),
    }


def as_table(report: dict[str, Any]) -> str:
    """Returns the report as text for the terminal."""
    lines = [f"{report['file']}: {report['samples']:,} samples, {report['bad']:,} bad"]
    lines.append("record form        " + _join_counts(report["forms"]))

    for cause, entry in report["causes"].items():
        lines.append(f"  {entry['count']:>9,}  {cause}")
        lines += [f"{'':13}{example}" for example in entry["first"]]

    lines.append("images per sample")
    lines += [f"  {count:>9,}  x {number}" for number, count in report["images_per_sample"].items()]

    # What is not wrong, but worth knowing.
    word = report["image_word_without_images"]
    if word["count"]:
        lines.append(
            f"<image> as a word  {word['count']:,} samples without images (first: "
            f"{word['first'][0]}); is their image under another key?"
        )

    image_report = report["images"]
    if image_report["scaled_to_8_bit"]:
        lines.append("scaled to 8 bits   " + _join_counts(image_report["scaled_to_8_bit"]))
    if image_report["largest_pixels"]:
        pixels, need = image_report["largest_pixels"], image_report["bytes_per_thread"]
        line = f"largest image      {pixels:,} pixels ({image_report['largest_id']})"
        if need >= 1e6:
            line += f", {need / 1e6:,.0f} MB of memory in each thread that loads it"
        lines.append(line)

    slots = report.get("slots")
    if slots:
        shown = ("least", "median", "mean", "95%", "99%", "most")
        lines.append("slots per sample   " + "   ".join(f"{key} {slots[key]:,}" for key in shown))
        limit = slots["sequence_length"]
        lines.append(f"  {slots['cut']:>9,}  longer than {limit:,}, truncated")
    return "\n".join(lines)


def _join_counts(counts: Mapping[str, int]) -> str:
    return "   ".join(f"{name} {count:,}" for name, count in counts.items())
