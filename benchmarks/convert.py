"""Seconds and peak memory of importing and exporting synthetic models, against their size.

    python benchmarks/convert.py [--llm qwen1_5_1_8b] [--directory DIR] [--models wings lora]

Writes a model with random bfloat16 weights in the transformers format, in shards of 2 GB, imports
it, and exports the checkpoint in every format that can hold it. What has been written is compared
with the source bit for bit, and what is imported again by the checksums of all arrays:

    wings    both learners and a router: transformers, wings, llm, adapter
    lora     LoRA on every projection: llava with it merged, peft

LoRA's entries are powers of two, so that its sums are exact: merged by the export for llava and by
the import for peft, it has to be the same bits. Needs five times the model's size on disk. Peak
memory is the high-water mark that Linux records for each command's process (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Mapping

import ml_dtypes
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # from a clone

from wings_jax import checkpoint
from wings_jax.data import conversation
from wings_jax.model import parameters, presets
from wings_jax.weights import (
    exports,
    hf,
    peft,
    rules,
    safetensors_file,
    sources,
    store,
    transformers_files,
    transformers_format,
)
from wings_jax.weights.tensors import LazyTensor, TensorMap

ROOT = pathlib.Path(__file__).parents[1]
TINY = ROOT / "wings_jax" / "assets" / "tiny" / "llm"
DTYPE = np.dtype(ml_dtypes.bfloat16)
CHATML = ("--template", "chatml")
SHARDS = ("--shard-gb", "2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llm", default="qwen1_5_1_8b", choices=presets.DECODERS)
    parser.add_argument("--directory", help="where to work; default: a temporary directory")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    arguments = parser.parse_args()

    print(f"{arguments.llm} with SigLIP, {os.cpu_count()} cores")
    print("| command | GB | seconds | peak RSS, GB | peak RSS / size |")
    print("|---|---|---|---|---|")
    # The first row is what Python and its imports cost.
    run_command("nothing loaded", 0, "inspect", TINY)
    for name in arguments.models:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
            MODELS[name](presets.DECODERS[arguments.llm], pathlib.Path(directory))


def measure_wings(decoder: presets.DecoderArch, directory: pathlib.Path) -> None:
    """Prints the rows of a model with both learners and a router."""
    arch = presets.WingsArch(
        decoder, sources.DEFAULT_TOWER, learners=("visual", "textual"), router=True
    )
    source, imported = directory / "source", directory / "imported"
    size = write_model(arch, source)
    checksums = import_again("--transformers", source, imported, label="wings")
    original = store.open_tensors(source)

    # Each format comes back as it was, as far as it holds the model.
    for form in ("transformers", "wings", "llm"):
        exported, back = directory / "exported", directory / "back"
        export(form, size, imported, exported, *SHARDS)
        if form == "transformers":
            assert original.keys() == store.open_tensors(exported).keys()
            compare_bits(original, store.open_tensors(exported))
        found = import_again(f"--{form}", exported, back)
        assert found, form
        assert all(checksums[path] == value for path, value in found.items()), form
        print(f"{form}: {len(found)} of {len(checksums)} arrays, each bit for bit", flush=True)
        shutil.rmtree(exported)
        shutil.rmtree(back)

    # An adapter has the keys of the transformers format, and is read on its base.
    file = directory / "adapter.safetensors"
    export("adapter", size, imported, file, "--base", imported)
    compare_bits(original, safetensors_file.open_safetensors(file))


def measure_lora(decoder: presets.DecoderArch, directory: pathlib.Path) -> None:
    """Prints the rows of a model with LoRA, whose LLM is also written alone."""
    arch = presets.WingsArch(decoder, sources.DEFAULT_TOWER, lora_rank=128, lora_alpha=256.0)
    source, imported = directory / "source", directory / "imported"
    size = write_model(arch, source)
    checksums = import_again("--transformers", source, imported, label="LoRA")

    # Merged into the LLM: only the projections change.
    exported, back = directory / "exported", directory / "back"
    export("llava", size, imported, exported, *SHARDS, "--merge-lora")
    merged = import_again("--llava", exported, back)
    changed = {path for path, value in merged.items() if checksums[path] != value}
    assert len(changed) == len(arch.lora_targets), changed
    print(f"llava: {len(merged) - len(changed)} arrays bit for bit, {len(changed)} merged")
    shutil.rmtree(exported)
    shutil.rmtree(back)

    # Alone, and merged into the LLM that it was trained on.
    export("peft", size, imported, exported)
    found = safetensors_file.open_safetensors(exported / peft.WEIGHT_FILES[0])
    compare_bits(
        store.open_tensors(source),
        {_transformers_key(key): tensor for key, tensor in found.items()},
    )
    shutil.rmtree(imported)
    write_llm(decoder, directory / "llm")
    again = import_again("--llm", directory / "llm", back, "--peft", exported)
    assert again == {path: merged[path] for path in merged if path.startswith("decoder/")}
    print(f"peft: {len(again)} arrays equal those of llava, bit for bit", flush=True)


# Name -> what prints its rows.
MODELS = {"wings": measure_wings, "lora": measure_lora}


def export(form: str, size: int, imported: pathlib.Path, out: pathlib.Path, *flags: object) -> None:
    """Exports a checkpoint of `size` bytes."""
    flags = ("--format", form, *flags, "--out", out)
    run_command(f"export --format {form}", size, "export", "--checkpoint", imported, *flags)


def import_again(
    flag: str,
    directory: pathlib.Path,
    out: pathlib.Path,
    *flags: object,
    label: str = "",
) -> dict[str, dict]:
    """Imports a directory; returns the checksums of the checkpoint's arrays.

    The size is that of all directories among the flags.
    """
    flags = (flag, directory, *flags, *(() if flag == "--transformers" else CHATML))
    directories = [entry for entry in flags if isinstance(entry, pathlib.Path)]
    files = [file for entry in directories for file in entry.glob("*.safetensors")]
    words = [f"import {flag}", *(str(entry) for entry in flags[2:] if entry == "--peft")]
    name = " ".join([*words, *([f"({label})"] if label else [])])
    run_command(name, sum(file.stat().st_size for file in files), "import", *flags, "--out", out)
    step = checkpoint.find_step(out, flag="")
    return json.loads((step / "meta" / "metadata").read_text())["checksums"]["params"]


def compare_bits(original: Mapping[str, LazyTensor], other: Mapping[str, LazyTensor]) -> None:
    """Asserts that tensors equal those of the same keys as bits: NaN and -0.0 would count too."""
    assert other
    for key, tensor in other.items():
        bits = np.asarray(tensor).view(np.uint16)
        assert np.array_equal(bits, np.asarray(original[key]).view(np.uint16)), key


def _transformers_key(key: str) -> str:
    """Returns the key that the transformers format has for a matrix of a PEFT directory."""
    key = key.replace(f"{peft.PREFIX}model.", transformers_format.LANGUAGE_MODEL)
    return key.replace("lora_A", "lora_a").replace("lora_B", "lora_b")


def write_model(arch: presets.WingsArch, directory: pathlib.Path) -> int:
    """Writes a random model in the transformers format; returns its bytes."""
    tensors = random_tensors(arch, transformers_format.wings_rules(arch))
    template = conversation.get_template("chatml")
    config, text_files = transformers_files.export_files(
        arch, read_tokenizer(), template, name="random"
    )
    exports.write_export(directory, tensors, config, text_files, max_bytes=2 * 10**9)
    return sum(tensor.nbytes for tensor in tensors.values())


def write_llm(decoder: presets.DecoderArch, directory: pathlib.Path) -> None:
    """Writes the LLM of the random models alone."""
    arch = presets.WingsArch(decoder, sources.DEFAULT_TOWER)
    table = rules.with_prefix(hf.decoder_rules(decoder), path="decoder/")
    tensors, config = random_tensors(arch, table), hf.llm_config(decoder)
    exports.write_export(directory, tensors, config, read_tokenizer(), max_bytes=2 * 10**9)


def random_tensors(arch: presets.WingsArch, table: Iterable[rules.Rule]) -> TensorMap:
    """Returns tensors in bfloat16 for a table, the same values of a parameter in every format."""
    abstract = parameters.abstract_params(arch)
    tensors = {}
    for rule in table:
        shape = abstract[rule.path].shape
        for layer, key in enumerate(rule.hf_keys(shape)):
            hf_shape = rule.hf_shape(shape)
            load = _random_values(hf_shape, f"{rule.path} {layer}", rule.path[-2:] in ("/a", "/b"))
            tensors[key] = LazyTensor(hf_shape, DTYPE, load)
    return tensors


def _random_values(
    shape: tuple[int, ...], name: str, has_exact_sums: bool
) -> Callable[[], np.ndarray]:
    """Returns what computes values in (2**-15, 2**-7), or +-2**-6, with the name as the seed."""

    def load() -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        bits = rng.integers(0, 1 << 16, shape, np.uint16)
        # Sign, fraction and 3 bits of the exponent are random.
        mask, ones = (0x8000, 0x3C80) if has_exact_sums else (0x83FF, 0x3800)
        return ((bits & np.uint16(mask)) | np.uint16(ones)).view(DTYPE)

    return load


def read_tokenizer() -> dict[str, str]:
    """Returns the files of the small tokenizer, name -> content."""
    names = ("tokenizer.json", "tokenizer_config.json")
    return {name: (TINY / name).read_text(encoding="utf-8") for name in names}


def run_command(label: str, size: int, *arguments: object) -> None:
    """Runs one command of `wings_jax.convert`, and prints its row; `size` is what it reads."""
    command = [sys.executable, "-m", "wings_jax.convert", *map(str, arguments)]
    start_time, peak = time.monotonic(), 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)

    # Linux drops the mark with the process, so it is polled while the command runs.
    while process.poll() is None:
        peak = max(peak, high_water_mark(process.pid))
        time.sleep(0.05)

    seconds = time.monotonic() - start_time
    if process.returncode:
        raise SystemExit(f"{label} failed: {' '.join(command)}")
    ratio = f"{peak / size:.2f}" if size else ""
    row = f"{size / 1e9:.2f} | {seconds:.1f} | {peak / 1e9:.2f} | {ratio}"
    print(f"| {label} | {row} |", flush=True)


def high_water_mark(pid: int) -> int:
    """Returns the peak bytes in memory of a running process; 0 when it has ended."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(match[1]) * 1024 if match else 0


if __name__ == "__main__":
    main()
