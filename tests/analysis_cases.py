"""A small random model to analyze, and the command that analyzes it."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import inference_cases

from wings_jax import analyze, checkpoint, cli, config, tree

LONG = "a long question"


def write_model(
    directory: pathlib.Path,
    parts: Sequence[str] = ("vision", "projector", "decoder"),
    **settings: object,
) -> pathlib.Path:
    """Writes these parts of a random model of three layers with the tiny base's tokenizer.

    `settings` are leaves of its config.

    Beside it, `other` has two layers.
    """
    arch = inference_cases.with_vocabulary(
        inference_cases.ARCHS["router"], len(inference_cases.tokenizer())
    )
    decoder = dataclasses.replace(arch.decoder, num_layers=3, max_positions=1024)
    arch = dataclasses.replace(arch, decoder=decoder, router_positions=1024)
    _, _, params = inference_cases.make(arch)

    source = inference_cases.write_checkpoint(directory.with_name("other"))
    files = checkpoint.read_tokenizer_files(checkpoint.newest_step(source))
    flat = tree.flatten({part: params[part] for part in parts})
    checkpoint.write_checkpoint(directory, flat, config.Config(**settings), arch, files)
    return directory


def run_analyze(monkeypatch, *arguments: object) -> None:
    """Runs `analyze laws ARGUMENTS`, as from the command line."""
    monkeypatch.setattr(sys, "argv", ["analyze", "laws", *map(str, arguments)])
    cli.run_main(analyze.PROGRAM, analyze.main)
