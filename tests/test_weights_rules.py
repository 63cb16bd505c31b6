"""The pattern engine: both directions, and an error by name for all that does not fit."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import pytest

from wings_jax.weights import rules

TABLE = rules.table("""
embed.weight            embed/embedding     V D <-> V D
layers.{l}.q.weight     layers/q/kernel     (N H) D <-> D N H
layers.{l}.norm.bias    layers/norm/bias    D <-> D
patch.weight            patch/kernel        E c y x <-> y x c E
""")
SIZES = {"V": 7, "D": 6, "N": 2, "H": 3, "E": 5, "c": 3, "y": 2, "x": 4, "L": 3}


def foreign_side(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"embed.weight": (7, 6), "patch.weight": (5, 3, 2, 4)}
    for layer in range(3):
        shapes |= {f"layers.{layer}.q.weight": (6, 6), f"layers.{layer}.norm.bias": (6,)}
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def our_side(dtype=np.float32) -> dict[str, jax.ShapeDtypeStruct]:
    return rules.shapes(TABLE, SIZES, dtype)


def test_elements_land_where_the_pattern_says():
    foreign = foreign_side()
    ours = rules.import_tree(TABLE, foreign, our_side())
    kernel = ours["layers/q/kernel"]
    assert kernel.shape == (3, 6, 2, 3)
    for layer, d, n, h in np.ndindex(kernel.shape):
        assert kernel[layer, d, n, h] == foreign[f"layers.{layer}.q.weight"][n * 3 + h, d]
    for e, c, y, x in np.ndindex(5, 3, 2, 4):
        assert ours["patch/kernel"][y, x, c, e] == foreign["patch.weight"][e, c, y, x]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_there_and_back_is_bit_exact(dtype):
    foreign = {key: array.astype(dtype) for key, array in foreign_side().items()}
    ours = rules.import_tree(TABLE, foreign, our_side(dtype))
    back = rules.export_tree(TABLE, ours)
    assert back.keys() == foreign.keys()
    for key, array in foreign.items():
        assert back[key].dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(back[key]), array)


def test_dtypes_change_on_the_way():
    ours = rules.import_tree(TABLE, foreign_side(), our_side(ml_dtypes.bfloat16))
    assert {array.dtype for array in ours.values()} == {np.dtype(ml_dtypes.bfloat16)}
    back = rules.export_tree(TABLE, ours, dtype=np.float32)
    got = np.asarray(back["embed.weight"])
    assert got.dtype == np.float32
    wanted = foreign_side()["embed.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(got, wanted.astype(np.float32))


def test_arrays_with_a_sharding_are_placed():
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
    ours = our_side()
    shape = ours["layers/q/kernel"].shape
    ours["layers/q/kernel"] = jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
    placed = rules.import_tree(TABLE, foreign_side(), ours)["layers/q/kernel"]
    plain = rules.import_tree(TABLE, foreign_side(), our_side())["layers/q/kernel"]
    assert placed.sharding == sharding
    np.testing.assert_array_equal(placed, plain)


def changed(**changes) -> dict[str, np.ndarray]:
    foreign = foreign_side()
    for key, value in changes.items():
        if value is None:
            del foreign[key]
        else:
            foreign[key] = value
    return foreign


NAN = np.full((7, 6), np.nan, np.float32)
MISTAKES = {
    "lacks layers.1.q.weight": changed(**{"layers.1.q.weight": None}),
    "no place for: layers.3.q.weight": changed(**{"layers.3.q.weight": np.zeros((6, 6))}),
    "no place for: head.weight": changed(**{"head.weight": np.zeros(3)}),
    r"embed.weight is \[8, 6\], our embed/embedding needs \[7, 6\]": changed(
        **{"embed.weight": np.zeros((8, 6), np.float32)}
    ),
    "embed.weight of the file holds NaN": changed(**{"embed.weight": NAN}),
    "of the file holds NaN or inf": changed(**{"embed.weight": NAN.astype(ml_dtypes.bfloat16)}),
    "lacks embed.weight; it has unread keys: emb.weight": changed(
        **{"embed.weight": None, "emb.weight": np.zeros((7, 6))}
    ),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message: str):
    with pytest.raises(rules.WeightsError, match=message) as caught:
        rules.import_tree(TABLE, MISTAKES[message], our_side(), source="the file")
    assert "\n" not in str(caught.value)


def test_a_path_that_no_rule_makes():
    ours = our_side() | {"router/kernel": jax.ShapeDtypeStruct((3, 2), np.float32)}
    with pytest.raises(rules.WeightsError, match="makes our router/kernel"):
        rules.import_tree(TABLE, foreign_side(), ours)
    made = rules.import_tree(TABLE, foreign_side(), ours, fresh=["router/.*"])
    assert "router/kernel" not in made
    with pytest.raises(rules.WeightsError, match="no place for router/kernel"):
        rules.export_tree(TABLE, made | {"router/kernel": np.zeros((3, 2))})


def test_patterns_must_match():
    for dims in ("A B", "A B <-> A", "A B <-> A C", "A A <-> A A"):
        with pytest.raises(ValueError, match="both sides"):
            rules.parse(dims)
