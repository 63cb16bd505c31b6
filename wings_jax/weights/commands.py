"""What `python -m wings_jax.convert` runs: an import, an export, an inspection."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from wings_jax import axes, checkpoint, files, tree
from wings_jax import config as config_lib
from wings_jax.data import chat_template
from wings_jax.errors import UserError
from wings_jax.model import presets
from wings_jax.weights import (
    adapter_commands,
    adapter_export,
    export_formats,
    exports,
    hub,
    imports,
    inspection,
    llava,
    llava_export,
    model_card,
    peft,
    release_import,
    sources,
    stored_params,
    tokenizer_files,
    transformers_format,
)
from wings_jax.weights import command_output as output_lib
from wings_jax.weights.rules import group_name
from wings_jax.weights.tensors import WeightsError

# Export format -> what plans its tensors, and raises an error for a model that it cannot hold.
EXPORTS: Mapping[str, Callable[..., Any]] = {
    "transformers": transformers_format.as_transformers,
    "wings": exports.as_release,
    "llava": llava_export.as_llava,
    "llm": exports.as_llm,
    "adapter": adapter_export.as_adapter,
    "peft": peft.as_peft,
}


def run_import(arguments: argparse.Namespace) -> None:
    """Plans and prints an import; without --dry-run writes the checkpoint."""
    # The plan compares keys and shapes; it reads no tensor.
    spec = open_sources(arguments)
    mesh = parse_mesh(arguments.mesh)
    steps, unfilled_paths = imports.plan_parts(
        spec, dtype=output_lib.DTYPES[arguments.dtype], mesh=mesh
    )
    for line in inspection.plan_lines(spec, steps, unfilled_paths):
        print(line)

    # Before any tensor is read: the tokenizer and the template have to fit.
    tokenizer = read_tokenizer(spec, arguments.tokenizer)
    template = arguments.template
    if template and template not in chat_template.NAMES:
        tokenizer = chat_template.with_template_file(tokenizer, pathlib.Path(template))
        template = chat_template.TOKENIZER
    config = import_config(spec, tokenizer, template)
    if arguments.dry_run:
        print("dry run: nothing written")
        return

    # Stream the tensors, then write the checkpoint; the directory appears when complete.
    output = output_lib.require_output(arguments)
    start_time = time.monotonic()
    with files.new_directory(output, need_bytes=imports.bytes_to_read(steps)) as temporary:
        with output_lib.progress("reading", imports.bytes_to_read(steps)) as on_read:
            params = imports.load_parts(steps, on_read)
        # The model card names what each part of the weights came from.
        named = [*((part.name, part.source) for part in spec.parts)]
        named += [("LoRA", directory) for directory in spec.merged]
        checkpoint.write_checkpoint(
            temporary,
            params,
            config,
            spec.arch,
            tokenizer,
            hf_config=spec.hf_config,
            sources=[
                dataclasses.asdict(model_card.describe_source(part, source))
                for part, source in named
            ],
        )

    # What was written, for the user.
    size = sum(array.nbytes for array in params.values())
    seconds = time.monotonic() - start_time
    print(f"{output}: {tree.count(params):,} parameters, {size / 1e9:.2f} GB, in {seconds:.0f} s")


def open_sources(arguments: argparse.Namespace) -> imports.ImportSpec:
    """Returns the import that the flags describe."""
    vision = arguments.vision and hub.find_directory(arguments.vision, "--vision")
    if arguments.peft and not arguments.llm:
        raise UserError("--peft: goes with --llm, the LLM that the adapter is merged into")

    # A Wings checkpoint holds everything but perhaps the tower.
    if arguments.wings:
        if arguments.projector:
            raise UserError("--projector: the checkpoint given with --wings has its own projector")
        directory = hub.find_directory(arguments.wings, "--wings")
        return release_import.from_release(directory, vision, semantics=arguments.semantics)

    # A LLaVA and an export are whole models.
    if arguments.llava:
        if arguments.vision or arguments.projector:
            flag = "--vision" if arguments.vision else "--projector"
            raise UserError(f"{flag}: the LLaVA given with --llava has its own")
        return llava.from_llava(hub.find_directory(arguments.llava, "--llava"))
    if arguments.transformers:
        return transformers_format.from_transformers(arguments.transformers)

    # An LLM with its own tower and projector.
    if arguments.semantics:
        raise UserError("--semantics: only for --wings; a base LLM has no learners")
    if arguments.projector and not vision:
        raise UserError("--projector: needs the tower whose features it takes, --vision DIR")
    projector = {"projector": arguments.projector, "projector_kind": arguments.projector_kind}
    if arguments.gguf:
        has_tokenizer = arguments.tokenizer is not None
        return sources.from_gguf(
            arguments.gguf, vision, with_tokenizer=not has_tokenizer, **projector
        )

    llm, lora = find_llm(arguments.llm, arguments.peft)
    return sources.from_llm(llm, vision, lora=lora, **projector)


def find_llm(name: str, lora: str | None) -> tuple[pathlib.Path, pathlib.Path | None]:
    """Returns the directories of an LLM and of the PEFT adapter that is merged into it.

    Where `--llm` names an adapter, the LLM is the one that its config names.
    """
    llm = hub.find_directory(name, "--llm")
    if lora is not None:
        return llm, hub.find_directory(lora, "--peft")
    if not peft.is_peft(llm):
        return llm, None

    # The adapter was given as --llm: its config names the LLM.
    base = peft.open_peft(llm).base
    if not base:
        raise UserError(
            f"--llm: {name} is a PEFT adapter that does not name its base: give the base as --llm "
            f"and {name} as --peft"
        )
    return hub.find_directory(base, f"--llm: {name} is a PEFT adapter; its base"), llm


def parse_mesh(text: str) -> jax.sharding.Mesh:
    """Returns the mesh of `fsdp=4,tensor=2`; this host's memory for ''."""
    if not text:
        return axes.make_mesh({}, jax.local_devices(backend="cpu")[:1])
    return axes.make_mesh(axes.parse_mesh(text))


def read_tokenizer(spec: imports.ImportSpec, directory: str | None) -> dict[str, str]:
    """Returns the tokenizer's files, name -> content, checked against the LLM's vocabulary.

    They are those of `directory`, or of the import's sources.
    """
    # A directory that the user gives has precedence over the source's own files.
    path = directory or spec.tokenizer_directory
    if path is None:
        text_files = dict(spec.tokenizer_files)
    else:
        text_files = tokenizer_files.read_tokenizer_files(path, flag="--tokenizer")

    # An embedding may have spare rows, but not too few.
    tokens = tokenizer_files.count_tokens(text_files, str(path or spec.parts[0].source))
    rows = spec.arch.decoder.vocab_size
    if tokens > rows:
        name = path or spec.parts[0].source
        raise UserError(f"the tokenizer of {name} has {tokens} tokens, the LLM's embedding {rows}")
    return text_files


def import_config(
    spec: imports.ImportSpec, tokenizer: Mapping[str, str], template: str | None
) -> config_lib.Config:
    """Returns the config of an imported checkpoint."""
    opened = checkpoint.open_tokenizer(tokenizer)
    if template is None:
        # A Wings checkpoint was trained with its own template, whatever its tokenizer has.
        is_trained = bool(spec.arch.learners)
        template, line = chat_template.choose_template(opened, prefer_named=is_trained)
    else:
        line = chat_template.explain_template(template, opened)
    print(line)

    # Presets are named; other models by their source.
    arch = spec.arch
    model = config_lib.ModelConfig(
        llm=preset_name(presets.DECODERS, arch.decoder) or spec.parts[0].source,
        vision=preset_name(presets.VISION, arch.vision) or spec.parts[-1].source,
        projector=arch.projector,
        learners=arch.learners,
        router=arch.router,
        rank=arch.rank,
        learner_layers=arch.learner_layers or (),
        gain=arch.gain,
        semantics="paper" if arch.semantics == presets.PAPER else "release",
        prompt_length=arch.semantics.prompt_length or config_lib.ModelConfig.prompt_length,
        router_positions=arch.router_positions,
    )

    data = config_lib.DataConfig(template=template)
    return config_lib.Config(stage="import", model=model, data=data)


def preset_name(presets_by_name: Mapping[str, Any], arch: Any) -> str:
    """Returns the name of the preset that equals `arch`, or ''."""
    return next((name for name, preset in presets_by_name.items() if preset == arch), "")


def run_export(arguments: argparse.Namespace) -> None:
    """Writes a checkpoint in another format.

    Raises:
      UserError: the format cannot hold the model, naming those that can; or nothing can be written.
    """
    # After an error of this format, the message names the formats that would work.
    step = checkpoint.find_step(arguments.checkpoint, flag="--checkpoint")
    try:
        write_format(arguments, step)
    except WeightsError as error:
        problems = find_formats(step)
        others = [name for name in problems if not problems[name] and name != arguments.format]
        hint = f"; --format {' or '.join(others)} can hold the checkpoint" if others else ""
        raise WeightsError(f"--format {arguments.format}: {error}{hint}") from error


def write_format(arguments: argparse.Namespace, step: pathlib.Path) -> None:
    """Writes a step in the format of the flags."""
    params = stored_params.open_params(step)
    if arguments.base and arguments.format != "adapter":
        raise UserError("--base: only for --format adapter")
    # Adapters and LoRA are written by functions of their own, as one file.
    if arguments.format in adapter_commands.EXPORTS:
        adapter_commands.EXPORTS[arguments.format](arguments, step, params)
        return

    # The tensors are computed while they are written.
    tensors, config, text_files = export_formats.plan_format(arguments, step, params)
    size = sum(tensor.nbytes for tensor in tensors.values())
    dtypes = ", ".join(sorted({tensor.dtype.name for tensor in tensors.values()}))
    print(f"{step}: {len(tensors)} tensors, {dtypes}, {size / 1e9:.2f} GB")
    if arguments.dry_run:
        print("dry run: nothing written")
        return

    # The directory appears when all shards are written.
    output = output_lib.require_output(arguments)
    max_bytes = int(arguments.shard_gb * 1e9)
    with output_lib.progress("writing", size) as on_write:
        exports.write_export(
            output, tensors, config, text_files, max_bytes=max_bytes, on_write=on_write
        )
    print(output)


NO_CHECKSUMS = "  verified: everything can be read; a checkpoint of version 0.1.0 has no checksums"


def run_inspect(arguments: argparse.Namespace) -> None:
    """Prints what a file or directory is."""
    # A checkpoint of wings_jax is described by its own metadata, anything else by its files.
    step = checkpoint.newest_step(arguments.path)
    if step is not None:
        print("\n".join(checkpoint_lines(step)))
        if arguments.verify:
            count = checkpoint.verify_step(step)
            print(f"  verified: {count} arrays equal their checksums" if count else NO_CHECKSUMS)
        return
    if arguments.verify:
        raise UserError(f"--verify: {arguments.path} holds no checkpoint of wings_jax")

    path = pathlib.Path(arguments.path)
    if not path.is_file():
        path = hub.find_directory(arguments.path, "inspect")
    vision = arguments.vision and hub.find_directory(arguments.vision, "--vision")
    print("\n".join(inspection.describe(path, vision)))


def find_formats(step: pathlib.Path) -> dict[str, str]:
    """Returns export format -> why it cannot hold a checkpoint, '' where it can."""
    _, arch, _ = checkpoint.read_meta(step)
    shapes = checkpoint.read_shapes(step)

    problems = {}
    # Exporting shapes instead of arrays runs all checks of a format, and reads nothing.
    for name, export in EXPORTS.items():
        try:
            export(shapes, arch)
            if name == "adapter":
                adapter_export.check_recorded(step)
            problems[name] = ""
        except UserError as error:
            problems[name] = str(error)
    return problems


def checkpoint_lines(step: pathlib.Path) -> list[str]:
    """Returns the architecture, the parameters and the possible exports of a checkpoint."""
    config, arch, number = checkpoint.read_meta(step)
    shapes = checkpoint.read_shapes(step)
    has_tower = any(path.startswith("vision/") for path in shapes)
    lines = [f"{step}: a wings_jax checkpoint, stage {config.stage!r}, step {number}"]
    lines += [f"  {line}" for line in inspection.arch_lines(arch, has_tower=has_tower)]

    # What the parameters are, and which formats can hold them.
    groups = {path: group_name(path) for path in shapes}
    dtypes = {path: str(np.dtype(meta.dtype)) for path, meta in shapes.items()}
    lines.append(tree.describe(shapes, {"group": groups, "dtype": dtypes}))

    for name, problem in find_formats(step).items():
        lines.append(f"  exports as {name}: {f'no, {problem}' if problem else 'yes'}")
    return lines
