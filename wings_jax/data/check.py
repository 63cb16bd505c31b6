"""What a training run would skip, found before the run.

    python -m wings_jax.data.check FILE.json --images DIR
    python -m wings_jax.data.check FILE.json --images DIR \\
        --tokenizer DIR --sequence-length 2048 --image-slots 729

Every sample goes through the same code as in training: its turns, its markers, every picture
decoded, and with a tokenizer its length. Exit status 0 if all are good, 1 if any is bad, 2 if
the file cannot be read.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tqdm

from wings_jax import cli, errors
from wings_jax.data import conversation, examples, images, samples, sources, tokenization

_AT_ONCE = 256  # samples handed to the threads at a time


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found about one sample.

    images   how many it has
    slots    how many slots it fills before any cut; None without a tokenizer, or if it is bad
    reason   why it is bad, or None
    """

    id: str
    images: int
    slots: int | None
    reason: samples.BadSample | None


def inspect_sample(
    source: sources.SampleSource, index: int, recipe: examples.Recipe | None
) -> Finding:
    """Returns what is wrong with a sample, or its size; lengths only with a recipe."""
    identity, pictures = f"#{index}", 0
    try:
        sample = source[index]
        identity, pictures = sample.id, len(sample.images)
        slots = None
        if recipe is None:
            conversation.normalize_sample(sample)
        else:
            encoded = examples.encode_sample(sample, recipe)
            slots = len(encoded.ids) + pictures * (recipe.image_slots - 1)
            examples.truncate(encoded, recipe)
        for picture in sample.images:
            images.load_image(picture)
        return Finding(identity, pictures, slots, None)
    except samples.BadSample as reason:
        return Finding(identity, pictures, None, reason)


def inspect_source(
    source: sources.SampleSource, recipe: examples.Recipe | None = None, *, threads: int = 8
) -> list[Finding]:
    """Returns the findings of all samples in order, with a progress bar on a terminal."""
    findings: list[Finding] = []
    with (
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
        tqdm.tqdm(total=len(source), desc="checking samples", disable=None) as bar,
    ):
        for first in range(0, len(source), _AT_ONCE):
            span = range(first, min(first + _AT_ONCE, len(source)))
            findings += pool.map(lambda index: inspect_sample(source, index, recipe), span)
            bar.update(len(span))
    return findings


def summarize(
    name: str, findings: Sequence[Finding], recipe: examples.Recipe | None
) -> dict[str, Any]:
    """Returns the report: counts by cause with all ids, images per sample, lengths."""
    bad = [(found.id, found.reason) for found in findings if found.reason is not None]
    tally = samples.Tally()
    tally.add(len(findings), bad)
    report = {"file": name, "samples": tally.seen, **tally.as_dict()}
    del report["seen"]
    for cause, row in report["causes"].items():
        row["ids"] = [identity for identity, reason in bad if reason.cause == cause]
    counts = np.bincount([found.images for found in findings]).tolist()
    report["images_per_sample"] = {str(n): count for n, count in enumerate(counts) if count}
    slots = np.array([found.slots for found in findings if found.slots is not None])
    if recipe is not None and len(slots):
        report["slots"] = {
            "least": int(slots.min()),
            "median": int(np.median(slots)),
            "mean": round(float(slots.mean()), 1),
            "95%": int(np.quantile(slots, 0.95)),
            "99%": int(np.quantile(slots, 0.99)),
            "most": int(slots.max()),
            "sequence_length": recipe.length,
            "cut": int((slots > recipe.length).sum()),
        }
    return report


def as_table(report: dict[str, Any]) -> str:
    """Returns the report for people to read."""
    lines = [f"{report['file']}: {report['samples']:,} samples, {report['bad']:,} bad"]
    for cause, row in report["causes"].items():
        lines.append(f"  {row['count']:>9,}  {cause}")
        lines += [f"{'':13}{example}" for example in row["first"]]
    lines.append("images per sample")
    lines += [f"  {count:>9,}  x {n}" for n, count in report["images_per_sample"].items()]
    slots = report.get("slots")
    if slots:
        shown = ("least", "median", "mean", "95%", "99%", "most")
        lines.append("slots per sample   " + "   ".join(f"{key} {slots[key]:,}" for key in shown))
        lines.append(f"  {slots['cut']:>9,}  longer than {slots['sequence_length']:,}, cut there")
    return "\n".join(lines)


def make_recipe(
    tokenizer: Any, template: str | None, *, length: int, image_slots: int, images_per_row: int
) -> examples.Recipe:
    """Returns the recipe by which lengths are measured; the tokenizer's own template if None."""
    text_tokenizer = tokenization.as_text_tokenizer(tokenizer)
    name = template or conversation.get_template_for(text_tokenizer)
    return examples.Recipe(
        tokenizer=text_tokenizer,
        template=conversation.get_template(name),
        length=length,
        image_slots=image_slots,
        images_per_row=images_per_row,
        image_size=1,
        image_mean=(0.0, 0.0, 0.0),
    )


def main() -> None:
    """Reads the command line, checks, prints the table, exits with 1 if a sample is bad."""
    args = _parse()
    recipe = _recipe(args) if args.tokenizer else None
    source = sources.open_source(args.file, images=args.images, split=args.split)
    report = summarize(args.file, inspect_source(source, recipe, threads=args.threads), recipe)
    print(as_table(report))
    if args.output:
        _write(pathlib.Path(args.output), report)
    if report["bad"]:
        sys.exit(1)


def _recipe(args: argparse.Namespace) -> examples.Recipe:
    import transformers  # slow to import, and only needed here

    if not pathlib.Path(args.tokenizer).is_dir():
        raise errors.UserError(f"--tokenizer {args.tokenizer}: no such folder")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise errors.UserError(f"--tokenizer {args.tokenizer}: {first}") from error
    return make_recipe(
        tokenizer,
        args.template,
        length=args.sequence_length,
        image_slots=args.image_slots,
        images_per_row=args.images_per_row,
    )


def _write(path: pathlib.Path, report: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    except OSError as error:
        raise errors.UserError(f"--output {path}: {error.strerror}") from error


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return int(text)

    return number


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m wings_jax.data.check", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("file", help="a LLaVA JSON or JSONL file, or a folder that data.prepare wrote")
    add("--images", help="folder of the image paths (default: the file's)")
    add("--split", default="train", help="split of a prepared folder")
    add("--tokenizer", help="folder of a tokenizer: lengths are checked too")
    add("--template", choices=tuple(conversation.TEMPLATES), help="default: the tokenizer's")
    add("--sequence-length", type=_at_least(1), default=2048, help="slots of a row")
    add("--image-slots", type=_at_least(1), default=729, help="slots of one image")
    add("--images-per-row", type=_at_least(0), default=8, help="most images of a sample")
    add("--output", help="write the report, with all ids, as JSON")
    add("--threads", type=_at_least(1), default=os.cpu_count() or 1)
    add("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run_main("check", main)
