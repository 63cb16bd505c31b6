"""Carries weights from PyTorch to a checkpoint of ours and back.

    python -m wings_jax.convert import --llm DIR|HUB_ID [--vision DIR|HUB_ID] --out DIR
    python -m wings_jax.convert import --wings DIR|HUB_ID --out DIR
    python -m wings_jax.convert import --gguf FILE [--vision DIR|HUB_ID] --out DIR
    python -m wings_jax.convert export --checkpoint DIR --format wings|llm --out DIR
    python -m wings_jax.convert inspect DIR|FILE

`--dry-run` says what would happen and writes nothing. docs/fidelity.md tells what was compared.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import tqdm
import transformers

from wings_jax import axes, checkpoint, cli, tree
from wings_jax import config as config_lib
from wings_jax.data import conversation
from wings_jax.errors import UserError
from wings_jax.model import presets
from wings_jax.weights import exports, hf, imports, inspection, rules

DTYPES = {
    "stored": None,
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
VOCABULARIES = ("tokenizer.model", "vocab.json")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def main() -> None:
    """Does what the command line says."""
    arguments = parser().parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns of files it does not need
    {"import": run_import, "export": run_export, "inspect": run_inspect}[arguments.command](
        arguments
    )


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    top = argparse.ArgumentParser(prog="python -m wings_jax.convert", description=__doc__)
    top.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = top.add_subparsers(dest="command", required=True)
    into = commands.add_parser("import", help="from PyTorch to a checkpoint of ours")
    source = into.add_mutually_exclusive_group(required=True)
    source.add_argument("--llm", help="directory or hub id of a Qwen2 or Llama")
    source.add_argument("--wings", help="directory or hub id in the release's layout")
    source.add_argument("--gguf", help="GGUF file of a Qwen2 or Llama")
    into.add_argument("--vision", help="directory or hub id of a SigLIP or CLIP")
    into.add_argument("--projector", help="mm_projector.bin of LLaVA")
    into.add_argument("--projector-kind", default="mlp2x_gelu", help="default: %(default)s")
    into.add_argument("--tokenizer", help="directory of another tokenizer than the LLM's")
    into.add_argument("--template", help="conversation template; default: by the tokenizer")
    into.add_argument("--dtype", choices=DTYPES, default="stored", help="default: as stored")
    into.add_argument("--mesh", default="", help="e.g. fsdp=4,tensor=2: load onto many devices")
    out = commands.add_parser("export", help="from a checkpoint of ours to PyTorch")
    out.add_argument("--checkpoint", required=True, help="workdir or checkpoint")
    out.add_argument("--format", choices=("wings", "llm"), required=True)
    out.add_argument("--dtype", choices=DTYPES, help="default: as stored, bfloat16 if mixed")
    out.add_argument("--merge-lora", action="store_true", help="add LoRA into the LLM's weights")
    out.add_argument("--shard-gb", type=float, default=5.0, help="most GB a file; default 5")
    for command in (into, out):
        command.add_argument("--out", help="directory to make")
        command.add_argument("--dry-run", action="store_true", help="say what would happen")
    look = commands.add_parser("inspect", help="say what a directory or file of weights is")
    look.add_argument("path")
    look.add_argument("--vision", help="directory or hub id of the tower, where needed")
    for command in (into, out, look):
        command.add_argument("--debug", action="store_true", help="show a mistake's traceback")
    return top


def run_import(arguments: argparse.Namespace) -> None:
    """Imports, checks and writes a checkpoint."""
    made = open_sources(arguments)
    mesh = read_mesh(arguments.mesh)
    steps, fresh = imports.plan_parts(made, dtype=DTYPES[arguments.dtype], mesh=mesh)
    for line in inspection.fit_lines(made, steps, fresh):
        print(line)
    files = tokenizer_files(made, arguments.tokenizer)
    config = import_config(made, files, arguments.template)
    if arguments.dry_run:
        print("dry run: nothing written")
        return
    out = required_out(arguments)
    began = time.monotonic()
    with files.new_directory(out, need_bytes=imports.nbytes(steps)) as passing:
        with progress("reading", imports.nbytes(steps)) as advance:
            flat = imports.load_parts(steps, advance)
        checkpoint.write_checkpoint(
            passing, flat, config, made.arch, files, hf_config=made.hf_config
        )
    size = sum(array.nbytes for array in flat.values())
    seconds = time.monotonic() - began
    print(f"{out}: {tree.count(flat):,} parameters, {size / 1e9:.2f} GB, in {seconds:.0f} s")


def open_sources(arguments: argparse.Namespace) -> imports.ImportSpec:
    """Returns the import that the flags describe."""
    vision = arguments.vision and fetch(arguments.vision, "--vision")
    if arguments.wings:
        if arguments.projector:
            raise UserError("--projector: a checkpoint given with --wings brings its own")
        return imports.from_release(fetch(arguments.wings, "--wings"), vision)
    if arguments.projector and not vision:
        raise UserError("--projector: needs the tower that it reads, --vision DIR")
    named = {"projector": arguments.projector, "projector_kind": arguments.projector_kind}
    if arguments.gguf:
        return imports.from_gguf(arguments.gguf, vision, **named)
    return imports.from_llm(fetch(arguments.llm, "--llm"), vision, **named)


def fetch(name: str, flag: str) -> pathlib.Path:
    """Returns the directory `name`, fetched first if it is the id of a repository on the hub."""
    path = pathlib.Path(name)
    if path.exists() or not HUB_ID.fullmatch(name):
        if not path.is_dir():
            raise UserError(f"{flag}: {name} is not a directory")
        return path
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{flag}: {name} is no directory, and the hub says: {reason}") from error


def read_mesh(text: str) -> jax.sharding.Mesh:
    """Returns the mesh of `fsdp=4,tensor=2`; this host's memory for ''."""
    if not text:
        return axes.make_mesh({}, jax.local_devices(backend="cpu")[:1])
    return axes.make_mesh(axes.parse_mesh(text))


def tokenizer_files(made: imports.ImportSpec, other: str | None) -> dict[str, str]:
    """Returns the tokenizer's files, name -> content, checked against the LLM's vocabulary."""
    source = pathlib.Path(other) if other else made.tokenizer
    if source is None:
        files = dict(made.files)
    elif (source / "tokenizer.json").is_file():
        files = text_files(source)
    else:
        files = converted_tokenizer(source)
    size, rows = len(checkpoint.open_tokenizer(files)), made.arch.decoder.vocab_size
    if size > rows:
        raise UserError(f"the tokenizer of {source} has {size} tokens, the LLM's embedding {rows}")
    return files


def text_files(directory: pathlib.Path) -> dict[str, str]:
    """Returns the tokenizer's files in a directory that are text, name -> content."""
    here = [directory / name for name in hf.TOKENIZER_FILES]
    return {
        file.name: file.read_text(encoding="utf-8")
        for file in here
        if file.is_file() and file.suffix in (".json", ".txt", ".jinja")
    }


def converted_tokenizer(directory: pathlib.Path) -> dict[str, str]:
    """Returns the files of a tokenizer that is kept in another form, such as Vicuna's."""
    if not any((directory / name).is_file() for name in VOCABULARIES):
        raise UserError(f"{directory} has no tokenizer; give one with --tokenizer DIR")
    try:
        found = transformers.AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{directory} has no tokenizer.json, and its tokenizer cannot be converted ({reason}); "
            "give one with --tokenizer DIR"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        found.save_pretrained(folder)
        return text_files(pathlib.Path(folder))


def import_config(
    made: imports.ImportSpec, files: Mapping[str, str], template: str | None
) -> config_lib.Config:
    """Returns the config that travels with an imported checkpoint."""
    if template is None:
        template = conversation.get_template_for(checkpoint.open_tokenizer(files))
    conversation.get_template(template)
    arch = made.arch
    model = config_lib.ModelConfig(
        llm=preset_name(presets.DECODERS, arch.decoder) or made.parts[0].source,
        vision=preset_name(presets.VISION, arch.vision) or made.parts[-1].source,
        projector=arch.projector,
        learners=arch.learners,
        router=arch.router,
        rank=arch.rank,
        gain=arch.gain,
        semantics="paper" if arch.semantics == presets.PAPER else "release",
        prompt_length=arch.semantics.prompt_length or config_lib.ModelConfig.prompt_length,
        router_positions=arch.router_positions,
    )
    return config_lib.Config(
        stage="import", model=model, data=config_lib.DataConfig(template=template)
    )


def preset_name(known: Mapping[str, Any], arch: Any) -> str:
    """Returns the name of a preset equal to `arch`, or ''."""
    return next((name for name, preset in known.items() if preset == arch), "")


def run_export(arguments: argparse.Namespace) -> None:
    """Writes a checkpoint in a foreign layout."""
    step = checkpoint.find_step(arguments.checkpoint, flag="--checkpoint")
    _, arch, _ = checkpoint.read_meta(step)
    kept = checkpoint.read_hf_config(step)
    flat = read_params(step)
    if arguments.merge_lora:
        flat = exports.merge_lora(flat, arch)
    dtype = DTYPES[arguments.dtype] if arguments.dtype else exports.common_dtype(flat)
    if arguments.format == "llm":
        tensors, left = exports.as_llm(flat, arch, dtype=dtype)
        config = {**kept, **hf.llm_config(arch.decoder)}
        groups = {rules.group_keys(path) for path in left}
        print(f"left out: {rules.format_keys(groups)}" if groups else "nothing is left out")
    else:
        tensors = exports.as_release(flat, arch, dtype=dtype)
        config = exports.release_config(arch, kept)
        if arch.learners and arch.semantics == presets.PAPER:
            print("note: trained with the paper's semantics; the release's code computes its own")
    size = sum(tensor.nbytes for tensor in tensors.values())
    kinds = ", ".join(sorted({tensor.dtype.name for tensor in tensors.values()}))
    print(f"{step}: {len(tensors)} tensors, {kinds}, {size / 1e9:.2f} GB")
    if arguments.dry_run:
        print("dry run: nothing written")
        return
    out = required_out(arguments)
    files = checkpoint.read_tokenizer_files(step)
    most = int(arguments.shard_gb * 1e9)
    with progress("writing", size) as advance:
        exports.write_export(out, tensors, config, files, max_bytes=most, on_write=advance)
    print(out)


def read_params(step: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns a checkpoint's parameters in this host's memory, whatever the accelerator."""
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    targets = {
        path: jax.ShapeDtypeStruct(meta.shape, meta.dtype, sharding=host)
        for path, meta in checkpoint.read_shapes(step).items()
    }
    return {path: np.asarray(a) for path, a in checkpoint.read_params(step, targets).items()}


def run_inspect(arguments: argparse.Namespace) -> None:
    """Prints what a path is."""
    step = checkpoint.newest_step(arguments.path)
    if step is None:
        path = pathlib.Path(arguments.path)
        path = path if path.is_file() else fetch(arguments.path, "inspect")
        vision = arguments.vision and fetch(arguments.vision, "--vision")
        print("\n".join(inspection.describe(path, vision)))
        return
    config, arch, number = checkpoint.read_meta(step)
    shapes = checkpoint.read_shapes(step)
    print(f"{step}: a checkpoint of ours, stage {config.stage!r}, step {number}")
    has_tower = any(path.startswith("vision/") for path in shapes)
    for line in inspection.arch_lines(arch, has_tower=has_tower):
        print(f"  {line}")
    group = {path: rules.group_keys(path) for path in shapes}
    dtype = {path: str(np.dtype(meta.dtype)) for path, meta in shapes.items()}
    print(tree.describe(shapes, {"group": group, "dtype": dtype}))
    for name, export in (("wings", exports.as_release), ("llm", exports.as_llm)):
        try:
            export(shapes, arch)
            print(f"  exports as {name}: yes")
        except UserError as error:
            print(f"  exports as {name}: no, {error}")


def required_out(arguments: argparse.Namespace) -> pathlib.Path:
    """Returns `--out`, which only a dry run can do without."""
    if not arguments.out:
        raise UserError("--out is missing")
    return pathlib.Path(arguments.out)


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[str, int], None]]:
    """Shows a bar over bytes; gives the function that moves it on."""
    with tqdm.tqdm(total=total, desc=what, unit="B", unit_scale=True, delay=1) as bar:
        yield lambda key, size: bar.update(size)


if __name__ == "__main__":
    cli.run_main("wings_jax.convert", main)
