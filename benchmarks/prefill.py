"""Prefill and decoding on one CPU thread, with and without learners, beside Hugging Face's Qwen2.

    python benchmarks/prefill.py [--prompts=512,1024] [--repeat=5]

Random weights of 13 M parameters, float32, greedy decoding with a KV cache. Three models take
turns, each on one thread:

    learners   Wings with both learners and the router; its prompt has an image of 64 slots, whose
               encoding is part of the prefill
    none       the same LLM and prompt, without learners and router
    HF         a Qwen2 of transformers of the same size in torch (sdpa), text only

Shown are medians: milliseconds of the prefill until the first token and of every later token, by
the clock and of processor time, and the quotients by HF. On a busy machine compare processor time.
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import sys

# Before JAX and torch start their threads.
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # from a clone
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import decode
import one_core
from decode_times import Times, median_times
from small_model import DECODER, TOWER

from wings_jax import process
from wings_jax.inference import engine
from wings_jax.model import presets

ARCHS = {
    "learners": presets.WingsArch(DECODER, TOWER, learners=("visual", "textual"), router=True),
    "none": presets.WingsArch(DECODER, TOWER),
}


def format_pair(wall: float, cpu: float) -> str:
    """Returns milliseconds, by the clock / of processor time."""
    return f"{1e3 * wall:.1f} / {1e3 * cpu:.1f}"


def print_row(prompt: int, name: str, times: Times, reference: Times | None) -> None:
    """Prints times and quotients of one model."""
    cells = [format_pair(times.first, times.first_cpu), "-"]
    cells += [format_pair(times.wall, times.cpu), "-"]
    if reference:
        cells[1] = (
            f"{times.first / reference.first:.2f}, {times.first_cpu / reference.first_cpu:.2f}"
        )
        cells[3] = f"{times.wall / reference.wall:.2f}, {times.cpu / reference.cpu:.2f}"
    print(f"| {prompt} | {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=decode.parse_numbers, default=[512, 1024])
    parser.add_argument("--repeat", type=int, default=5)
    flags = parser.parse_args()
    if min(flags.prompts) <= TOWER.num_patches:
        parser.error(f"a prompt must be longer than its image, {TOWER.num_patches} slots")

    one_core.pin_process()
    # As the commands do.
    process.run_in_caller_thread()
    process.keep_freed_memory()

    specs = {name: engine.ModelSpec(arch) for name, arch in ARCHS.items()}
    weights = {name: decode.random_weights(spec) for name, spec in specs.items()}
    reference = decode.HuggingFace(DECODER) if decode.torch else None
    if not reference:
        print("no HF rows: torch is not installed\n")

    print(
        "| prompt | model | prefill, ms (wall / cpu) | / HF | per token, ms (wall / cpu) | / HF |"
    )
    print("|---|---|---|---|---|---|")
    for prompt in flags.prompts:
        runs = {
            name: decode.WingsDecoder(spec, weights[name], 1, prompt).cached
            for name, spec in specs.items()
        }
        if reference:
            runs["HF"] = functools.partial(reference.cached, prompt, 1)
        times = median_times(runs, flags.repeat)
        for name, some in times.items():
            print_row(prompt, name, some, times.get("HF") if name != "HF" else None)


if __name__ == "__main__":
    main()
