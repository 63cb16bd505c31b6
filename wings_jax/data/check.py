"""Reports which samples a training run would skip, before the run.

    python -m wings_jax.data.check FILE.json --images DIR
    python -m wings_jax.data.check FILE.json --images DIR --config configs/stage2.py:qwen1_5_7b
    python -m wings_jax.data.check FILE.json --images DIR \\
        --tokenizer DIR --sequence-length 2048 --image-slots 729

Every sample goes through the code of training: its turns, its markers, every image decoded, and
with a config or a tokenizer its length. `--fix` writes the good records to a new file. Exit status
0 if all are good, 1 if any is bad, 2 if the file cannot be read.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from wings_jax import cli, config_files, errors, files
from wings_jax.data import (
    chat_template,
    examples,
    inspection,
    inspection_figure,
    parallel,
    settings,
    sources,
)


def main() -> None:
    """Checks a data file and prints the report; exits with status 1 if a sample is bad."""
    arguments, changes = _parse_args()

    # Without a recipe lengths are not checked.
    recipe = None
    if arguments.config:
        recipe = _recipe_from_config([f"--config={arguments.config}", *changes])
    elif arguments.tokenizer:
        recipe = _recipe_from_tokenizer(arguments)

    if arguments.fix and files.as_path(arguments.fix, "--fix").exists():
        raise errors.UserError(f"--fix {arguments.fix} exists; remove it or give another name")

    source = sources.open_source(arguments.file, images=arguments.images, split=arguments.split)
    if arguments.fix and not hasattr(source, "record"):
        raise errors.UserError(
            f"--fix: {arguments.file} is a prepared directory, which has no bad samples to remove"
        )

    workers = arguments.workers
    if workers is None:
        workers = parallel.default_workers(len(source))
    findings = inspection.inspect_source(source, recipe, workers=workers)

    report = inspection.summarize(arguments.file, findings, recipe)
    print(inspection.as_table(report))
    if arguments.output:
        files.write_json(arguments.output, report)
    if arguments.figure:
        inspection_figure.write_figure(arguments.figure, findings, report)

    # Image paths in the new file are relative to the same directory as before.
    if arguments.fix:
        write_good_records(source, findings, arguments.fix)
        images = arguments.images or str(files.as_path(arguments.file).parent)
        print(
            f"{report['samples'] - report['bad']:,} good records: {arguments.fix} (its images: "
            f"--images {shlex.quote(images)})"
        )

    if report["bad"]:
        sys.exit(1)


def write_good_records(
    source: Any, findings: Sequence[inspection.Finding], path: str | pathlib.Path
) -> None:
    """Writes the records without a reason to `path`: a JSON list, or one per line for .jsonl.

    Raises:
      UserError: a record holds what JSON cannot, such as the bytes of an image.
    """
    is_by_line = pathlib.Path(path).suffix.lower() in (".jsonl", ".ndjson")
    begin, between, end = ("", "\n", "\n") if is_by_line else ("[\n", ",\n", "\n]\n")

    with files.replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        # The text before the next record: `begin` before the first.
        separator = begin
        for index, finding in enumerate(findings):
            if finding.reason is not None:
                continue
            try:
                text = json.dumps(source.record(index), ensure_ascii=False)
            except TypeError as error:
                raise errors.UserError(
                    f"--fix: record {finding.id} cannot be written as JSON ({error}); "
                    "python -m wings_jax.data.prepare --skip-bad writes the good samples"
                ) from error

            file.write(separator + text)
            separator = between
        file.write(end)


def _recipe_from_config(argv: Sequence[str]) -> examples.Recipe:
    """Returns the recipe of a training run: its tokenizer, template, tower and limits."""
    # These modules import JAX, and are only needed here.
    from wings_jax import checkpoint
    from wings_jax import config as config_lib
    from wings_jax.training import arguments
    from wings_jax.weights import starting

    options = arguments.parse(config_files.resolve_flags(argv))
    assert options.config is not None  # parse raises without --config
    config = config_lib.from_config_dict(options.config)

    arch = starting.resolve_arch(config.model, starting.saved_arch(config))
    # The checkpoint to start from may not be trained yet; its tokenizer is that of the LLM.
    source = checkpoint.newest_step(config.init_from) if config.init_from else None
    tokenizer_files = starting.tokenizer_files(config, source)

    return examples.make_recipe(
        config.data,
        checkpoint.open_tokenizer(tokenizer_files),
        arch.vision,
        prompt_length=arch.semantics.prompt_length,
    )


def _recipe_from_tokenizer(arguments: argparse.Namespace) -> examples.Recipe:
    import transformers  # slow to import, and only needed here

    if not pathlib.Path(arguments.tokenizer).is_dir():
        raise errors.UserError(f"--tokenizer {arguments.tokenizer} is not a directory")

    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(arguments.tokenizer)
    except (OSError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise errors.UserError(f"--tokenizer {arguments.tokenizer}: {first_line}") from error

    # Without --template, the one that fits the tokenizer's chat template or control tokens.
    data = settings.DataConfig(
        template=arguments.template
        or chat_template.choose_template(tokenizer, prefer_named=False)[0],
        sequence_length=arguments.sequence_length,
        images_per_row=arguments.images_per_row,
    )

    # Instead of a vision tower: only the number of its slots matters for lengths.
    slots = inspection.ImageSlots(arguments.image_slots)
    return examples.make_recipe(data, tokenizer, slots)


def _parse_args() -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags, and the changes of config leaves among the arguments."""
    parser = argparse.ArgumentParser(
        prog=cli.program_name("wings_jax.data.check"), description=__doc__.splitlines()[0]
    )
    add_argument = parser.add_argument
    add_argument(
        "file",
        help="a data file of any format, or a directory that data.prepare wrote",
    )
    add_argument(
        "--images", help="directory that image paths are relative to (default: the file's)"
    )
    add_argument("--split", default="train", help="split of a prepared directory")

    # Lengths depend on the tokenizer and the model.
    add_argument(
        "--config",
        help="training config, FILE[:PRESET]: lengths are checked with its tokenizer, template, "
        "tower and limits; --config.KEY=VALUE changes its leaves",
    )
    add_argument("--tokenizer", help="directory of a tokenizer: lengths are checked too")
    add_argument("--template", choices=chat_template.NAMES, help="default: the tokenizer's")
    add_argument("--sequence-length", type=cli.at_least(1), default=2048, help="slots of a row")
    add_argument("--image-slots", type=cli.at_least(1), default=729, help="slots of one image")
    add_argument(
        "--images-per-row", type=cli.at_least(0), default=8, help="most images of a sample"
    )

    # What is written.
    add_argument("--output", help="write the report, with all ids, as JSON")
    add_argument("--figure", help="write histograms of slots and images as PNG")
    add_argument("--fix", help="write the good records to this .json or .jsonl file")
    add_argument(
        "--workers",
        "--threads",
        type=cli.at_least(0),
        help="processes that share the work, 0 for none (default: all cores for 5,000 samples or "
        "more)",
    )
    add_argument("--debug", action="store_true", help="show tracebacks")

    # Arguments that the parser does not define must be changes of config leaves.
    arguments, changes = parser.parse_known_args()
    unknown = [text for text in changes if not text.startswith("--config.")]
    if unknown or (changes and not arguments.config):
        parser.error(f"unrecognized arguments: {' '.join(unknown or changes)}")

    if arguments.config and arguments.tokenizer:
        parser.error("--tokenizer: the config has one, --config.data.tokenizer")
    return arguments, changes


if __name__ == "__main__":
    cli.run_main("python -m wings_jax.data.check", main)
