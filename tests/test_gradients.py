"""Gradients that are written out equal those that JAX derives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

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
