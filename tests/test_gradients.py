"""Gradients that are written out equal those that JAX derives."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from wings_jax import axes
from wings_jax.model import layers, layout, projection
from wings_jax.model.wings import Wings
from wings_jax.training import loss


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def assert_equal_gradients(function, reference, *inputs):
    """Compares values and gradients of a weighted sum of the results."""

    def total(of):
        def run(*arrays):
            result = of(*arrays)
            return (result * jnp.cos(jnp.arange(result.size).reshape(result.shape))).sum()

        numbers = tuple(range(len(inputs)))
        return jax.tree.leaves(jax.jit(jax.value_and_grad(run, argnums=numbers))(*inputs))

    for result, expected in zip(total(function), total(reference), strict=True):
        assert float(jnp.abs(expected).max()) > 1e-3
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=5e-6)


def test_rms_norm_equals_its_definition():
    def reference(x, scale):
        return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    assert_equal_gradients(
        lambda x, scale: layers.rms_norm(x, scale, 1e-6), reference, draw(0, 2, 7, 12), draw(1, 12)
    )


@pytest.mark.parametrize(
    ("eqn", "kernel"),
    [("BTD,DNH->BTNH", (12, 3, 4)), ("BTD,DF->BTF", (12, 5)), ("BTD,DR->BTR", (12, 2))],
)
def test_projection_equals_the_einsum(eqn, kernel):
    assert_equal_gradients(
        lambda x, kernel: projection.project(eqn, x, kernel),
        lambda x, kernel: jnp.einsum(eqn, x, kernel),
        draw(0, 2, 7, 12),
        draw(1, *kernel),
    )


@pytest.mark.parametrize("chunk", [3, 8])
def test_loss_in_chunks_has_the_gradient_of_all_logits(chunk):
    model = Wings(tiny_model.VARIANTS["router"])
    params, rows = tiny_model.init(model), tiny_model.batch(["ttittt", "tttttttt"])
    hidden = model.apply({"params": params}, rows)
    targets = jnp.asarray(rows.targets)

    def whole(params, hidden):
        logits = model.apply({"params": params}, hidden, method=Wings.logits)
        picked = jnp.take_along_axis(
            jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], axis=-1
        )
        return -jnp.where(targets != layout.IGNORE, picked[..., 0], 0.0).sum() * 0.5

    def chunked(params, hidden):
        return loss.token_loss(model, params, hidden, targets, chunk)[0] * 0.5

    results = [jax.grad(of, argnums=(0, 1))(params, hidden) for of in (chunked, whole)]
    for result, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(result, expected, atol=5e-6)


@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_on_a_mesh_equals_that_of_one_device(shape, tied):
    decoder = dataclasses.replace(tiny_model.DECODER, tie_embeddings=tied)
    model = Wings(dataclasses.replace(tiny_model.VARIANTS["router"], decoder=decoder))
    params = tiny_model.init(model)
    hidden = draw(0, 8, 24, decoder.hidden_size)
    targets = jax.random.randint(jax.random.key(1), hidden.shape[:2], 0, decoder.vocab_size)
    targets = jnp.where(targets < 3, layout.IGNORE, targets)

    @jax.jit
    def run(params, hidden):
        def total(params, hidden):
            hidden = axes.constrain(hidden, "BTD")
            return loss.token_loss(model, params, hidden, targets, 8)

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, hidden)

    expected = run(params, hidden)
    with jax.set_mesh(axes.make_mesh(shape)):
        result = run(params, hidden)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(result), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_loss_casts_the_head_before_the_loop_over_chunks():
    """So the devices gather it once. The other head-sized input is the sum of its gradients."""
    model = Wings(tiny_model.VARIANTS["router"], jnp.bfloat16)
    params = tiny_model.init(model)
    decoder = model.arch.decoder
    hidden = draw(0, 2, 24, decoder.hidden_size).astype(jnp.bfloat16)
    targets = jnp.ones(hidden.shape[:2], jnp.int32)

    def total(params):
        return loss.token_loss(model, params, hidden, targets, 8)[0]

    program = jax.make_jaxpr(jax.grad(total))(params)
    (scan,) = (equation for equation in program.eqns if equation.primitive.name == "scan")
    head = (decoder.hidden_size, decoder.vocab_size)
    dtypes = [str(x.aval.dtype) for x in scan.invars if x.aval.shape == head]
    assert sorted(dtypes) == ["bfloat16", "float32"]
