"""Adapters on weights that are loaded: LLM and tower are shared, the other parts are replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from wings_jax import tree
from wings_jax.inference.engine import ModelSpec, Weights
from wings_jax.model import joined
from wings_jax.model.layers import is_matrix
from wings_jax.weights import adapter, digests
from wings_jax.weights.tensors import LazyTensor

LAYERS = "decoder/layers/"  # of the parameters that `Weights.layers` holds


def base_tensors(weights: Weights) -> dict[str, LazyTensor]:
    """Returns name -> tensor of LLM and tower, as `digests.split_tensors` names them."""
    tensors: dict[str, LazyTensor] = {}
    layers = [joined.split_kernels(tree.flatten(layer)) for layer in weights.layers]
    for path in layers[0]:
        if adapter.is_base(LAYERS + path):
            tensors |= digests.layer_tensors(LAYERS + path, [layer[path] for layer in layers])

    rest = {path: x for path, x in tree.flatten(weights.rest).items() if adapter.is_base(path)}
    return tensors | digests.split_tensors(rest)


def replace_parts(weights: Weights, params: Mapping[str, Any], spec: ModelSpec) -> Weights:
    """Returns the weights of a base with an adapter's parts; the base's arrays are shared.

    Args:
      params: flat parameters of the adapter, [L, ...] in the decoder's layers.
      spec: of the base with the adapter.
    """
    # The same casts as in `engine.split_layers`.
    parts = {
        path: jnp.asarray(x, spec.dtype if is_matrix(path) else jnp.float32)
        for path, x in params.items()
    }
    in_layers, others = tree.split(parts, lambda path: path.startswith(LAYERS))

    # [L, ...] -> L times [...]
    layers = []
    for index, layer in enumerate(weights.layers):
        flat = {
            path: x for path, x in tree.flatten(layer).items() if adapter.is_base(LAYERS + path)
        }
        flat |= {path.removeprefix(LAYERS): x[index] for path, x in in_layers.items()}
        layers.append(tree.nest(flat))
    rest = {path: x for path, x in tree.flatten(weights.rest).items() if adapter.is_base(path)}
    return Weights(tuple(layers), tree.nest({**rest, **others}))
