"""Prefix tuning: what is added to LLaVA, who attends to it, and how it is sharded."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tiny_model

from wings_jax import axes, tree
from wings_jax.model import layers, layout, parameters
from wings_jax.model.wings import Wings


def test_prefix_of_zero_gate_or_zero_length_is_llava():
    rows = tiny_model.batch(["ttittit", "tttttt", "itt|titt"])
    plain = tiny_model.arch()
    model = Wings(dataclasses.replace(plain, prefix_length=3))
    params = tree.flatten(tiny_model.init(model))
    expected = tiny_model.logits(Wings(plain), tree.nest(params), rows)
    open_gate = tiny_model.logits(model, tree.nest(params), rows)
    shut = {**params, "decoder/layers/prefix/gate": np.zeros((3, 4), np.float32)}
    np.testing.assert_allclose(tiny_model.logits(model, tree.nest(shut), rows), expected, atol=1e-6)
    is_used = rows.layout.modality != layout.PADDING
    assert (np.abs(open_gate - expected).max(-1) > 1e-3)[is_used].all()
    added = set(parameters.abstract_params(model.arch)) - set(parameters.abstract_params(plain))
    assert added == {f"decoder/layers/prefix/{leaf}" for leaf in ("k", "v", "gate")}


def test_prefix_is_visible_to_every_conversation_but_not_to_padding():
    module = layers.Prefix(length=5, kv_heads=2)
    rows = tiny_model.batch(["titt|tt", "tt"], images=1).layout
    q = jax.random.normal(jax.random.key(0), (*rows.tokens.shape, 4, 8))
    params = {
        "k": jax.random.normal(jax.random.key(1), (5, 2, 8)),
        "v": jax.random.normal(jax.random.key(2), (5, 2, 8)),
        "gate": jnp.array([0.0, 0.5, 1.0, -2.0]),
    }
    out = np.asarray(module.apply({"params": params}, q, layout.query_visibility(rows)))
    is_used = rows.modality != layout.PADDING
    assert not out[~is_used].any()
    assert not out[:, :, 0].any()
    assert out[is_used][:, 1:].any(-1).all()
    keys, values = (np.repeat(params[name], 2, axis=1) for name in "kv")
    weights = jax.nn.softmax(np.einsum("btnh,snh->btns", q, keys) / np.sqrt(8), axis=-1)
    expected = np.einsum("btns,snh->btnh", weights, values) * np.tanh(params["gate"])[:, None]
    np.testing.assert_allclose(out[is_used], expected[is_used], atol=1e-5)


def test_prefix_changes_neither_masses_nor_router():
    """The main attention's rows stay as they are, so what they look at still adds up to 1."""
    model = Wings(tiny_model.arch(learners=tiny_model.BOTH, router=True, prefix_length=3))
    rows = tiny_model.batch(["ttittit", "tttttt"])
    params = tiny_model.init(model)
    classes = jax.nn.one_hot(rows.layout.modality, 3)

    @jax.jit
    def first_layer(params):
        variables = model.apply({"params": params}, rows, classes, mutable=["intermediates"])[1]
        sown = variables["intermediates"]["decoder"]["layers"]
        return sown["masses"][0], sown["gates"][0][0]

    masses, gates = first_layer(params)
    is_used = rows.layout.modality != layout.PADDING
    np.testing.assert_allclose(np.asarray(masses.sum(-1))[:, is_used], 1, atol=1e-5)
    moved = jax.tree.map(np.copy, params)
    moved["decoder"]["layers"]["prefix"]["v"] += 1
    np.testing.assert_allclose(first_layer(moved)[1], gates, atol=1e-6)
    assert np.abs(first_layer(moved)[0][1:] - masses[1:]).max() > 1e-3


def test_prefix_is_sharded_as_its_heads():
    mesh = axes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    abstract = parameters.abstract_params(tiny_model.arch(prefix_length=3), mesh=mesh)
    specs = {
        path: abstract[f"decoder/layers/prefix/{path}"].sharding.spec for path in ("k", "gate")
    }
    assert tuple(specs["k"]) == (None, None, "tensor", None)
    assert tuple(specs["gate"]) == (None, "tensor")
