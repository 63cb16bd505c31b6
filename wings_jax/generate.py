"""Answers one request, or a file of them.

    wings generate --checkpoint runs/stage2 --prompt "What is red?" --image scene.png
    wings generate --checkpoint runs/stage2 --input requests.jsonl --output answers.jsonl
    echo "Is 4 even?" | wings generate --checkpoint runs/stage2 --prompt -

    wings generate --checkpoint base --adapter scenes.safetensors --prompt "What is red?"

A single answer is printed while it is generated.

A line of an input file has a "prompt", or "conversations" for several turns:

    {"id": 1, "prompt": "What is red?", "images": ["scene.png"]}
    {"id": 2, "conversations": [{"from": "human", "value": "Is 4 even?"}],
     "sampling": {"max_new_tokens": 20}}                            (on one line)

Relative image paths start from the file's directory, or from --images. A job that was interrupted
resumes when the same command is given again. --shard I/N answers part I of N on one of several
machines with a common directory of the output; the same command without it writes the output.
--distributed shares one model among the devices of several machines instead: the same command on
each, with the same files.

In a question with images, <image> stands for an image; without it the images come first. In a
question without images <image> is text.

Exit status: 0 if everything was answered, 1 if some lines could not be (their answers have an
"error"), 2 for a mistake in the command, 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wings_jax import cli, hosts, process
from wings_jax.errors import UserError
from wings_jax.inference import flags as flags_lib
from wings_jax.inference.sampling import SamplingParams

if TYPE_CHECKING:
    from wings_jax.inference import jobs

MODULE = "wings_jax.generate"


def parse_flags() -> argparse.Namespace:
    """Returns the arguments. Raises UserError if they do not fit together."""
    parser = argparse.ArgumentParser(
        prog=cli.program_name(MODULE),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one = parser.add_argument_group("one request")
    one.add_argument("--prompt", metavar="TEXT", help="the question; '-' reads standard input")
    one.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="may be given several times"
    )

    many = parser.add_argument_group("a file of requests")
    many.add_argument("--input", type=pathlib.Path, metavar="FILE.jsonl")
    many.add_argument("--output", type=pathlib.Path, metavar="FILE.jsonl")
    many.add_argument(
        "--images", type=pathlib.Path, metavar="DIR", help="where relative image paths start from"
    )
    many.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="default: %(default)s"
    )
    many.add_argument(
        "--shard", metavar="I/N", help="answer part I of N, each part in a process of its own"
    )
    flags_lib.add_flags(parser)
    hosts.add_flags(parser)

    # What argparse does not check.
    arguments = parser.parse_args()
    if (arguments.prompt is None) == (arguments.input is None):
        raise UserError("give either --prompt or --input")
    if (arguments.input is None) != (arguments.output is None):
        raise UserError("--input and --output go together")
    if arguments.input and (arguments.image or arguments.system):
        raise UserError("--image and --system go with --prompt; a line of --input has its own")
    if arguments.shard and not arguments.input:
        raise UserError("--shard goes with --input and --output")
    if arguments.shard and hosts.read_flags(arguments):
        raise UserError("--shard: each part is computed by itself, without --distributed")
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size: {arguments.batch_size} is less than 1")
    return arguments


def answer_one(arguments: argparse.Namespace, sampling: SamplingParams) -> None:
    """Prints the answer to `--prompt` while it is generated."""
    from wings_jax import distributed  # slow to import, and --help needs none of it
    from wings_jax.inference import prompts

    prompt = arguments.prompt
    if prompt == "-":
        prompt = distributed.share(sys.stdin.read() if distributed.is_first() else "")
    if not prompt.strip():
        raise UserError("--prompt is empty")
    prompts.check_unicode(prompt, "--prompt")
    prompts.check_unicode(arguments.system, "--system")

    # Without --system the template's own system text is used.
    turns = [{"from": "system", "value": arguments.system}] if arguments.system else []
    turns.append({"from": "human", "value": prompt})
    request = prompts.Request(turns, arguments.image)
    generator = flags_lib.open_generator(arguments, rows=1)

    # Log-probabilities are printed token by token, after the whole answer.
    if sampling.logprobs:
        answer = generator.generate(request)
        print(answer.text)
        for token, logprob in zip(answer.tokens, answer.logprobs or (), strict=True):
            print(f"{logprob:9.4f}  {generator.processor.decode([token])!r}")
        return

    try:
        for piece in generator.stream(request):
            print(piece, end="", flush=True)
    finally:  # after Ctrl-C too, so that its message begins a line
        print()


def answer_file(
    arguments: argparse.Namespace, sampling: SamplingParams, output: pathlib.Path
) -> int:
    """Answers the lines of `--input`; returns how many could not be answered.

    Args:
      output: `--output`, or where this process writes instead.
    """
    import tqdm

    from wings_jax import distributed
    from wings_jax.inference import jobs, shards

    shard = shards.parse_shard(arguments.shard) if arguments.shard else shards.WHOLE

    # Every line is parsed before the model is loaded.
    with distributed.together():
        lines, job = read_job(arguments, sampling)
    lines = [line for index, line in enumerate(lines) if shard.has_piece(index)]
    distributed.check_same([job, arguments.batch_size, arguments.mesh], "flags or another --input")

    with distributed.together():
        journal, parts = jobs.open_journals(output, job, shard)
    # The first process of a job has them; all have to answer the same lines.
    journal.answers = dict(distributed.share(list(journal.answers.items())))
    finished = len(journal.answers)
    if finished:
        print(f"resuming: {finished} of {len(lines)} lines are answered", file=sys.stderr)

    # An answer is in the journal as soon as it is there, so that Ctrl-C loses none.
    try:
        generator = flags_lib.open_generator(arguments, rows=arguments.batch_size)
        bar = tqdm.tqdm(total=len(lines), initial=finished, desc="answers", disable=None)
        interrupt = cli.InterruptFlag()
        # One of several processes cannot stop by itself between two programs.
        guard = interrupt if distributed.is_alone() else contextlib.nullcontext()
        with bar, guard:
            for _ in jobs.run(generator, lines, journal):
                bar.update()
                if interrupt.is_set:
                    raise KeyboardInterrupt
        if shard.count > 1:
            print(
                f"part {shard.index} of {shard.count} is done; when all are, the same command "
                f"without --shard writes {arguments.output}"
            )
            return _print_failed(journal.answers, len(lines))

        journal.finish()
        for part in parts:
            part.remove()
    except KeyboardInterrupt:
        answered = f"{len(journal.answers)} of {len(lines)} lines are answered"
        raise KeyboardInterrupt(f"{answered}; the same command resumes") from None
    finally:
        for opened in (journal, *parts):
            opened.close()
    return _print_failed(journal.answers, len(lines), f": {arguments.output}")


def read_job(
    arguments: argparse.Namespace, sampling: SamplingParams
) -> tuple[list[jobs.Line], dict[str, Any]]:
    """Returns the lines of `--input`, and everything that their answers depend on.

    Another job does not resume the journal of this one.

    Raises:
      UserError: the input is unreadable or empty, or the checkpoint does not exist.
    """
    from wings_jax import checkpoint
    from wings_jax.inference import jobs

    image_root = arguments.images or arguments.input.parent
    lines = jobs.read_requests(arguments.input, image_root, sampling)
    step = checkpoint.find_step(arguments.checkpoint, flag="--checkpoint")

    job: dict[str, Any] = {
        "input": jobs.read_input(arguments.input).decode(errors="surrogateescape"),
        "images": str(image_root),
        "checkpoint": str(step),
        "dtype": arguments.dtype,
        "sampling": dataclasses.asdict(sampling),
    }
    if arguments.adapter:
        job["adapter"] = str(pathlib.Path(arguments.adapter).absolute())
    return lines, job


def _print_failed(answers: Mapping[int, Mapping[str, Any]], lines: int, where: str = "") -> int:
    """Prints how many lines were answered; returns how many could not be."""
    # The first few errors; all of them are in the output.
    failed = [answer for answer in answers.values() if "error" in answer]
    for answer in failed[:5]:
        print(f"{cli.program_name(MODULE)}: {answer['error']}", file=sys.stderr)
    print(f"{lines - len(failed)} of {lines} answered{where}")
    return len(failed)


def main() -> None:
    """Answers the request or the file of the command line."""
    arguments = parse_flags()
    sampling = flags_lib.sampling_params(arguments)
    process.import_without_torch("transformers")
    from wings_jax import distributed  # slow to import, and --help needs none of it

    job = hosts.read_flags(arguments)
    if job:
        cli.use_compilation_cache()
        process.run_in_caller_thread()
        distributed.join_job(job)
        arguments.mesh = arguments.mesh or distributed.MESH

    failed = 0
    with distributed.lost_hosts(), distributed.first_writes() as own_path:
        if arguments.input is None:
            distributed.check_flags(arguments)
            answer_one(arguments, sampling)
        else:
            failed = answer_file(arguments, sampling, own_path(arguments.output))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.run_main(cli.program_name(MODULE), main)
