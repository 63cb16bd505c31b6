"""The release's semantics: its visibility drawn by hand, its config key, and its leak."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_data
import tiny_model
from flax import linen as nn

from wings_jax import config as config_lib
from wings_jax import serialization, tree
from wings_jax.errors import UserError
from wings_jax.model import decoder, layout, presets
from wings_jax.weights import starting

DRAWINGS = {
    # row: from which position each slot is a visible textual key, prompt length 2 ('.' is never)
    "ttttittt": ". . 0 1 . . . . 2 3 4",  # the prompt is left out, text is renumbered
    "titt": ". . . . . 0 1",  # the image stands within the prompt: text after it only
    "itt": "0 1 2 3 4 5",  # begins with an image: every slot, the image's too
    "tttt": "0 1 2 3",  # no image: every slot
    "ttti|tt": ". . 0 . . . . 0 1",  # each conversation for itself
}


@pytest.mark.parametrize("text", DRAWINGS)
def test_visibility_of_the_release(text: str):
    modality, segments = tiny_model.row(text, 12)
    rows = layout.make_layout(
        np.ones((1, 12), np.int32), modality[None], segments[None], prompt_length=2
    )
    drawn = [layout.NEVER if mark == "." else int(mark) for mark in DRAWINGS[text].split()]
    drawn += [layout.NEVER] * (12 - len(drawn))
    np.testing.assert_array_equal(rows.visible_from[0, :, layout.TEXTUAL], drawn)
    visual = np.where(modality == layout.IMAGE, 0, layout.NEVER)
    np.testing.assert_array_equal(rows.visible_from[0, :, layout.VISUAL], visual)
    paper = layout.make_layout(np.ones((1, 12), np.int32), modality[None], segments[None])
    np.testing.assert_array_equal(
        rows.visible_from[..., layout.MAIN], paper.visible_from[..., layout.MAIN]
    )


def test_semantics_of_a_config():
    config = config_lib.default()
    assert (
        starting.resolve_arch(config_lib.from_config_dict(config).model).semantics == presets.PAPER
    )
    config.model.semantics, config.model.prompt_length = "release", 17
    arch = starting.resolve_arch(config_lib.from_config_dict(config).model)
    assert arch.semantics == presets.release_semantics(17)
    again = serialization.from_dict(presets.WingsArch, serialization.to_dict(arch), "arch")
    assert again == arch
    config.model.semantics = "mine"
    with pytest.raises(UserError, match=r"config\.model\.semantics: 'mine' is not one of"):
        config_lib.from_config_dict(config)


def test_batches_have_the_visibility(tmp_path):
    records = tiny_data.write_records(tmp_path, 6)
    file = tiny_data.write_json(tmp_path / "data.json", records)
    for prompt_length in (None, 3):
        rows = tiny_data.loader(file, prompt_length=prompt_length)[0].layout
        wanted = layout.make_layout(
            rows.tokens, rows.modality, rows.segments, prompt_length=prompt_length
        )
        np.testing.assert_array_equal(rows.visible_from, wanted.visible_from)


SYMBOLS, ROWS, STEPS = 16, 32, 200
FLOOR = math.log(SYMBOLS)


@functools.partial(jax.jit, static_argnums=0)
def train(arch: presets.WingsArch, seed: jax.Array) -> jax.Array:
    """Returns the loss of each step on fresh rows 'ttt[image]' + 12 random symbols.

    No row is repeated, so every loss is a held-out one; no causal model can reach a loss below the
    entropy of a symbol.
    """
    modality, segments = tiny_model.row("ttti" + "t" * 12, 3 + tiny_model.P + 12)
    shape = (ROWS, len(modality))
    slots = layout.make_layout(
        np.ones(shape, np.int32),
        np.broadcast_to(modality, shape),
        np.broadcast_to(segments, shape),
        prompt_length=arch.semantics.prompt_length,
    )
    module = decoder.Decoder(arch)
    first = 3 + tiny_model.P - 1  # the last image slot predicts the first symbol

    def run(module, tokens, features):
        x0 = jnp.where((slots.modality == layout.IMAGE)[..., None], features, module.embed(tokens))
        return module.logits(module(x0, slots))

    def loss(params, key):
        tokens = jax.random.randint(key, shape, 0, SYMBOLS)
        features = jax.random.normal(key, (*shape, arch.decoder.hidden_size))
        logits = nn.apply(run, module)({"params": tree.nest(params)}, tokens, features)
        wanted = tokens[:, first + 1 :]
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, first:-1], wanted).mean()

    tokens, features = jnp.zeros(shape, jnp.int32), jnp.zeros((*shape, arch.decoder.hidden_size))
    shapes = jax.eval_shape(nn.init(run, module), jax.random.key(0), tokens, features)["params"]
    params = {
        path: jnp.ones(x.shape)
        if path.endswith("scale")
        else 0.1 * jax.random.normal(jax.random.fold_in(jax.random.key(seed), number), x.shape)
        for number, (path, x) in enumerate(tree.flatten(nn.unbox(shapes)).items())
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(5e-3))

    def step(carry, key):
        params, moments = carry
        value, grads = jax.value_and_grad(loss)(params, key)
        updates, moments = optimizer.update(grads, moments)
        return (optax.apply_updates(params, updates), moments), value

    keys = jax.random.split(jax.random.key(seed + 1), STEPS)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[1]


@pytest.mark.slow
def test_the_release_leaks_and_the_paper_does_not():
    """Answers of random symbols: only attending to the future gives a loss below chance."""
    arguments = {"learners": tiny_model.BOTH, "router": True, "rank": 16}
    paper = tiny_model.arch(**arguments)
    release = tiny_model.arch(**arguments, gain=2.0, semantics=presets.release_semantics(3))
    best = {
        name: float(train(arch, 0).reshape(-1, 20).mean(1).min())
        for name, arch in {"paper": paper, "release": release}.items()
    }
    assert best["paper"] > FLOOR - 0.01, best
    assert best["release"] < FLOOR - 1.0, best
