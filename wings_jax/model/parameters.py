"""Parameters of a Wings model: shapes, shardings, initial values, placement on a mesh.

Everything here works on *flat* trees, `{"decoder/norm/scale": leaf}`. Shapes and logical axes come
from tracing the model; there is no separate table of sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from wings_jax import axes, tree
from wings_jax.model import layout
from wings_jax.model.presets import WingsArch
from wings_jax.model.wings import Wings


def default_dtype() -> str:
    """Returns the dtype of matmuls and frozen parameters: float32 on a CPU, else bfloat16."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def check_mesh(arch: WingsArch, mesh: Mesh, batch_size: int = 0, *, flag: str) -> None:
    """Checks that the mesh divides the model and the batch.

    Raises:
      MeshError: naming `flag` and every dimension that it does not divide.
    """
    # Logical axis -> size, by part of the model (the letters of `axes.py`).
    decoder, vision = arch.decoder, arch.vision
    sizes_by_part = {
        "the batch": {"B": batch_size},
        "the LLM": {
            "D": decoder.hidden_size,
            "N": decoder.num_heads,
            "K": decoder.num_kv_heads,
            "F": decoder.ffn_size,
            "V": decoder.vocab_size,
        },
        "the learners": {"N": decoder.learner_heads if arch.learners else 0},
        "the vision tower": {
            "E": vision.hidden_size,
            "N": vision.num_heads,
            "F": vision.ffn_size,
        },
    }

    for part, sizes in sizes_by_part.items():
        try:
            axes.check_divides(mesh.shape, sizes)
        except axes.MeshError as error:
            raise axes.MeshError(f"{flag}: {part}: {error}") from None


def abstract_params(
    arch: WingsArch, dtype: Any = jnp.float32, *, mesh: Mesh | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns path -> shape of every parameter, with its sharding where a mesh is given.

    Traces the initialization: nothing is allocated.
    """
    # flax boxes each parameter with the names of its logical axes.
    boxed = jax.eval_shape(functools.partial(_initialize, arch), jax.random.key(0))
    specs = tree.flatten(nn.get_partition_spec(boxed))

    return {
        path: jax.ShapeDtypeStruct(
            leaf.shape, dtype, sharding=mesh and axes.sharding_of(mesh, specs[path])
        )
        for path, leaf in tree.flatten(nn.unbox(boxed)).items()
    }


def initialize_params(
    arch: WingsArch, paths: Sequence[str], abstract: Mapping[str, Any], seed: int
) -> dict[str, jax.Array]:
    """Returns newly initialized f32 parameters of these paths, at the shardings of `abstract`.

    They are created directly with their final sharding; no host or device holds them whole. The
    value of a parameter depends on `arch` and `seed` only, not on which other paths are given.
    """
    if not paths:
        return {}

    # The compiler removes the initialization of the parameters that are not returned.
    def init(key: jax.Array) -> dict[str, jax.Array]:
        flat = tree.flatten(nn.unbox(_initialize(arch, key)))
        return {path: flat[path] for path in paths}

    shardings = {path: abstract[path].sharding for path in paths}
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def place_params(
    flat: Mapping[str, Any], abstract: Mapping[str, Any], dtype: Any = None
) -> dict[str, jax.Array]:
    """Returns the parameters at the shardings of `abstract`, from host or device arrays.

    They are cast to `dtype`; with None each keeps its own.
    """

    def put(path: str, value: Any) -> jax.Array:
        sharding = abstract[path].sharding
        # From device to device, without a copy on the host.
        if isinstance(value, jax.Array):
            return jax.device_put(value.astype(dtype or value.dtype), sharding)

        # A host array of any size: each device gets its part, cast part by part.
        value = np.asarray(value)
        return jax.make_array_from_callback(
            value.shape, sharding, lambda index: value[index].astype(dtype or value.dtype)
        )

    return {path: put(path, value) for path, value in flat.items()}


def _initialize(arch: WingsArch, key: jax.Array) -> Mapping[str, Any]:
    """Returns boxed parameters; a row of one image and one text token uses all of them."""
    # One row of P image slots and one text slot: [1, P+1].
    side, patches = arch.vision.image_size, arch.vision.num_patches
    modality = np.full((1, patches + 1), layout.IMAGE)
    modality[:, -1] = layout.TEXT
    rows = layout.make_layout(np.zeros_like(modality), modality)

    # One image: u8[B,I,height,width,3].
    images = np.zeros((1, 1, side, side, 3), np.uint8)

    # Parameters do not depend on the kernel, and einsum runs everywhere.
    model = Wings(arch, kernel="einsum")
    batch = layout.Batch(rows, rows.tokens, images)
    return model.init(key, batch, method=Wings.initialize)["params"]
