"""Converts weights between PyTorch formats and wings_jax checkpoints.

    python -m wings_jax.convert import --llm DIR|HUB_ID [--vision DIR|HUB_ID] --out DIR
    python -m wings_jax.convert import --wings DIR|HUB_ID --out DIR
    python -m wings_jax.convert import --llava DIR|HUB_ID --out DIR
    python -m wings_jax.convert import --transformers DIR --out DIR
    python -m wings_jax.convert import --gguf FILE [--vision DIR|HUB_ID] --out DIR
    python -m wings_jax.convert import --llm DIR|HUB_ID --peft DIR|HUB_ID --out DIR
    python -m wings_jax.convert export --checkpoint DIR --format FORMAT --out DIR
    python -m wings_jax.convert export --checkpoint DIR --format adapter --out FILE.safetensors
    python -m wings_jax.convert export --checkpoint DIR --format peft --out DIR
    python -m wings_jax.convert push DIR|FILE --repo OWNER/NAME --checkpoint DIR
    python -m wings_jax.convert inspect [--verify] DIR|FILE

`--dry-run` prints what would happen and writes nothing. docs/fidelity.md lists what is tested.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from wings_jax import cli, process
from wings_jax.errors import UserError

DTYPES = ("stored", "float32", "bfloat16", "float16")
FORMATS = ("transformers", "wings", "llava", "llm", "adapter", "peft")
FORMATS_HELP = (
    "transformers: the whole model, with torch code that transformers runs; wings: the layout of "
    "the authors' release; llava: a model without learners, for the code that transformers has; "
    "llm: the LLM alone; adapter: what training added to a frozen LLM and tower, one file; peft: "
    "LoRA alone, for the peft package"
)


def main() -> None:
    """Runs the subcommand of the command line."""
    arguments = make_parser().parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns of files it does not need

    # After parsing: --help and mistakes in flags do not wait for these imports.
    if arguments.command in ("import", "export"):
        process.import_without_torch("transformers")
    from wings_jax.weights import commands, push

    run = {
        "import": commands.run_import,
        "export": commands.run_export,
        "push": push.run_push,
        "inspect": commands.run_inspect,
    }
    run[arguments.command](arguments)


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        prog=cli.program_name("wings_jax.convert"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    add_import(subparsers.add_parser("import", help="from PyTorch to a wings_jax checkpoint"))
    add_export(subparsers.add_parser("export", help="from a wings_jax checkpoint to PyTorch"))
    add_push(subparsers.add_parser("push", help="upload an export to the Hugging Face hub"))

    inspect = subparsers.add_parser("inspect", help="describe a directory or file of weights")
    inspect.add_argument("path")
    inspect.add_argument("--vision", help="directory or hub id of the tower, where needed")
    inspect.add_argument(
        "--verify", action="store_true", help="read a checkpoint and compare it with its checksums"
    )

    for command in subparsers.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_import(command: argparse.ArgumentParser) -> None:
    """Adds the flags of `import`."""
    # Exactly one source of an LLM or of a whole model.
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--llm", help="directory or hub id of a Qwen2 or Llama")
    source.add_argument("--wings", help="directory or hub id in the release's layout")
    source.add_argument("--llava", help="directory or hub id of a llava-hf model (LLaVA 1.5)")
    source.add_argument("--transformers", help="directory of `export --format transformers`")
    source.add_argument("--gguf", help="GGUF file of a Qwen2 or Llama")

    # Parts beside the source: the tower, LoRA to merge, the projector, the tokenizer.
    command.add_argument("--vision", help="directory or hub id of a SigLIP or CLIP")
    command.add_argument("--peft", help="directory or hub id of a PEFT LoRA, merged into --llm")
    command.add_argument("--projector", help="mm_projector.bin of LLaVA")
    command.add_argument("--projector-kind", default="mlp2x_gelu", help="default: %(default)s")
    command.add_argument("--tokenizer", help="directory of a tokenizer; default: the LLM's")

    # How the model is computed and how conversations are written, which weights do not show.
    command.add_argument(
        "--semantics",
        choices=("", "paper", "release"),
        default="",
        help="how the learners of --wings are computed; default: as the checkpoint was trained",
    )
    command.add_argument(
        "--template",
        help="chatml, qwen3, qwen3_no_think, llama3, mistral, vicuna, tokenizer (its chat "
        "template) or a Jinja file; "
        "default: what equals the tokenizer's chat template",
    )

    # How parameters are stored, and where they are loaded.
    command.add_argument("--dtype", choices=DTYPES, default="stored", help="default: as stored")
    command.add_argument("--mesh", default="", help="e.g. fsdp=4,tensor=2: load onto many devices")
    add_output(command)


def add_export(command: argparse.ArgumentParser) -> None:
    """Adds the flags of `export`."""
    command.add_argument("--checkpoint", required=True, help="workdir or checkpoint")
    command.add_argument("--format", choices=FORMATS, required=True, help=FORMATS_HELP)

    # How the export is stored.
    command.add_argument("--dtype", choices=DTYPES, help="default: as stored, bfloat16 if mixed")
    command.add_argument("--merge-lora", action="store_true", help="add LoRA to the LLM's weights")
    command.add_argument("--shard-gb", type=float, default=5.0, help="most GB a file; default 5")

    command.add_argument(
        "--base",
        help="adapter: compare the LLM and the tower with this checkpoint's, instead of relying on "
        "the recorded learning rates",
    )
    add_output(command)


def add_push(command: argparse.ArgumentParser) -> None:
    """Adds the flags of `push`."""
    command.add_argument("path", metavar="EXPORT", help="directory of an export, or an adapter")
    command.add_argument("--repo", required=True, metavar="OWNER/NAME", help="created if missing")
    command.add_argument(
        "--checkpoint", required=True, help="what was exported: the model card is generated from it"
    )
    command.add_argument("--private", action="store_true", help="create the repository as private")
    command.add_argument("--message", default="", help="of the commit")
    command.add_argument("--dry-run", action="store_true", help="print the model card, no upload")


def add_output(command: argparse.ArgumentParser) -> None:
    """Adds the flags of a command that writes a directory."""
    command.add_argument("--out", help="directory to create (adapter: file)")
    command.add_argument("--dry-run", action="store_true", help="print what would happen")


def import_model(*, out: str | os.PathLike, **flags: Any) -> pathlib.Path:
    """Imports weights as `wings convert import` does, and returns the directory `out`.

        wings_jax.convert.import_model(llm="Qwen1.5-7B-Chat", vision="siglip", out="base")

    Args:
      flags: the command's flags, with _ for - (`projector_kind="mlp2x_gelu"`).

    Raises:
      UserError: a flag is unknown or missing, or weights cannot be read.
    """
    _run("import", {**flags, "out": out})
    return pathlib.Path(out)


def export_model(*, out: str | os.PathLike, **flags: Any) -> pathlib.Path:
    """Exports a checkpoint as `wings convert export` does, and returns the directory `out`.

        wings_jax.convert.export_model(checkpoint="runs/stage2", format="wings", out="export")

    Args:
      flags: the command's flags, with _ for - (`shard_gb=2, merge_lora=True`).

    Raises:
      UserError: a flag is unknown or missing, or the checkpoint cannot be exported.
    """
    _run("export", {**flags, "out": out})
    return pathlib.Path(out)


def _run(command: str, flags: Mapping[str, Any]) -> None:
    """Runs a subcommand with flags given as a mapping; None and False leave a flag out."""
    # The flags of a call from Python are checked by the parser of the command line.
    words = [command]
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words.append(f"{flag}={os.fspath(value) if isinstance(value, os.PathLike) else value}")

    # argparse prints its message and exits; a caller from Python gets it as an error.
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            arguments = make_parser().parse_args(words)
    except SystemExit as error:
        raise UserError(message.getvalue().strip().rpartition("error: ")[2]) from error

    # As in `main`: mistakes in flags do not wait for these imports.
    from wings_jax.weights import commands

    {"import": commands.run_import, "export": commands.run_export}[command](arguments)


if __name__ == "__main__":
    cli.run_main("python -m wings_jax.convert", main)
