"""The pattern engine: both directions, and an error by name for all that does not fit."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import pytest

from wings_jax.weights import rules, transfer
from wings_jax.weights.tensors import WeightsError

TABLE = rules.table("""
embed.weight            embed/embedding     V D <-> V D
layers.{l}.q.weight     layers/q/kernel     (N H) D <-> D N H
layers.{l}.norm.bias    layers/norm/bias    D <-> D
patch.weight            patch/kernel        E c y x <-> y x c E
""")
SHAPES = {
    "embed/embedding": (7, 6),
    "layers/q/kernel": (3, 6, 2, 3),
    "layers/norm/bias": (3, 6),
    "patch/kernel": (2, 4, 3, 5),
}


def hf_side(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"embed.weight": (7, 6), "patch.weight": (5, 3, 2, 4)}
    for layer in range(3):
        shapes |= {f"layers.{layer}.q.weight": (6, 6), f"layers.{layer}.norm.bias": (6,)}
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def param_side(dtype=np.float32) -> dict[str, jax.ShapeDtypeStruct]:
    return {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in SHAPES.items()}


def test_elements_land_where_the_pattern_says():
    tensors = hf_side()
    params = transfer.import_tree(TABLE, tensors, param_side())
    kernel = params["layers/q/kernel"]
    assert kernel.shape == (3, 6, 2, 3)
    for layer, d, n, h in np.ndindex(kernel.shape):
        assert kernel[layer, d, n, h] == tensors[f"layers.{layer}.q.weight"][n * 3 + h, d]
    for e, c, y, x in np.ndindex(5, 3, 2, 4):
        assert params["patch/kernel"][y, x, c, e] == tensors["patch.weight"][e, c, y, x]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_there_and_back_is_bit_exact(dtype):
    tensors = {key: array.astype(dtype) for key, array in hf_side().items()}
    params = transfer.import_tree(TABLE, tensors, param_side(dtype))
    back = transfer.export_tree(TABLE, params)
    assert back.keys() == tensors.keys()
    for key, array in tensors.items():
        assert back[key].dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(back[key]), array)


def test_dtypes_change_on_the_way():
    params = transfer.import_tree(TABLE, hf_side(), param_side(ml_dtypes.bfloat16))
    assert {array.dtype for array in params.values()} == {np.dtype(ml_dtypes.bfloat16)}
    back = transfer.export_tree(TABLE, params, dtype=np.float32)
    got = np.asarray(back["embed.weight"])
    assert got.dtype == np.float32
    wanted = hf_side()["embed.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(got, wanted.astype(np.float32))


def test_arrays_with_a_sharding_are_placed():
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
    params = param_side()
    shape = params["layers/q/kernel"].shape
    params["layers/q/kernel"] = jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
    placed = transfer.import_tree(TABLE, hf_side(), params)["layers/q/kernel"]
    plain = transfer.import_tree(TABLE, hf_side(), param_side())["layers/q/kernel"]
    assert placed.sharding == sharding
    np.testing.assert_array_equal(placed, plain)


def changed(**changes) -> dict[str, np.ndarray]:
    tensors = hf_side()
    for key, value in changes.items():
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    return tensors


NAN = np.full((7, 6), np.nan, np.float32)
MISTAKES = {
    "missing keys: layers.1.q.weight": changed(**{"layers.1.q.weight": None}),
    "does not have: layers.3.q.weight": changed(**{"layers.3.q.weight": np.zeros((6, 6))}),
    "does not have: head.weight": changed(**{"head.weight": np.zeros(3)}),
    r"embed.weight is \[8, 6\], embed/embedding needs \[7, 6\]": changed(
        **{"embed.weight": np.zeros((8, 6), np.float32)}
    ),
    "embed.weight of the file holds NaN": changed(**{"embed.weight": NAN}),
    "of the file holds NaN or inf": changed(**{"embed.weight": NAN.astype(ml_dtypes.bfloat16)}),
    "missing keys: embed.weight; unused keys: emb.weight": changed(
        **{"embed.weight": None, "emb.weight": np.zeros((7, 6))}
    ),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message: str):
    with pytest.raises(WeightsError, match=message) as caught:
        transfer.import_tree(TABLE, MISTAKES[message], param_side(), source="the file")
    assert "\n" not in str(caught.value)


def test_a_path_that_no_rule_makes():
    params = param_side() | {"router/kernel": jax.ShapeDtypeStruct((3, 2), np.float32)}
    with pytest.raises(WeightsError, match="nothing for the parameters router/kernel"):
        transfer.import_tree(TABLE, hf_side(), params)
    params = transfer.import_tree(TABLE, hf_side(), params, fresh=["router/.*"])
    assert "router/kernel" not in params
    with pytest.raises(WeightsError, match="cannot hold router/kernel"):
        transfer.export_tree(TABLE, params | {"router/kernel": np.zeros((3, 2))})


def test_patterns_must_match():
    for dims in ("A B", "A B <-> A", "A B <-> A C", "A A <-> A A"):
        with pytest.raises(ValueError, match="both sides"):
            rules.parse(dims)
