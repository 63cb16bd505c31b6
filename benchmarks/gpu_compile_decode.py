"""What the kernels of cached decoding read and write on a GPU, compiled without any.

    python benchmarks/gpu_compile_decode.py [--size=1.8b] [--layers=4] [--rows=8] [--prompt=512]

Compiles the loop that `benchmarks/decode.py` times, in bfloat16, for an H100, and prints how often
kernels start for one token, and what they read and write. Needs what `gpu_compile.py` needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import sys

import numpy as np

os.environ["JAX_PLATFORMS"] = "cpu"  # arrays, if there were any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # from a clone
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import decode as benchmark
import gpu_compile
import gpu_traffic
import jax
import jax.numpy as jnp
from jax.experimental import topologies

from wings_jax import tree
from wings_jax.inference import chunks, decode, engine, sampling
from wings_jax.model import parameters, presets

CHIP = "h100"


def compile_decode(arch: presets.WingsArch, rows: int, length: int) -> str:
    """Returns the program that decodes up to STEPS tokens of `rows` prompts of `length` slots."""
    spec = engine.ModelSpec(arch, "bfloat16")
    params = tree.nest(parameters.abstract_params(arch))
    weights = jax.eval_shape(lambda params: engine.split_layers(params, spec), params)

    # Shapes of what the prefill returns, and of the first tokens.
    model = benchmark.WingsDecoder(spec, weights, rows, length)
    chunk = chunks.make_chunk(model.rows, np.zeros(rows, np.int32), arch, length=length, images=1)
    features = jax.ShapeDtypeStruct(
        (rows * arch.vision.num_patches, arch.decoder.hidden_size), jnp.float32
    )
    cache, logits = jax.eval_shape(
        lambda weights, features: decode.prefill(spec, weights, chunk, features, slots=model.slots),
        weights,
        features,
    )
    some = sampling.SamplingParams(max_new_tokens=benchmark.CACHED_TOKENS + 1)
    settings, stops = sampling.stack_params([some] * rows, 0), np.array([-1], np.int32)
    state = jax.eval_shape(lambda logits: decode.begin(logits, settings, stops, None), logits)

    # All of it on one GPU, which need not exist.
    target = gpu_compile.target_config(CHIP)
    device = topologies.get_topology_desc(
        CHIP, "cuda", topology="1x1x1", target_config=target
    ).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (weights, cache, state, settings, stops),
    )
    with gpu_compile.compiling_for(device):
        traced = decode.decode.trace(spec, *placed, steps=benchmark.STEPS)
        return traced.lower(lowering_platforms=("cuda",)).compile().as_text()


def main() -> None:
    """Prints the table of one token; the loop's end is not known, so that its body counts once."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=benchmark.SIZES, default="1.8b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512, help="slots, a power of two")
    flags = parser.parse_args()

    decoder = dataclasses.replace(benchmark.SIZES[flags.size], num_layers=flags.layers)
    arch = presets.WingsArch(decoder, benchmark.TOWER, learners=("visual", "textual"), router=True)
    program = compile_decode(arch, flags.rows, flags.prompt)
    gpu_traffic.print_table(gpu_traffic.count_traffic(program))


if __name__ == "__main__":
    main()
