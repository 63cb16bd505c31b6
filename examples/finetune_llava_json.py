"""Fine-tunes Wings on your own data in LLaVA's JSON format, then asks the model about an image.

    python examples/finetune_llava_json.py my_data.json --images my_images/ --out runs/mine

A record of `my_data.json`, which is a list of such records (or JSON lines):

    {"id": "1", "image": "cat.png", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"},
        {"from": "gpt", "value": "A cat."}]}

The default preset is `tiny`: it runs on a laptop, and nothing is downloaded. For a real model,
convert its weights first, and give its preset and the directory of the converted weights:

    python -m wings_jax.convert import --llm Qwen/Qwen1.5-7B-Chat \\
        --vision google/siglip-so400m-patch14-384 --out runs/base_7b
    python examples/finetune_llava_json.py my_data.json --images my_images/ --out runs/mine \\
        --preset qwen1_5_7b --init-from runs/base_7b

Stage 1 trains the projector and the visual learners, stage 2 also the LLM, the textual learners
and the router. Every step is a command that you can run and change by itself; the script prints
each one. A second run continues where the first one stopped.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import subprocess
import sys

import wings_jax
from wings_jax.data import samples, sources

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run_command(module: str, *arguments: object, allow_failure: bool = False) -> None:
    """Runs `python -m MODULE ARGUMENTS` in the repository; ends the script if it fails."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    print("$", shlex.join(["python", *command[1:]]), flush=True)
    status = subprocess.run(command, check=False).returncode
    if status and not allow_failure:
        sys.exit(status)


def train_stage(stage: str, flags: argparse.Namespace, init_from: str) -> pathlib.Path:
    """Trains one stage on the user's records and returns its work directory."""
    workdir = flags.out / stage
    images = (flags.images or flags.data.parent).resolve()
    overrides = {
        "init_from": init_from,
        "steps": flags.steps,
        "batch_size": flags.batch_size,
        "data.sequence_length": flags.sequence_length,
        # Bad records have been reported by then; --skip-bad accepts any number of them.
        "data.max_bad_share": 1.0 if flags.skip_bad else 0.0,
    }
    arguments = [f"--config.{key}={value}" for key, value in overrides.items()]
    config = f"--config={ROOT}/configs/{stage}.py:{flags.preset}"
    data = f"--data=mine={flags.data.resolve()}:{images}"
    run_command("wings_jax.train", config, data, *arguments, f"--workdir={workdir}")
    return workdir


def first_example(flags: argparse.Namespace) -> samples.Sample:
    """Returns the first record without errors that has an image."""
    source = sources.open_source(flags.data, images=flags.images)
    for index in range(len(source)):
        try:
            example = source[index]
        except samples.BadSample:
            continue
        if example.images:
            return example
    sys.exit(f"{flags.data}: no record has an image")


def parse_flags() -> argparse.Namespace:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    add = parser.add_argument
    add("data", type=pathlib.Path, help="your records: LLaVA JSON or JSON lines")
    add("--images", type=pathlib.Path, help="directory of the images; default: that of the data")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/finetuned"), help="%(default)s")
    add("--preset", default="tiny", help="preset of configs/base.py; %(default)s")
    add("--init-from", default="", help="converted weights or a checkpoint to start from")
    add("--steps", type=int, default=100, help="optimizer steps of each stage; %(default)s")
    add("--batch-size", type=int, default=8, help="%(default)s")
    add("--sequence-length", type=int, default=512, help="slots of a sample; %(default)s")
    add("--skip-bad", action="store_true", help="train without the records that have errors")
    add("--question", help="asked at the end; default: the first question of the data")
    return parser.parse_args()


def main() -> None:
    """Checks the data, trains both stages, and answers a question."""
    flags = parse_flags()

    # A mistake in the data costs seconds here, hours later.
    images = ["--images", flags.images] if flags.images else []
    run_command("wings_jax.data.check", flags.data, *images, allow_failure=flags.skip_bad)

    stage1 = train_stage("stage1", flags, init_from=flags.init_from)
    stage2 = train_stage("stage2", flags, init_from=str(stage1))

    example = first_example(flags)
    question = flags.question or example.conversations[0]["value"].replace("<image>", "").strip()
    model = wings_jax.load(stage2)
    print("question:", question)
    print("answer:  ", model.generate(question, images=example.images))


if __name__ == "__main__":
    main()
