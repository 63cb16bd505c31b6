"""Answers one request, or a file of them.

    python -m wings_jax.generate --checkpoint runs/stage2 --prompt "What is red?" --image a.png
    python -m wings_jax.generate --checkpoint runs/stage2 \\
        --input requests.jsonl --output answers.jsonl

A single answer is printed as it is written. In a file a line is {"id", "prompt" or
"conversations", "images": [...]}, optionally with "sampling"; image paths start from the file's
folder, or --images. A job that was interrupted goes on when the same command is given again.
Exit status 0 if all was answered, 1 if some lines could not be (their answers say why), 2 for a
mistake in the command.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from typing import Any

import tqdm

from wings_jax import checkpoint, cli
from wings_jax.errors import UserError
from wings_jax.inference import flags as flags_lib
from wings_jax.inference import jobs
from wings_jax.inference.prompts import Request
from wings_jax.inference.sampling import SamplingParams


def parse() -> argparse.Namespace:
    """Returns the flags; raises UserError where they do not go together."""
    parser = argparse.ArgumentParser(
        prog="wings_jax.generate", description="Answers about images and text."
    )
    parser.add_argument("--prompt", metavar="TEXT", help="'-' reads standard input")
    parser.add_argument("--image", action="append", default=[], metavar="FILE")
    parser.add_argument("--input", type=pathlib.Path, metavar="FILE.jsonl")
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE.jsonl")
    parser.add_argument("--images", type=pathlib.Path, metavar="DIR", help="of --input's images")
    parser.add_argument("--batch-size", type=int, default=16, help="default: %(default)s")
    flags_lib.add_flags(parser)
    flags = parser.parse_args()
    if (flags.prompt is None) == (flags.input is None):
        raise UserError("give either --prompt or --input")
    if (flags.input is None) != (flags.output is None):
        raise UserError("--input and --output go together")
    if flags.input and (flags.image or flags.system):
        raise UserError("--image and --system go with --prompt; a line of --input has its own")
    if flags.batch_size < 1:
        raise UserError(f"--batch-size: {flags.batch_size} is less than 1")
    return flags


def answer_one(flags: argparse.Namespace, sampling: SamplingParams) -> None:
    """Prints the answer to `--prompt` while it is written."""
    prompt = sys.stdin.read() if flags.prompt == "-" else flags.prompt
    if not prompt.strip():
        raise UserError("--prompt is empty")
    turns = [{"from": "system", "value": flags.system}] if flags.system else []
    turns.append({"from": "human", "value": prompt})
    generator = flags_lib.open_generator(flags, rows=1)
    request = Request(turns, flags.image)
    if sampling.logprobs:
        answer = generator.generate([request])[0]
        print(answer.text)
        for token, logprob in zip(answer.tokens, answer.logprobs, strict=True):
            print(f"{logprob:9.4f}  {generator.reader.text([token])!r}")
        return
    for piece in generator.stream(request):
        print(piece, end="", flush=True)
    print()


def answer_file(flags: argparse.Namespace, sampling: SamplingParams) -> int:
    """Answers the lines of `--input`; returns how many could not be answered."""
    folder = flags.images or flags.input.parent
    lines = jobs.read_requests(flags.input, folder, sampling)
    where = checkpoint.find_step(flags.checkpoint, flag="--checkpoint")
    job: dict[str, Any] = {
        "input": flags.input.read_text(encoding="utf-8"),
        "images": str(folder),
        "checkpoint": str(where),
        "dtype": flags.dtype,
        "sampling": dataclasses.asdict(sampling),
    }
    journal = jobs.Journal(flags.output, job)
    known = len(journal.answers)
    if known:
        print(f"going on: {known} of {len(lines)} lines have their answers", file=sys.stderr)
    try:
        generator = flags_lib.open_generator(flags, rows=flags.batch_size)
        with tqdm.tqdm(total=len(lines), initial=known, desc="answers", disable=None) as bar:
            for _ in jobs.run(generator, lines, journal):
                bar.update()
        journal.finish()
    finally:
        journal.close()
    failed = [answer for answer in journal.answers.values() if "error" in answer]
    for answer in failed[:5]:
        print(f"wings_jax.generate: {answer['error']}", file=sys.stderr)
    print(f"{len(lines) - len(failed)} of {len(lines)} answered: {flags.output}")
    return len(failed)


def main() -> None:
    """Answers what the flags say."""
    flags = parse()
    sampling = flags_lib.sampling_of(flags)
    if flags.input is None:
        answer_one(flags, sampling)
    elif answer_file(flags, sampling):
        sys.exit(1)


if __name__ == "__main__":
    cli.run_main("wings_jax.generate", main)
