"""What the layers' forward pass saves for their backward pass, from the traced decoder."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Var

from wings_jax import tree
from wings_jax.model import layout, parameters
from wings_jax.model.decoder import Decoder
from wings_jax.model.presets import WingsArch

_DECODER = "decoder/"
_LANES = 128  # a TPU stores rows of a multiple of these


@functools.cache
def saved_bytes(
    arch: WingsArch,
    trained: frozenset[str],
    *,
    remat: str,
    slots: int,
    images: int,
    dtype: str,
    tensor: int,
    is_tpu: bool,
) -> float:
    """Returns the bytes of a device that are saved of one row, but for the layers' inputs.

    The decoder is traced with a policy of `decoder.REMAT`, so that every policy is counted as JAX
    applies it. Its attention is one that names its results.

    Args:
      trained: paths of the trained parameters.
      slots: T of a row.
      images: of a row.
      dtype: of the matmuls.
      tensor: devices of this mesh axis, over which all but rows of the stream are sharded.
      is_tpu: whether the arrays are a TPU's.
    """
    if remat == "full":
        return 0.0

    # The inputs of the layers are rows of the stream, [L, 1, T, D].
    width = arch.decoder.hidden_size
    inputs = arch.decoder.num_layers * slots * width * jnp.dtype(dtype).itemsize

    total = 0.0
    for saved in _saved_arrays(arch, trained, remat, slots, images, dtype, is_tpu):
        *leading, last = saved.shape
        stored = -(-last // _LANES) * _LANES if is_tpu else last
        size = math.prod(leading) * stored * saved.dtype.itemsize
        total += size if last == width else size / tensor
    return total - inputs


def _saved_arrays(
    arch: WingsArch,
    trained: frozenset[str],
    remat: str,
    slots: int,
    images: int,
    dtype: str,
    is_tpu: bool,
) -> list[Any]:
    """Returns the shapes [L,...] of what the decoder's backward pass reads and is computed."""
    params = parameters.abstract_params(arch)
    in_decoder = {p.removeprefix(_DECODER): x for p, x in params.items() if p.startswith(_DECODER)}
    variables, constants = tree.split(in_decoder, lambda path: _DECODER + path in trained)

    decoder = Decoder(arch, jnp.dtype(dtype), "splash" if is_tpu else "chunked", remat)
    tokens = np.zeros((1, slots), np.int32)
    rows = layout.make_layout(tokens, tokens)

    def residuals(variables: Mapping, constants: Mapping, x0: jax.Array) -> list[jax.Array]:
        def hidden(variables: Mapping, x0: jax.Array) -> Any:
            params = {"params": tree.nest({**constants, **variables})}
            return decoder.apply(params, x0, rows, image_slots=images * arch.vision.num_patches)

        return jax.tree.leaves(jax.vjp(hidden, variables, x0)[1])

    x0 = jax.ShapeDtypeStruct((1, slots, arch.decoder.hidden_size), jnp.float32)
    traced = jax.make_jaxpr(residuals)(variables, constants, x0).jaxpr

    # Each once; parameters, which exist already, are inputs of the program.
    computed = dict.fromkeys(x for x in traced.outvars if isinstance(x, Var))
    avals: list[Any] = [x.aval for x in computed if x not in traced.invars]
    return [x for x in avals if x.shape[:1] == (arch.decoder.num_layers,)]
