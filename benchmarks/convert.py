"""Seconds and peak memory of importing and exporting a synthetic Wings model, against its size.

    python benchmarks/convert.py [--llm qwen1_5_1_8b] [--directory DIR] [--formats llm wings ...]

Writes a directory of the transformers format with random bfloat16 weights, in shards of 2 GB, and
imports it. For each format: exports the checkpoint, imports the result, and compares it with the
first import by the checksums of all arrays that it holds; the transformers format also with the
source, byte for byte. Needs four times the model's size on disk. Peak memory is the high-water mark
that Linux records for each command's process (VmHWM).
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

import ml_dtypes
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # from a clone

from wings_jax import checkpoint
from wings_jax.data import conversation
from wings_jax.model import parameters, presets
from wings_jax.weights import exports, sources, store, transformers_files, transformers_format
from wings_jax.weights.tensors import LazyTensor

ROOT = pathlib.Path(__file__).parents[1]
TINY = ROOT / "wings_jax" / "assets" / "tiny" / "llm"
# Format -> the flags that import its directory.
IMPORTS = {
    "transformers": ("--transformers",),
    "wings": ("--template", "chatml", "--wings"),
    "llm": ("--template", "chatml", "--llm"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llm", default="qwen1_5_1_8b", choices=presets.DECODERS)
    parser.add_argument("--directory", help="where to work; default: a temporary directory")
    parser.add_argument("--formats", nargs="+", default=list(IMPORTS), choices=IMPORTS)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        arch = presets.WingsArch(
            presets.DECODERS[arguments.llm],
            sources.DEFAULT_TOWER,
            learners=("visual", "textual"),
            router=True,
        )
        measure(arch, arguments.llm, arguments.formats, pathlib.Path(directory))


def measure(
    arch: presets.WingsArch, name: str, formats: list[str], directory: pathlib.Path
) -> None:
    """Prints one row per command."""
    source, imported = directory / "source", directory / "imported"
    size = write_random(arch, source)
    print(f"{name} with a tower and wings: {size / 1e9:.2f} GB; {os.cpu_count()} cores")
    print("| command | GB | seconds | peak RSS, GB | peak RSS / size |")
    print("|---|---|---|---|---|")

    # The first row is what Python and its imports cost.
    run_command("nothing loaded", size, "inspect", TINY)
    run_command(
        "import --transformers", size, "import", "--transformers", source, "--out", imported
    )
    checksums = read_checksums(imported)

    for form in formats:
        exported, back = directory / "exported", directory / "back"
        target = ("--format", form, "--shard-gb", "2", "--out", exported)
        run_command(f"export --format {form}", size, "export", "--checkpoint", imported, *target)
        held = sum(file.stat().st_size for file in exported.glob("*.safetensors"))
        if form == "transformers":
            compare_bits(source, exported)
        run_command(
            f"import {IMPORTS[form][-1]}", held, "import", *IMPORTS[form], exported, "--out", back
        )

        # A format may hold fewer arrays, but those exactly.
        found = read_checksums(back)
        assert found, form
        assert all(checksums[path] == value for path, value in found.items()), form
        print(f"{form}: {len(found)} of {len(checksums)} arrays, each bit for bit", flush=True)
        shutil.rmtree(exported)
        shutil.rmtree(back)


def compare_bits(source: pathlib.Path, exported: pathlib.Path) -> None:
    """Asserts that two directories have the same tensors, as bits: NaN and -0.0 would count too."""
    original, other = store.open_tensors(source), store.open_tensors(exported)
    assert original.keys() == other.keys()
    for key, tensor in original.items():
        bits = np.asarray(tensor).view(np.uint16)
        assert np.array_equal(bits, np.asarray(other[key]).view(np.uint16)), key


def read_checksums(workdir: pathlib.Path) -> dict[str, dict]:
    """Returns the checksums of the arrays of a checkpoint."""
    step = checkpoint.find_step(workdir, flag="")
    return json.loads((step / "meta" / "metadata").read_text())["checksums"]["params"]


def write_random(arch: presets.WingsArch, directory: pathlib.Path) -> int:
    """Writes a model in the transformers format; returns its bytes."""
    rng = np.random.default_rng(0)
    dtype = np.dtype(ml_dtypes.bfloat16)
    abstract = parameters.abstract_params(arch)

    tensors = {}
    for rule in transformers_format.wings_rules(arch):
        shape = abstract[rule.path].shape
        hf_shape = rule.hf_shape(shape)

        def load(hf_shape=hf_shape) -> np.ndarray:
            return (rng.standard_normal(hf_shape, np.float32) * 0.02).astype(dtype)

        for key in rule.hf_keys(shape):
            tensors[key] = LazyTensor(hf_shape, dtype, load)

    tokenizer = {
        file: (TINY / file).read_text(encoding="utf-8")
        for file in ("tokenizer.json", "tokenizer_config.json")
    }
    template = conversation.get_template("chatml")
    config, text_files = transformers_files.export_files(arch, tokenizer, template, name="random")
    exports.write_export(directory, tensors, config, text_files, max_bytes=2 * 10**9)
    return sum(tensor.nbytes for tensor in tensors.values())


def run_command(label: str, size: int, *arguments: object) -> None:
    """Runs one command of `wings_jax.convert`, and prints its row."""
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
    row = f"{size / 1e9:.2f} | {seconds:.1f} | {peak / 1e9:.2f} | {peak / size:.2f}"
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
