"""Seconds and peak memory of importing and exporting a synthetic LLM, against its size.

    python benchmarks/convert.py [--llm qwen1_5_1_8b] [--directory DIR]

Writes random bfloat16 weights in shards of 2 GB, imports them, exports them again and compares
the two byte for byte. Needs three times the model's size on disk. Peak memory is the high-water
mark that Linux records for each command's process (VmHWM).
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # from a clone

from wings_jax.model import parameters, presets
from wings_jax.weights import hf, rules, sources, store
from wings_jax.weights.tensors import LazyTensor

ROOT = pathlib.Path(__file__).parents[1]
TINY = ROOT / "wings_jax" / "assets" / "tiny" / "llm"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llm", default="qwen1_5_1_8b", choices=presets.DECODERS)
    parser.add_argument("--directory", help="where to work; default: a temporary directory")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        measure(presets.DECODERS[arguments.llm], arguments.llm, pathlib.Path(directory))


def measure(arch: presets.DecoderArch, name: str, directory: pathlib.Path) -> None:
    """Prints one row per command, and compares the export with its source."""
    size = write_random(arch, directory / "hf")
    print(f"{name}: {size / 1e9:.2f} GB in bfloat16; {os.cpu_count()} cores")
    print("| command | seconds | peak RSS, GB | peak RSS / file size |")
    print("|---|---|---|---|")

    # The first row is what Python and its imports cost.
    run_command("nothing loaded", size, "inspect", TINY)
    source = ("--llm", directory / "hf", "--tokenizer", TINY, "--template", "chatml")
    run_command("import", size, "import", *source, "--out", directory / "imported")
    checkpoint = ("--checkpoint", directory / "imported", "--shard-gb", "2")
    target = ("--format", "llm", "--out", directory / "exported")
    run_command("export", size, "export", *checkpoint, *target)

    # Tensor by tensor, as bits: NaN and -0.0 would count too.
    original = store.open_tensors(directory / "hf")
    exported = store.open_tensors(directory / "exported")
    assert original.keys() == exported.keys()
    for key, tensor in original.items():
        bits = np.asarray(tensor).view(np.uint16)
        assert np.array_equal(bits, np.asarray(exported[key]).view(np.uint16)), key
    print("the export equals the source, bit for bit")


def write_random(arch: presets.DecoderArch, directory: pathlib.Path) -> int:
    """Writes a model in Hugging Face's layout; returns its bytes."""
    rng = np.random.default_rng(0)
    whole = presets.WingsArch(arch, sources.DEFAULT_TOWER)
    abstract = parameters.abstract_params(whole)
    dtype = np.dtype(ml_dtypes.bfloat16)

    tensors = {}
    for rule in rules.with_prefix(hf.decoder_rules(arch), path="decoder/"):
        shape = abstract[rule.path].shape
        hf_shape = rule.hf_shape(shape)

        def load(hf_shape=hf_shape) -> np.ndarray:
            return (rng.standard_normal(hf_shape, np.float32) * 0.02).astype(dtype)

        for key in rule.hf_keys(shape):
            tensors[key] = LazyTensor(hf_shape, dtype, load)

    directory.mkdir()
    store.write_shards(directory, tensors, max_bytes=2 * 10**9)
    store.write_config(directory, hf.llm_config(arch))
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
    print(f"| {label} | {seconds:.1f} | {peak / 1e9:.2f} | {peak / size:.2f} |", flush=True)


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
