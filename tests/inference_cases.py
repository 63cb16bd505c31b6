"""Small random models and rows for the tests of inference, and the forward pass without a cache."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import pathlib
import types
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import linen as nn

from wings_jax import checkpoint, config, tree
from wings_jax.data import conversation
from wings_jax.inference import chunks, decode, engine, sampling
from wings_jax.inference import generator as generator_lib
from wings_jax.model import layout, presets
from wings_jax.model.wings import Wings

VISION = presets.VisionArch(
    hidden_size=12,
    num_layers=2,
    num_heads=2,
    ffn_size=20,
    image_size=8,
    patch_size=4,
    activation="gelu_pytorch_tanh",
    norm_eps=1e-6,
    class_token=False,
    pre_norm=False,
    post_norm=False,
    patch_bias=True,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
SLOTS = VISION.num_patches  # 4
LENGTH, IMAGES = 56, 4  # the shape of rows that are read without a cache


def make_arch(*, kv_heads: int = 4, tie: bool = False, scaling=None, **wings) -> presets.WingsArch:
    decoder = presets.DecoderArch(
        vocab_size=29,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=kv_heads,
        head_dim=4,
        ffn_size=24,
        norm_eps=1e-5,
        rope_theta=100.0,
        rope_scaling=scaling,
        max_positions=256,
        qkv_bias=True,
        tie_embeddings=tie,
    )
    return presets.WingsArch(decoder, VISION, rank=3, router_positions=256, **wings)


BOTH = ("visual", "textual")
ARCHS = {
    "plain": make_arch(kv_heads=2),
    "visual": make_arch(learners=("visual",)),
    "textual": make_arch(learners=("textual",), tie=True),
    "router": make_arch(learners=BOTH, router=True, gain=2.0),
    "gqa": make_arch(learners=BOTH, router=True, kv_heads=1),
    "some_layers": make_arch(learners=BOTH, router=True, kv_heads=2, learner_layers=(1,)),
    "prefix": make_arch(learners=BOTH, router=True, kv_heads=2, prefix_length=3),
    "lora": make_arch(learners=BOTH, router=True, kv_heads=2, lora_rank=2),
    "llama3": make_arch(
        learners=BOTH, router=True, scaling=presets.RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    ),
}
ARCHS |= {
    # Two learner heads beside four of the LLM; layers with and without rope.
    "qwen3": dataclasses.replace(
        ARCHS["gqa"],
        decoder=dataclasses.replace(ARCHS["gqa"].decoder, head_dim=8, qkv_bias=False, qk_norm=True),
    ),
    "smollm3": dataclasses.replace(
        ARCHS["gqa"],
        decoder=dataclasses.replace(ARCHS["gqa"].decoder, qkv_bias=False, no_rope_layers=(1,)),
    ),
}


extend = jax.jit(engine.extend, static_argnums=0)
step = jax.jit(engine.step, static_argnums=0)
_prefill = jax.jit(
    lambda spec, weights, chunk, features, slots: engine.prefill(
        spec, weights, chunk, features, dict(slots)
    ),
    static_argnums=(0, 4),
)
_encode = jax.jit(engine.encode, static_argnums=0)
_head = jax.jit(engine.logits, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _forward(arch: presets.WingsArch, params, batch: layout.Batch):
    model = Wings(arch)
    hidden = model.apply({"params": params}, batch)
    return model.apply({"params": params}, hidden, method=Wings.logits)


def prefill(spec, weights, chunk, features, slots):
    return _prefill(spec, weights, chunk, features, tuple(slots.items()))


def make(arch: presets.WingsArch, *, scale: float = 0.35, seed: int = 0):
    """Returns spec, weights and nested params with every value random."""
    rows = layout.make_layout(np.zeros((1, 5), int), np.array([[1, 2, 2, 2, 2]]))
    batch = layout.Batch(rows, np.zeros((1, 5), np.int32), np.zeros((1, 1, 8, 8, 3), np.uint8))
    model = Wings(arch)
    shapes = jax.eval_shape(
        lambda: nn.unbox(model.init(jax.random.key(0), batch, method=Wings.initialize)["params"])
    )
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, scale, x.shape).astype(np.float32)), shapes
    )
    spec = engine.ModelSpec(arch)
    return spec, engine.split_layers(params, spec), params


def random_rows(
    arch: presets.WingsArch, shapes: Sequence[str], seed: int
) -> list[chunks.PromptSlots]:
    """Returns rows as "tiit" draws them: t a text slot, each run of "ii" one image of SLOTS."""
    rng = np.random.default_rng(seed)
    slots = []
    for shape in shapes:
        ids, images = [], []
        for letter in shape.replace("ii", "I"):
            if letter == "I":
                ids.append(conversation.IMAGE_ID)
                images.append(rng.integers(0, 256, (8, 8, 3), np.uint8))
            else:
                ids.append(int(rng.integers(0, arch.decoder.vocab_size)))
        slots.append(chunks.from_ids(ids, images, SLOTS))
    return slots


def text(ids: Sequence[int]) -> chunks.PromptSlots:
    return chunks.from_ids(list(ids), [], SLOTS)


def uncached_logits(
    spec: engine.ModelSpec, params, rows: Sequence[chunks.PromptSlots]
) -> list[np.ndarray]:
    """Returns f32[n,V] of every row by the training forward, padded to one shape."""
    tokens, modality = (np.zeros((len(rows), LENGTH), np.int32) for _ in range(2))
    images = np.zeros((len(rows), IMAGES, 8, 8, 3), np.uint8)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = row.tokens
        modality[index, : len(row.tokens)] = row.modality
        images[index, : len(row.images)] = np.stack(row.images) if row.images else 0
    batch = layout.Batch(layout.make_layout(tokens, modality), tokens, images)
    logits = np.asarray(_forward(spec.arch, params, batch))
    return [row_logits[: len(row.tokens)] for row_logits, row in zip(logits, rows, strict=True)]


def uncached_greedy(
    spec: engine.ModelSpec, params, rows: Sequence[chunks.PromptSlots], steps: int
) -> list[list[int]]:
    """Returns greedy ids; every token by a full forward pass."""
    ids: list[list[int]] = [[] for _ in rows]
    for _ in range(steps):
        whole = [chunks.join(row, text(tokens)) for row, tokens in zip(rows, ids, strict=True)]
        for tokens, logits in zip(ids, uncached_logits(spec, params, whole), strict=True):
            tokens.append(int(logits[-1].argmax()))
    return ids


def make_chunk(spec, weights, rows, starts, *, length):
    """Returns the chunk of these rows, padded to `length` at least, and encoded features."""
    images = [image for row in rows for image in row.images]
    features = _encode(spec, weights, jnp.asarray(np.stack(images))) if images else None
    return chunks.make_chunk(rows, starts, spec.arch, length=length), features


def check_slots(spec, weights, hidden, expected, rows, starts) -> None:
    """Asserts that states give the expected logits in the rows' slots."""
    for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
        count = len(row.tokens)
        actual = _head(spec, weights, hidden[index, :count])
        row_logits = expected[index][start : start + count]
        np.testing.assert_allclose(actual, row_logits, rtol=1e-5, atol=1e-5)


def greedy(spec, weights, rows, steps: int) -> list[list[int]]:
    """Returns the greedy ids of a batch by the jitted loop."""
    starts = np.zeros(len(rows), np.int32)
    length = max(len(row.tokens) for row in rows)
    chunk, features = make_chunk(spec, weights, rows, starts, length=length)
    slots = {"main": length + steps, "textual": length + steps, "visual": 2 * SLOTS}
    slots = tuple((name, slots[name]) for name in ("main", *spec.arch.learners))
    names = {"main", *chunk.picks}
    slots = tuple((name, size) for name, size in slots if name in names)
    cache, logits = decode.prefill(spec, weights, chunk, features, slots=slots)
    each = [sampling.SamplingParams(max_new_tokens=steps)] * len(rows)
    params = sampling.stack_params(each, spec.arch.decoder.vocab_size)
    stops = jnp.array([-1])
    state = decode.begin(logits, params, stops, None)
    first = np.asarray(state.tokens)[None]
    *_, generated = decode.decode(spec, weights, cache, state, params, stops, steps=steps - 1)
    return np.concatenate([first, generated["tokens"]]).T.tolist()


def with_vocabulary(arch: presets.WingsArch, size: int) -> presets.WingsArch:
    """Returns the architecture with another vocabulary."""
    return dataclasses.replace(arch, decoder=dataclasses.replace(arch.decoder, vocab_size=size))


@functools.cache
def tokenizer():
    """Returns the tokenizer of the tiny base that ships with the package."""
    directory = importlib.resources.files("wings_jax") / "assets" / "tiny" / "llm"
    return transformers.AutoTokenizer.from_pretrained(str(directory))


def write_checkpoint(
    directory: pathlib.Path,
    case: str = "router",
    *,
    parts: Sequence[str] = ("vision", "projector", "decoder"),
    files: Mapping[str, str] = types.MappingProxyType({}),
    positions: int = 0,
) -> pathlib.Path:
    """Writes a random small model with the tiny base's tokenizer; returns its workdir.

    `files` are added to those of the tokenizer; `positions` is how many it has, if not those of
    the case.
    """
    llm = importlib.resources.files("wings_jax") / "assets" / "tiny" / "llm"
    tokenizer_files = {
        name: (llm / name).read_text(encoding="utf-8")
        for name in ("tokenizer.json", "tokenizer_config.json")
    }
    arch = with_vocabulary(ARCHS[case], len(tokenizer()))
    if positions:
        decoder = dataclasses.replace(arch.decoder, max_positions=positions)
        arch = dataclasses.replace(arch, decoder=decoder, router_positions=positions)
    _, _, params = make(arch)
    flat = tree.flatten({part: params[part] for part in parts})
    all_files = {**tokenizer_files, **files}
    checkpoint.write_checkpoint(directory, flat, config.Config(), arch, all_files)
    return directory


@functools.cache
def generator(rows: int, case: str = "router") -> generator_lib.Generator:
    """Returns a generator of a random small model with the tiny base's tokenizer."""
    return generator_of(ARCHS[case], rows)


def generator_of(arch: presets.WingsArch, rows: int = 4, **options) -> generator_lib.Generator:
    arch = with_vocabulary(arch, len(tokenizer()))
    _, _, params = make(arch)
    return generator_lib.Generator(arch, params, tokenizer(), "chatml", rows=rows, **options)
