"""Files of tensors: what the safetensors library and torch write we read, and the reverse."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from wings_jax import files
from wings_jax.errors import UserError
from wings_jax.weights import safetensors_file, store
from wings_jax.weights.tensors import LazyTensor, WeightsError


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(5, 3))
    return {
        "f32": wide.astype(np.float32),
        "bf16": wide.astype(ml_dtypes.bfloat16),
        "f16": wide.astype(np.float16),
        "ids": np.arange(7, dtype=np.int64),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }


def lazily(content: dict[str, np.ndarray]) -> dict[str, LazyTensor]:
    return {k: LazyTensor(a.shape, a.dtype, lambda a=a: a) for k, a in content.items()}


def assert_same(tensors: dict, content: dict[str, np.ndarray]) -> None:
    assert tensors.keys() == content.keys()
    for key, array in content.items():
        got = np.asarray(tensors[key])
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got, array, strict=True)


def test_reads_what_the_library_writes(tmp_path):
    safetensors.numpy.save_file(arrays(), tmp_path / "model.safetensors")
    assert_same(store.open_tensors(tmp_path), arrays())


def test_the_library_reads_what_we_write(tmp_path):
    safetensors_file.write_safetensors(tmp_path / "a.safetensors", lazily(arrays()))
    assert_same(safetensors.numpy.load_file(tmp_path / "a.safetensors"), arrays())
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_shards_and_their_index(tmp_path):
    files = store.write_shards(tmp_path, lazily(arrays()), max_bytes=70)
    assert len(files) > 3
    assert_same(store.open_tensors(tmp_path), arrays())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays().values())
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_same(store.open_tensors(tmp_path), arrays())


def test_torch_files_hold_tensors_only(tmp_path):
    torch = pytest.importorskip("torch")
    content = {"a": torch.randn(3, 2), "b": torch.randn(4).to(torch.bfloat16)}
    torch.save(content, tmp_path / "mm_projector.bin")
    tensors = store.open_tensors(tmp_path)
    np.testing.assert_array_equal(np.asarray(tensors["a"]), content["a"].numpy())
    np.testing.assert_array_equal(
        np.asarray(tensors["b"]).astype(np.float32), content["b"].float().numpy()
    )
    torch.save({"a": Evil()}, tmp_path / "mm_projector.bin")
    with pytest.raises(WeightsError, match=r"mm_projector\.bin holds more than tensors"):
        store.open_tensors(tmp_path)


class Evil:
    """What a harmful pickle would be: it runs code when it is read."""

    def __reduce__(self):
        return (print, ("this must never be printed",))


@dataclasses.dataclass
class Shards:
    """Two of the shards of a checkpoint, and its index."""

    first: pathlib.Path
    second: pathlib.Path
    index: pathlib.Path


# Each function breaks the checkpoint in one way and returns what the message must contain.


def break_missing(shards: Shards) -> str:
    shards.second.unlink()
    return f"missing shards: {shards.second.name}"


def break_missing_without_index(shards: Shards) -> str:
    shards.second.unlink()
    shards.index.unlink()
    return f"missing shards: {shards.second.name}"


def break_truncated(shards: Shards) -> str:
    shards.first.write_bytes(shards.first.read_bytes()[:-1])
    return f"{shards.first.name} is cut short"


def break_truncated_header(shards: Shards) -> str:
    shards.first.write_bytes(shards.first.read_bytes()[:20])
    return f"{shards.first.name} is not a safetensors file, or is cut short"


def break_other_file(shards: Shards) -> str:
    shards.first.write_text("some other kind of file " * 9)
    return f"{shards.first.name} is not a safetensors file"


def break_header(shards: Shards) -> str:
    shards.first.write_bytes(shards.first.read_bytes()[:8] + b"?" * 2000)
    return f"{shards.first.name} has a header that is not JSON"


def break_index(shards: Shards) -> str:
    shards.index.write_text("{")
    return f"{shards.index.name} is not JSON"


def break_ghost(shards: Shards) -> str:
    content = json.loads(shards.index.read_text())
    content["weight_map"]["ghost"] = shards.first.name
    shards.index.write_text(json.dumps(content))
    return "lists ghost, which no shard holds"


BREAKS = [function for name, function in list(globals().items()) if name.startswith("break_")]


@pytest.mark.parametrize("break_checkpoint", BREAKS, ids=lambda function: function.__name__)
def test_broken_checkpoints_are_named(break_checkpoint: Callable, tmp_path):
    written = store.write_shards(tmp_path, lazily(arrays()), max_bytes=70)
    message = break_checkpoint(Shards(written[0], written[1], written[-1]))
    with pytest.raises(WeightsError) as caught:
        store.open_tensors(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_there(tmp_path):
    with pytest.raises(WeightsError, match="holds no weights"):
        store.open_tensors(tmp_path)
    with pytest.raises(WeightsError, match="does not exist"):
        store.open_tensors(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match=r"cannot read .*config\.json"):
        store.read_config(tmp_path)


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    with files.new_directory(tmp_path / "out") as passing:
        (passing / "file").write_text("x")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "file").read_text() == "x"
    with (
        pytest.raises(UserError, match="out exists already"),
        files.new_directory(tmp_path / "out"),
    ):
        pass
    with pytest.raises(KeyError), files.new_directory(tmp_path / "new") as passing:
        {}[passing.joinpath("file").write_text("x")]
    with (
        pytest.raises(UserError, match=r"no space left to write .*new"),
        files.new_directory(tmp_path / "new", need_bytes=10**18),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
