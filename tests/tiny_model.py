"""Small random models and batches for the tests: every parameter is random, none is zero."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
from flax import linen as nn

from wings_jax.model import layout, presets
from wings_jax.model.wings import Wings

DECODER = presets.DecoderArch(
    vocab_size=64,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_size=64,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    max_positions=512,
    qkv_bias=True,
    tie_embeddings=False,
)
VISION = presets.VisionArch(
    hidden_size=16,
    num_layers=3,
    num_heads=2,
    ffn_size=32,
    image_size=16,
    patch_size=8,
    activation="gelu_pytorch_tanh",
    norm_eps=1e-6,
    class_token=False,
    pre_norm=False,
    post_norm=True,
    patch_bias=True,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
BOTH = ("visual", "textual")
CLIP = dataclasses.replace(VISION, class_token=True, pre_norm=True, patch_bias=False)


def arch(**wings) -> presets.WingsArch:
    return presets.WingsArch(
        DECODER, **{"vision": VISION, "rank": 4, "router_positions": 64, **wings}
    )


VARIANTS = {
    "llava": arch(),
    "visual": arch(learners=("visual",)),
    "textual": arch(learners=("textual",)),
    "both": arch(learners=BOTH),
    "router": arch(learners=BOTH, router=True),
    "some_layers": arch(learners=BOTH, router=True, learner_layers=(0, 2), gain=2.0),
    "lora": arch(learners=BOTH, router=True, lora_rank=3, lora_alpha=3.0),
    "prefix": arch(learners=BOTH, router=True, prefix_length=3),
    "clip_identity": arch(
        learners=BOTH,
        router=True,
        projector="identity",
        vision=dataclasses.replace(CLIP, hidden_size=32),
    ),
}

# LLMs whose layers have what those of Qwen2 have not.
QWEN3 = dataclasses.replace(DECODER, head_dim=16, qkv_bias=False, qk_norm=True)
SMOLLM3 = dataclasses.replace(DECODER, qkv_bias=False, tie_embeddings=True, no_rope_layers=(1,))
VARIANTS |= {
    "qwen3": dataclasses.replace(arch(learners=BOTH, router=True), decoder=QWEN3),
    "smollm3": dataclasses.replace(arch(learners=BOTH, router=True), decoder=SMOLLM3),
}

P = VISION.num_patches


def row(text: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns modality and segments of a row drawn as 't' text, 'i' image, '|' next segment."""
    modality, segments, segment = [], [], 1
    for mark in text:
        if mark == "|":
            segment += 1
            continue
        count = P if mark == "i" else 1
        modality += [layout.IMAGE if mark == "i" else layout.TEXT] * count
        segments += [segment] * count
    short = length - len(modality)
    return np.array(modality + [layout.PADDING] * short), np.array(segments + [0] * short)


def batch(rows: list[str], length: int = 0, images: int = 0, seed: int = 0) -> layout.Batch:
    """Returns a batch of drawn rows with random tokens and images, a function of each row.

    A row's content does not depend on the others, on its index, or on the padding.
    """
    length = length or max(sum(P if m == "i" else m == "t" for m in text) for text in rows)
    images = images or max(text.count("i") for text in rows)
    drawn = [row(text, length) for text in rows]
    modality, segments = (np.stack(x) for x in zip(*drawn, strict=True))
    tokens = np.zeros(modality.shape, np.int32)
    pixels = np.zeros((len(rows), images, 16, 16, 3), np.uint8)
    for i, text in enumerate(rows):
        rng = np.random.default_rng([seed, *text.encode()])
        tokens[i] = np.resize(rng.integers(1, 64, 200), length)
        pixels[i, : text.count("i")] = rng.integers(0, 256, (text.count("i"), 16, 16, 3))

    slots = layout.make_layout(tokens, modality, segments)
    is_next = (segments[:, 1:] == segments[:, :-1]) & (modality[:, 1:] == layout.TEXT)
    targets = np.full(tokens.shape, layout.IGNORE, np.int32)
    targets[:, :-1] = np.where(is_next, slots.tokens[:, 1:], layout.IGNORE)
    return layout.Batch(slots, targets, pixels)


@functools.cache
def initial(model: Wings, seed: int = 0):
    """Returns newly initialized parameters."""
    vision = model.arch.vision
    modality = np.full((1, vision.num_patches + 1), layout.IMAGE)
    modality[0, 0] = layout.TEXT
    pixels = np.zeros((1, 1, vision.image_size, vision.image_size, 3), np.uint8)
    batch_of_one = layout.Batch(layout.make_layout(modality, modality), modality, pixels)
    run = jax.jit(
        lambda key: nn.unbox(model.init(key, batch_of_one, method=Wings.initialize)["params"])
    )
    return run(jax.random.key(seed))


@functools.cache
def init(model: Wings, *, seed: int = 0, scale: float = 0.2):
    """Returns parameters none of which has its initial value, so that every term has an effect."""
    leaves, treedef = jax.tree.flatten(initial(model, seed))
    rng = np.random.default_rng(seed)
    changed = [np.asarray(x) + scale * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(treedef, changed)


@functools.partial(jax.jit, static_argnums=0)
def intermediates(model: Wings, params, rows: layout.Batch):
    """Returns what the decoder's layers sow, by name, stacked over the layers."""
    _, sown = model.apply({"params": params}, rows, mutable=["intermediates"])
    return {k: v[0] for k, v in sown["intermediates"]["decoder"]["layers"].items()}


@functools.partial(jax.jit, static_argnums=0)
def _run(model: Wings, params, rows: layout.Batch):
    hidden = model.apply({"params": params}, rows)
    return model.apply({"params": params}, hidden, method=Wings.logits)


def logits(model: Wings, params, rows: layout.Batch) -> np.ndarray:
    """Returns f32[B,T,V]; compiles once per model and shape."""
    return np.asarray(_run(model, params, rows))
