"""Milliseconds per token of greedy decoding: ours with and without a cache, and Hugging Face's.

    python benchmarks/decode.py [--prompts=128,512,1024] [--batches=1,4,16] [--repeat=3]
    python benchmarks/decode.py --size=7b --dtype=bfloat16 --bandwidth=4800      # a GPU or TPU

A Wings with random weights, both learners and a router; every prompt holds one image of 64 slots.
What is timed is the loop that `generate` runs (`inference.decode`, 16 tokens between two looks),
compiled before, and the median of the repeats, in which the three take turns:

    ours         caches of keys and values
    no cache     everything is read again for each token, as the authors' release does
    HF           a plain Qwen2 of the same size in torch, text only, with its cache; on one thread
                 and on all cores, of which the faster is shown

`wall` is what a user waits. `cpu` is processor time of the whole process (all threads): on a
machine that is busy with other things it is the one to compare. On an accelerator read `wall`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # from a clone

from wings_jax import tree
from wings_jax.data import conversation
from wings_jax.inference import decode, engine, prompts, sampling, scheduler
from wings_jax.inference.kv_cache import KVCache
from wings_jax.model import parameters, presets

try:
    import torch
    import transformers
except ImportError:  # torch is no part of the runtime
    torch = None

SMALL = dataclasses.replace(
    presets.DECODERS["qwen1_5_1_8b"],
    vocab_size=8192,
    hidden_size=256,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    head_dim=32,
    ffn_size=688,
    max_positions=4096,
)
SIZES = {
    "small": SMALL,
    "1.8b": presets.DECODERS["qwen1_5_1_8b"],
    "7b": presets.DECODERS["qwen1_5_7b"],
}
TOWER = dataclasses.replace(
    presets.VISION["siglip_base_224"],
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    ffn_size=128,
    image_size=128,
)
STEPS = scheduler.SchedulerOptions().steps
NEW = 3 * STEPS  # timed tokens of an answer
FEW = 3  # timed tokens without a cache
TARGET_MS, TARGET_GROWTH, TARGET_HF = 8.0, 2.0, 1.5


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds: until the first token, and of each later one, by the clock and of processors."""

    first: float
    wall: float
    cpu: float


def random_weights(spec: engine.ModelSpec) -> engine.Weights:
    """Returns weights as decoding reads them, each array born in its dtype."""
    shapes = tree.nest(parameters.abstract_params(spec.arch))
    leaves, treedef = jax.tree.flatten(
        jax.eval_shape(lambda p: engine.split_layers(p, spec), shapes)
    )

    @jax.jit(static_argnums=1)
    def draw(key: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)

    keys = jax.random.split(jax.random.key(0), len(leaves))
    return treedef.unflatten(map(draw, keys, leaves))


def random_prompt(arch: presets.WingsArch, length: int, seed: int) -> prompts.PromptSlots:
    """Returns `length` slots: text, an image, text."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, arch.decoder.vocab_size, length - arch.vision.num_patches)
    size = arch.vision.image_size
    picture = rng.integers(0, 256, (size, size, 3), np.uint8)
    ids = [*ids[:10], conversation.IMAGE_ID, *ids[10:]]
    return prompts.from_ids(ids, [picture], arch.vision.num_patches)


class Clock:
    """Seconds by the clock and of this process's processors since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


class Ours:
    """Our model over some rows; what it returns is times, and `memory` is what was left behind."""

    def __init__(self, spec: engine.ModelSpec, weights: engine.Weights, rows: int, length: int):
        self.spec, self.weights = spec, weights
        self.rows = [random_prompt(spec.arch, length, seed) for seed in range(rows)]
        room = prompts.bucket(length) + prompts.bucket(NEW + 1)
        slots = {"main": room, "visual": spec.arch.vision.num_patches, "textual": room}
        self.slots = tuple(sorted(slots.items()))
        self.memory: KVCache | None = None

    def cached(self) -> Times:
        """Reads the prompts and goes on for NEW tokens, as `batch` does."""
        arch, rows = self.spec.arch, self.rows
        starts, length = np.zeros(len(rows), np.int32), prompts.bucket(rows[0].count)
        choice = sampling.stack_params(
            [sampling.SamplingParams(max_new_tokens=NEW + 1)] * len(rows), 0
        )
        stops = np.array([-1], np.int32)
        pictures = [row.images[0] for row in rows]
        clock = Clock()
        chunk = prompts.make_chunk(rows, starts, arch, length=length, images=1)
        features = scheduler.encode(
            self.spec, self.weights, pictures, at_once=len(rows), room=len(rows)
        )
        memory, logits = decode.prefill(self.spec, self.weights, chunk, features, slots=self.slots)
        running = decode.begin(logits, choice, stops, None)
        jax.device_get(running.tokens)
        first, _ = clock.read()
        clock = Clock()
        for _ in range(NEW // STEPS):
            memory, running, said = decode.decode(
                self.spec, self.weights, memory, running, choice, stops, steps=STEPS
            )
            jax.device_get((said, running.count))
        wall, cpu = clock.read()
        self.memory = memory
        return Times(first, wall / NEW, cpu / NEW)

    def uncached(self) -> Times:
        """Goes on for FEW tokens, of one row, without a cache."""
        prompt = self.rows[0]
        features = scheduler.encode_all(self.spec, self.weights, prompt)
        wish = sampling.SamplingParams(max_new_tokens=FEW + 1)
        tokens = scheduler.recompute(self.spec, self.weights, prompt, features, wish, ())
        return timed(tokens, FEW)


def timed(tokens: Iterator, count: int) -> Times:
    """Returns the times of an iterator over 1 + `count` tokens."""
    clock = Clock()
    next(tokens)
    first, _ = clock.read()
    clock = Clock()
    for _ in range(count):
        next(tokens)
    wall, cpu = clock.read()
    return Times(first, wall / count, cpu / count)


class HuggingFace:
    """A random Qwen2 of transformers, in float32 on the CPU."""

    def __init__(self, arch: presets.DecoderArch):
        config = transformers.Qwen2Config(
            vocab_size=arch.vocab_size,
            hidden_size=arch.hidden_size,
            intermediate_size=arch.ffn_size,
            num_hidden_layers=arch.num_layers,
            num_attention_heads=arch.num_heads,
            num_key_value_heads=arch.num_kv_heads,
            max_position_embeddings=arch.max_positions,
            tie_word_embeddings=arch.tie_embeddings,
        )
        self.model = transformers.Qwen2ForCausalLM(config).eval()

    def cached(self, length: int, threads: int) -> Times:
        """Reads a prompt and goes on for NEW tokens."""
        torch.set_num_threads(threads)
        with torch.inference_mode():
            return timed(self._tokens(length), NEW)

    def _tokens(self, length: int) -> Iterator[int]:
        ids = torch.randint(0, self.model.config.vocab_size, (1, length))
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        while True:
            ids = out.logits[:, -1:].argmax(-1)
            yield int(ids)
            out = self.model(ids, past_key_values=out.past_key_values, use_cache=True)


def repeat(runs: Mapping[str, Callable[[], Times]], count: int) -> dict[str, Times]:
    """Returns the median times of functions that take turns, after each ran once for warming."""
    found: dict[str, list[Times]] = {name: [] for name in runs}
    for turn in range(count + 1):
        for name, run in runs.items():
            times = run()
            if turn:
                found[name].append(times)
    return {
        name: Times(*map(statistics.median, zip(*map(dataclasses.astuple, some), strict=True)))
        for name, some in found.items()
    }


def nbytes(spec: engine.ModelSpec, weights: engine.Weights, memory: KVCache) -> tuple[int, int]:
    """Returns the bytes that one token's step reads: of weights, and of all rows' caches.

    Of the embeddings and the router's table it reads a few rows, which are not counted.
    """
    tied = spec.arch.decoder.tie_embeddings
    head = weights.rest["decoder"]["embed" if tied else "head"]
    layers = [{k: v for k, v in layer.items() if k != "router"} for layer in weights.layers]
    size = [sum(x.nbytes for x in jax.tree.leaves(t)) for t in ((layers, head), memory.layers)]
    return size[0], size[1]


def one_row(
    spec: engine.ModelSpec, weights: engine.Weights, flags: argparse.Namespace
) -> dict[int, dict[str, Times]]:
    """Prints and returns times by prompt length, for a single conversation."""
    is_small = flags.size == "small"
    yardstick = HuggingFace(spec.arch.decoder) if torch and is_small else None
    if not yardstick:
        why = "torch is not installed" if not torch else "only beside --size=small"
        print(f"no HF column: {why}\n")
    print("ms per token, batch 1 (wall / cpu); prompt and first token in seconds\n")
    print("| prompt | ours | no cache | HF | ours / HF (wall, cpu) | first token: ours | HF |")
    print("|---|---|---|---|---|---|---|")
    found = {}
    for length in flags.prompts:
        ours = Ours(spec, weights, 1, length)
        runs = {"ours": ours.cached, "no cache": ours.uncached}
        for threads in {1, os.cpu_count()} if yardstick else ():
            runs[f"HF {threads}"] = functools.partial(yardstick.cached, length, threads)
        found[length] = times = repeat(runs, flags.repeat)
        yardsticks = [times[name] for name in runs if name.startswith("HF")]
        if yardsticks:
            times["HF"] = min(yardsticks, key=lambda some: some.wall)
        cells = [ms(times["ours"]), ms(times["no cache"]), ms(times.get("HF"))]
        cells.append(quotient(times["ours"], times.get("HF")))
        cells += [f"{times[n].first:.3f}" if n in times else "-" for n in ("ours", "HF")]
        print(f"| {length} | {' | '.join(cells)} |", flush=True)
    return found


def ms(times: Times | None) -> str:
    return f"{1e3 * times.wall:.2f} / {1e3 * times.cpu:.2f}" if times else "-"


def quotient(times: Times, other: Times | None) -> str:
    return f"{times.wall / other.wall:.2f}, {times.cpu / other.cpu:.2f}" if other else "-"


def targets(found: Mapping[int, Mapping[str, Times]]) -> None:
    """Prints the targets of the small size on two cores, and what was reached."""
    if 512 in found:
        times = found[512]
        print(f"\n- prompt 512: {ms(times['ours'])} ms/token, target {TARGET_MS:g}")
        if "HF" in times:
            print(f"- against HF: {quotient(times['ours'], times['HF'])}, target {TARGET_HF:g}")
        saved = times["no cache"].wall / times["ours"].wall
        print(f"- without the cache a token takes {saved:.0f} times as long")
    if {128, 1024} <= found.keys():
        growth = quotient(found[1024]["ours"], found[128]["ours"])
        print(f"- growth from 128 to 1024: {growth}, target {TARGET_GROWTH:g}")


def rows(spec: engine.ModelSpec, weights: engine.Weights, flags: argparse.Namespace) -> None:
    """Prints tokens per second and memory traffic by batch size."""
    print(f"\nBatches, prompts of {flags.batch_prompt} slots, ours cached\n")
    print(
        "| batch | ms per step (wall / cpu) | tokens/s | weights + caches read, GB | GB/s | share |"
    )
    print("|---|---|---|---|---|---|")
    for size in flags.batches:
        ours = Ours(spec, weights, size, flags.batch_prompt)
        times = repeat({"ours": ours.cached}, flags.repeat)["ours"]
        read = [n / 1e9 for n in nbytes(spec, weights, ours.memory)]
        rate = sum(read) / times.wall
        share = f"{rate / flags.bandwidth:.0%}" if flags.bandwidth else "-"
        print(
            f"| {size} | {ms(times)} | {size / times.wall:.0f} | {read[0]:.3f} + {read[1]:.3f} "
            f"| {rate:.1f} | {share} |",
            flush=True,
        )
    if not flags.bandwidth:
        print("\nshare of the memory bandwidth: say what the device has, --bandwidth=GB/s")


def numbers(text: str) -> Sequence[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompts", type=numbers, default=[128, 512, 1024])
    parser.add_argument("--batches", type=numbers, default=[1, 4, 16])
    parser.add_argument("--batch-prompt", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--bandwidth", type=float, help="of the device's memory, GB/s")
    flags = parser.parse_args()
    if min([*flags.prompts, flags.batch_prompt]) <= TOWER.num_patches:
        parser.error(f"a prompt is longer than its image, {TOWER.num_patches} slots")
    arch = presets.WingsArch(SIZES[flags.size], TOWER, learners=("visual", "textual"), router=True)
    spec = engine.ModelSpec(arch, flags.dtype)
    device = jax.devices()[0].device_kind
    print(f"{flags.size}, {flags.dtype}, {device}, {os.cpu_count()} cores", end="")
    weights = random_weights(spec)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(weights))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    print(f", {count / 1e6:.1f} M parameters; load average before: {load:.1f}\n")
    if flags.prompts:
        found = one_row(spec, weights, flags)
        if flags.size == "small":
            targets(found)
    if flags.batches:
        rows(spec, weights, flags)


if __name__ == "__main__":
    main()
