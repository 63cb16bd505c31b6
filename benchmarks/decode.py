"""Milliseconds per token of greedy decoding, with and without a KV cache, beside Hugging Face.

    python benchmarks/decode.py [--prompts=128,512,1024] [--batches=1,4,16] [--repeat=3]
    python benchmarks/decode.py --size=1.8b --dtype=bfloat16 --prompts= --batches=1,8  # GPU, TPU

A Wings with random weights, both learners and a router; every prompt has one image of 64 slots.
Timed is the loop that `generate` runs (`inference.decode`, 16 tokens per device call), compiled
before, and the median of the repeats, in which the three take turns:

    cached       with a KV cache
    no cache     the whole conversation is computed for each token, as in the authors' release
    HF           a Qwen2 of the same size in torch, text only, with its cache; on one thread and
                 on all cores, of which the faster is shown

`wall` is the time that a user waits. `cpu` is processor time of the whole process (all threads):
compare that on a machine that is busy with other things. On an accelerator read `wall`. The share
of the memory bandwidth is of a copy on the same device, or of `--bandwidth`.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # from a clone
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import ceilings
from decode_times import Clock, Times, format_ms, format_ratio, median_times, time_tokens
from small_model import DECODER, TOWER, qwen2_config

from wings_jax import tree
from wings_jax.data import conversation
from wings_jax.inference import (
    chunks,
    decode,
    engine,
    image_features,
    sampling,
    scheduler,
    uncached,
)
from wings_jax.inference.kv_cache import KVCache
from wings_jax.model import parameters, presets

try:
    import torch
    import transformers
except ImportError:  # torch is not a dependency of the package
    torch = None

SIZES = {
    "small": DECODER,
    "1.8b": presets.DECODERS["qwen1_5_1_8b"],
    "7b": presets.DECODERS["qwen1_5_7b"],
}
STEPS = scheduler.SchedulerOptions().steps
CACHED_TOKENS = 3 * STEPS  # timed tokens of an answer
UNCACHED_TOKENS = 3
TARGET_MS, TARGET_GROWTH, TARGET_HF = 8.0, 2.0, 1.5


def random_weights(spec: engine.ModelSpec) -> engine.Weights:
    """Returns weights as decoding needs them, each array initialized directly in its dtype."""
    shapes = tree.nest(parameters.abstract_params(spec.arch))
    leaves, treedef = jax.tree.flatten(
        jax.eval_shape(lambda params: engine.split_layers(params, spec), shapes)
    )

    @jax.jit(static_argnums=1)
    def draw(key: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)

    keys = jax.random.split(jax.random.key(0), len(leaves))
    return treedef.unflatten(map(draw, keys, leaves))


def random_prompt(arch: presets.WingsArch, length: int, seed: int) -> chunks.PromptSlots:
    """Returns `length` slots: text, an image, text."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, arch.decoder.vocab_size, length - arch.vision.num_patches)
    size = arch.vision.image_size
    image = rng.integers(0, 256, (size, size, 3), np.uint8)
    ids = [*ids[:10], conversation.IMAGE_ID, *ids[10:]]
    return chunks.from_ids(ids, [image], arch.vision.num_patches)


class WingsDecoder:
    """This package's model over some rows; its methods return times.

    After `cached`, `cache` is the KV cache at the end of the answers.
    """

    def __init__(self, spec: engine.ModelSpec, weights: engine.Weights, rows: int, length: int):
        self.spec, self.weights = spec, weights
        self.rows = [random_prompt(spec.arch, length, seed) for seed in range(rows)]
        capacity = chunks.bucket(length) + chunks.bucket(CACHED_TOKENS + 1)
        learner_slots = {"visual": spec.arch.vision.num_patches, "textual": capacity}
        slots = {"main": capacity} | {name: learner_slots[name] for name in spec.arch.learners}
        self.slots = tuple(sorted(slots.items()))
        self.cache: KVCache | None = None

    def cached(self) -> Times:
        """Computes the prompts and generates CACHED_TOKENS tokens more, as `scheduler` does."""
        arch, rows = self.spec.arch, self.rows
        starts, length = np.zeros(len(rows), np.int32), chunks.bucket(rows[0].count)
        params = sampling.stack_params(
            [sampling.SamplingParams(max_new_tokens=CACHED_TOKENS + 1)] * len(rows), 0
        )
        stops = np.array([-1], np.int32)
        images = [row.images[0] for row in rows]

        clock = Clock()
        chunk = chunks.make_chunk(rows, starts, arch, length=length, images=1)
        features = image_features.encode(
            self.spec, self.weights, images, batch_size=len(rows), count=len(rows)
        )
        cache, logits = decode.prefill(self.spec, self.weights, chunk, features, slots=self.slots)
        state = decode.begin(logits, params, stops, None)
        jax.device_get(state.tokens)
        first = clock.elapsed()

        clock = Clock()
        for _ in range(CACHED_TOKENS // STEPS):
            cache, state, generated = decode.decode(
                self.spec, self.weights, cache, state, params, stops, steps=STEPS
            )
            jax.device_get((generated, state.count))
        wall, cpu = clock.elapsed()

        self.cache = cache
        return Times(*first, wall / CACHED_TOKENS, cpu / CACHED_TOKENS)

    def uncached(self) -> Times:
        """Generates UNCACHED_TOKENS tokens after the first, of one row, without a cache."""
        prompt = self.rows[0]
        features = image_features.encode_all(self.spec, self.weights, prompt)
        params = sampling.SamplingParams(max_new_tokens=UNCACHED_TOKENS + 1)
        tokens = uncached.recompute(self.spec, self.weights, prompt, features, params, ())
        return time_tokens(tokens, UNCACHED_TOKENS)


class HuggingFace:
    """A random Qwen2 of transformers, in float32 on the CPU."""

    def __init__(self, arch: presets.DecoderArch):
        self.model = transformers.Qwen2ForCausalLM(qwen2_config(arch)).eval()

    def cached(self, length: int, threads: int) -> Times:
        """Computes a prompt and generates CACHED_TOKENS tokens more."""
        torch.set_num_threads(threads)
        with torch.inference_mode():
            return time_tokens(self._tokens(length), CACHED_TOKENS)

    def _tokens(self, length: int) -> Iterator[int]:
        ids = torch.randint(0, self.model.config.vocab_size, (1, length))
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        while True:
            ids = out.logits[:, -1:].argmax(-1)
            yield int(ids)
            out = self.model(ids, past_key_values=out.past_key_values, use_cache=True)


def bytes_per_step(
    spec: engine.ModelSpec, weights: engine.Weights, cache: KVCache
) -> tuple[int, int]:
    """Returns the bytes that one step reads: of weights, and of all rows' caches.

    Of the embeddings and the router's table it reads a few rows, which are not counted.
    """
    is_tied = spec.arch.decoder.tie_embeddings
    head = weights.rest["decoder"]["embed" if is_tied else "head"]
    layers = [
        {name: value for name, value in layer.items() if name != "router"}
        for layer in weights.layers
    ]
    weight_bytes = sum(x.nbytes for x in jax.tree.leaves((layers, head)))
    return weight_bytes, sum(x.nbytes for x in jax.tree.leaves(cache.layers))


def print_single_row(
    spec: engine.ModelSpec, weights: engine.Weights, flags: argparse.Namespace
) -> dict[int, dict[str, Times]]:
    """Prints and returns times by prompt length, for a single conversation."""
    is_small = flags.size == "small"
    reference = HuggingFace(spec.arch.decoder) if torch and is_small else None
    if not reference:
        why = "torch is not installed" if not torch else "only with --size=small"
        print(f"no HF column: {why}\n")

    print("ms per token, batch 1 (wall / cpu); prompt and first token in seconds\n")
    print("| prompt | cached | no cache | HF | cached / HF (wall, cpu) | first token | HF |")
    print("|---|---|---|---|---|---|---|")
    results = {}
    for length in flags.prompts:
        model = WingsDecoder(spec, weights, 1, length)
        runs = {"cached": model.cached, "no cache": model.uncached}
        for threads in {1, os.cpu_count()} if reference else ():
            runs[f"HF {threads}"] = functools.partial(reference.cached, length, threads)
        results[length] = times = median_times(runs, flags.repeat)

        references = [times[name] for name in runs if name.startswith("HF")]
        if references:
            times["HF"] = min(references, key=lambda some: some.wall)
        cells = [format_ms(times["cached"]), format_ms(times["no cache"])]
        cells += [format_ms(times.get("HF")), format_ratio(times["cached"], times.get("HF"))]
        cells += [f"{times[name].first:.3f}" if name in times else "-" for name in ("cached", "HF")]
        print(f"| {length} | {' | '.join(cells)} |", flush=True)
    return results


def print_targets(results: Mapping[int, Mapping[str, Times]]) -> None:
    """Prints the targets of the small size on two cores, and what was measured."""
    if 512 in results:
        times = results[512]
        print(f"\n- prompt 512: {format_ms(times['cached'])} ms/token, target {TARGET_MS:g}")
        if "HF" in times:
            ratio = format_ratio(times["cached"], times["HF"])
            print(f"- beside HF: {ratio}, target {TARGET_HF:g}")
        factor = times["no cache"].wall / times["cached"].wall
        print(f"- without the cache a token takes {factor:.0f} times as long")

    if {128, 1024} <= results.keys():
        growth = format_ratio(results[1024]["cached"], results[128]["cached"])
        print(f"- growth from 128 to 1024: {growth}, target {TARGET_GROWTH:g}")


def print_batches(
    spec: engine.ModelSpec, weights: engine.Weights, flags: argparse.Namespace
) -> None:
    """Prints tokens per second and memory traffic by batch size."""
    bandwidth = flags.bandwidth
    if not bandwidth:
        gib = 0.25 if jax.default_backend() == "cpu" else 2.0
        bandwidth = ceilings.copy_rate(gib) / 1e9
    print(
        f"\nBatches, prompts of {flags.batch_prompt} slots, with a KV cache; {bandwidth:.0f} GB/s\n"
    )
    print(
        "| batch | ms per step (wall / cpu) | tokens/s | weights + caches read, GB | GB/s | share |"
    )
    print("|---|---|---|---|---|---|")
    for size in flags.batches:
        model = WingsDecoder(spec, weights, size, flags.batch_prompt)
        times = median_times({"cached": model.cached}, flags.repeat)["cached"]

        weight_gb, cache_gb = (n / 1e9 for n in bytes_per_step(spec, weights, model.cache))
        rate = (weight_gb + cache_gb) / times.wall
        print(
            f"| {size} | {format_ms(times)} | {size / times.wall:.0f} "
            f"| {weight_gb:.3f} + {cache_gb:.3f} | {rate:.1f} | {rate / bandwidth:.0%} |",
            flush=True,
        )


def parse_numbers(text: str) -> Sequence[int]:
    """Returns the numbers of a comma-separated list."""
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompts", type=parse_numbers, default=[128, 512, 1024])
    parser.add_argument("--batches", type=parse_numbers, default=[1, 4, 16])
    parser.add_argument("--batch-prompt", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--bandwidth", type=float, help="GB/s; by default measured by a copy")
    flags = parser.parse_args()
    if min([*flags.prompts, flags.batch_prompt]) <= TOWER.num_patches:
        parser.error(f"a prompt must be longer than its image, {TOWER.num_patches} slots")

    arch = presets.WingsArch(SIZES[flags.size], TOWER, learners=("visual", "textual"), router=True)
    spec = engine.ModelSpec(arch, flags.dtype)
    weights = random_weights(spec)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(weights))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    device = jax.devices()[0].device_kind
    print(
        f"{flags.size}, {flags.dtype}, {device}, {os.cpu_count()} cores, "
        f"{count / 1e6:.1f} M parameters; load average before: {load:.1f}\n"
    )

    if flags.prompts:
        results = print_single_row(spec, weights, flags)
        if flags.size == "small":
            print_targets(results)
    if flags.batches:
        print_batches(spec, weights, flags)


if __name__ == "__main__":
    main()
