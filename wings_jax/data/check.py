"""Reports which samples a training run would skip, before the run.

    python -m wings_jax.data.check FILE.json --images DIR
    python -m wings_jax.data.check FILE.json --images DIR \\
        --tokenizer DIR --sequence-length 2048 --image-slots 729

Every sample goes through the code of training: its turns, its markers, every image decoded, and
with a tokenizer its length. Exit status 0 if all are good, 1 if any is bad, 2 if the file cannot
be read.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tqdm

from wings_jax import cli, errors, files
from wings_jax.data import conversation, examples, images, samples, settings, sources, turns

_CHUNK = 256  # samples handed to the threads at a time


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one sample.

    id      the sample's
    images  number of its images
    slots   slots it takes before truncation; None without a tokenizer, or if it is bad
    reason  why it is bad, or None
    """

    id: str
    images: int
    slots: int | None
    reason: samples.BadSample | None


@dataclasses.dataclass(frozen=True)
class ImageSlots:
    """A `VisionFormat` for measuring lengths: only the number of slots is used."""

    num_patches: int
    image_size: int = 1
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)


def inspect_sample(
    source: sources.SampleSource, index: int, recipe: examples.Recipe | None
) -> Finding:
    """Returns why a sample is bad, or its size; slots are counted only with a recipe."""
    identity, image_count = f"#{index}", 0
    try:
        sample = source[index]
        identity, image_count = sample.id, len(sample.images)

        # The same functions in the same order as in training (`examples.make_example`).
        slots = None
        if recipe is None:
            turns.normalize_sample(sample)
        else:
            encoded = examples.encode_sample(sample, recipe)
            slots = len(encoded.ids) + image_count * (recipe.vision.num_patches - 1)
            examples.truncate(encoded, recipe)

        for image in sample.images:
            images.load_image(image)
        return Finding(identity, image_count, slots, None)
    except samples.BadSample as reason:
        return Finding(identity, image_count, None, reason)


def inspect_source(
    source: sources.SampleSource, recipe: examples.Recipe | None = None, *, threads: int = 8
) -> list[Finding]:
    """Returns the findings of all samples in order, with a progress bar on a terminal."""
    findings: list[Finding] = []
    with (
        concurrent.futures.ThreadPoolExecutor(threads) as executor,
        tqdm.tqdm(total=len(source), desc="checking samples", disable=None) as progress,
    ):
        for first in range(0, len(source), _CHUNK):
            indices = range(first, min(first + _CHUNK, len(source)))
            findings += executor.map(lambda index: inspect_sample(source, index, recipe), indices)
            progress.update(len(indices))
    return findings


def summarize(
    name: str, findings: Sequence[Finding], recipe: examples.Recipe | None
) -> dict[str, Any]:
    """Returns the report: counts by cause with all ids, images per sample, lengths."""
    bad_samples = [
        (finding.id, finding.reason) for finding in findings if finding.reason is not None
    ]
    tally = samples.Tally()
    tally.add(len(findings), bad_samples)
    counts = tally.as_dict()

    report = {"file": name, "samples": tally.seen, "bad": tally.bad, "causes": counts["causes"]}
    for cause, entry in report["causes"].items():
        entry["ids"] = [identity for identity, reason in bad_samples if reason.cause == cause]

    image_counts = np.bincount([finding.images for finding in findings]).tolist()
    report["images_per_sample"] = {
        str(number): count for number, count in enumerate(image_counts) if count
    }

    slots = np.array([finding.slots for finding in findings if finding.slots is not None])
    if recipe is not None and len(slots):
        report["slots"] = _slot_statistics(slots, recipe.length)
    return report


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
    for cause, entry in report["causes"].items():
        lines.append(f"  {entry['count']:>9,}  {cause}")
        lines += [f"{'':13}{example}" for example in entry["first"]]

    lines.append("images per sample")
    lines += [f"  {count:>9,}  x {number}" for number, count in report["images_per_sample"].items()]

    slots = report.get("slots")
    if slots:
        shown = ("least", "median", "mean", "95%", "99%", "most")
        lines.append("slots per sample   " + "   ".join(f"{key} {slots[key]:,}" for key in shown))
        limit = slots["sequence_length"]
        lines.append(f"  {slots['cut']:>9,}  longer than {limit:,}, truncated")
    return "\n".join(lines)


def main() -> None:
    """Checks a data file and prints the report; exits with status 1 if a sample is bad."""
    arguments = _parse_args()
    recipe = _recipe_from_args(arguments) if arguments.tokenizer else None
    source = sources.open_source(arguments.file, images=arguments.images, split=arguments.split)
    findings = inspect_source(source, recipe, threads=arguments.threads)

    report = summarize(arguments.file, findings, recipe)
    print(as_table(report))
    if arguments.output:
        files.write_json(arguments.output, report)
    if report["bad"]:
        sys.exit(1)


def _recipe_from_args(arguments: argparse.Namespace) -> examples.Recipe:
    import transformers  # slow to import, and only needed here

    if not pathlib.Path(arguments.tokenizer).is_dir():
        raise errors.UserError(f"--tokenizer {arguments.tokenizer} is not a directory")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.tokenizer)
    except (OSError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise errors.UserError(f"--tokenizer {arguments.tokenizer}: {first_line}") from error

    data = settings.DataConfig(
        template=arguments.template or conversation.get_template_for(tokenizer),
        sequence_length=arguments.sequence_length,
        images_per_row=arguments.images_per_row,
    )
    return examples.make_recipe(data, tokenizer, ImageSlots(arguments.image_slots))


def _at_least(least: int) -> Callable[[str], int]:
    def parse_number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return int(text)

    return parse_number


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m wings_jax.data.check", description=__doc__.splitlines()[0]
    )
    add_argument = parser.add_argument
    add_argument("file", help="a LLaVA JSON or JSONL file, or a directory that data.prepare wrote")
    add_argument("--images", help="directory of the image paths (default: the file's)")
    add_argument("--split", default="train", help="split of a prepared directory")
    add_argument("--tokenizer", help="directory of a tokenizer: lengths are checked too")
    add_argument(
        "--template", choices=tuple(conversation.TEMPLATES), help="default: the tokenizer's"
    )
    add_argument("--sequence-length", type=_at_least(1), default=2048, help="slots of a row")
    add_argument("--image-slots", type=_at_least(1), default=729, help="slots of one image")
    add_argument("--images-per-row", type=_at_least(0), default=8, help="most images of a sample")
    add_argument("--output", help="write the report, with all ids, as JSON")
    add_argument("--threads", type=_at_least(1), default=os.cpu_count() or 1)
    add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run_main("python -m wings_jax.data.check", main)
