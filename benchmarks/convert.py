"""Seconds and peak memory of importing and exporting a synthetic LLM, against its size.

    python benchmarks/convert.py [--llm qwen1_5_1_8b] [--folder DIR]

Writes random bfloat16 weights in shards of 2 GB, imports them, exports them again and compares
the two byte for byte. Needs three times the model's size on disk. Peak memory is the high-water
mark that Linux keeps of each command's process (VmHWM).
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

from wings_jax.model import presets
from wings_jax.weights import hf, rules, store

ROOT = pathlib.Path(__file__).parents[1]
TINY = ROOT / "wings_jax" / "assets" / "tiny" / "llm"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llm", default="qwen1_5_1_8b", choices=presets.DECODERS)
    parser.add_argument("--folder", default=None, help="where to work; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measure(presets.DECODERS[arguments.llm], arguments.llm, pathlib.Path(folder))


def measure(arch: presets.DecoderArch, name: str, folder: pathlib.Path) -> None:
    """Prints one row per command."""
    size = write_random(arch, folder / "hf")
    print(f"{name}: {size / 1e9:.2f} GB in bfloat16; {os.cpu_count()} cores")
    print("| command | seconds | peak RSS, GB | peak RSS / file size |")
    print("|---|---|---|---|")
    run("nothing loaded", size, "inspect", TINY)
    source = ("--llm", folder / "hf", "--tokenizer", TINY, "--template", "chatml")
    run("import", size, "import", *source, "--out", folder / "ours")
    checkpoint = ("--checkpoint", folder / "ours", "--shard-gb", "2")
    target = ("--format", "llm", "--out", folder / "back")
    run("export", size, "export", *checkpoint, *target)
    first, second = (store.open_tensors(folder / half) for half in ("hf", "back"))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        same = np.array_equal(*(np.asarray(t).view(np.uint16) for t in (tensor, second[key])))
        assert same, key
    print("the export is the source, bit for bit")


def write_random(arch: presets.DecoderArch, folder: pathlib.Path) -> int:
    """Writes a model in Hugging Face's layout; returns its bytes."""
    rng = np.random.default_rng(0)
    shapes = hf.decoder_shapes(arch, ml_dtypes.bfloat16)
    tensors = {}
    for rule in hf.decoder_rules(arch):
        shape = rule.foreign_shape(shapes[rule.ours].shape)

        def load(shape=shape) -> np.ndarray:
            return (rng.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)

        for key in rule.keys(shapes[rule.ours].shape):
            tensors[key] = rules.Tensor(shape, np.dtype(ml_dtypes.bfloat16), load)
    folder.mkdir()
    store.write_shards(folder, tensors, max_bytes=2 * 10**9)
    store.write_config(folder, hf.llm_config(arch))
    return sum(tensor.nbytes for tensor in tensors.values())


def run(what: str, size: int, *arguments: object) -> None:
    """Runs one command of `wings_jax.convert`, and prints its row."""
    command = [sys.executable, "-m", "wings_jax.convert", *map(str, arguments)]
    began, peak = time.monotonic(), 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, high_water_mark(process.pid))
        time.sleep(0.05)
    seconds = time.monotonic() - began
    if process.returncode:
        raise SystemExit(f"{what} failed: {' '.join(command)}")
    print(f"| {what} | {seconds:.1f} | {peak / 1e9:.2f} | {peak / size:.2f} |", flush=True)


def high_water_mark(pid: int) -> int:
    """Returns the most bytes that a running process had in memory so far; 0 once it is gone."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    main()
