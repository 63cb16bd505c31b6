"""Random damage to weight files and configs: read, or refused in one line; nothing else.

Every case also has a deadline, and no reader may allocate more than the file's size suggests.
`WINGS_FUZZ_SCALE` multiplies the number of inputs (`benchmarks/fuzz.py`).
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import shutil
import struct
import tempfile
import tracemalloc
from collections.abc import Callable

import hypothesis
import numpy as np
import pytest
import weights_cases
from gguf_cases import write_gguf
from hypothesis import strategies as st

from wings_jax.errors import UserError
from wings_jax.model import hf_config
from wings_jax.weights import gguf_file, safetensors_file, sources, store, torch_file
from wings_jax.weights.tensors import LazyTensor

pytestmark = pytest.mark.fuzz
SCALE = int(os.environ.get("WINGS_FUZZ_SCALE", "1"))
MAX_BYTES = 64 * 2**20


@pytest.fixture(scope="module", autouse=True)
def _sources() -> None:
    """Writes the small models before the first input's deadline starts."""
    weights_cases.sources()


def budget(examples: int) -> Callable:
    """Returns the settings of a test with so many inputs, each within 20 seconds."""
    return hypothesis.settings(
        max_examples=examples * SCALE,
        deadline=20_000,
        database=None,
        derandomize=SCALE == 1,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def read_or_refuse(read: Callable[[], object]) -> bool:
    """Returns whether it was read; fails on other errors, long messages and much memory."""
    tracemalloc.start()
    try:
        read()
        return True
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 2000
        message.encode()  # valid Unicode
        return False
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < MAX_BYTES, f"{peak:,} bytes"


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["F32", "BF16", "F8_E4M3", "silu", "qwen2", "linear", "llama3"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=8,
)


@functools.cache
def directory() -> pathlib.Path:
    """A directory for files that every input overwrites."""
    return pathlib.Path(tempfile.mkdtemp())


def damage(data: st.DataObject, content: bytes) -> bytes:
    """Returns the content with bytes changed, removed, or repeated at a few places."""
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, max(len(damaged) - 1, 0)))
        kind = data.draw(st.sampled_from(["set", "cut", "insert", "remove", "number"]))
        if kind == "set":
            damaged[position : position + 1] = bytes([data.draw(st.integers(0, 255))])
        elif kind == "cut":
            del damaged[position:]
        elif kind == "insert":
            damaged[position:position] = data.draw(st.binary(max_size=16))
        elif kind == "remove":
            del damaged[position : position + data.draw(st.integers(1, 64))]
        else:
            number = data.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
            damaged[position : position + 8] = struct.pack("<Q", number)
    return bytes(damaged)


@functools.cache
def safetensors_content() -> bytes:
    rng = np.random.default_rng(0)
    arrays = {f"layer.{i}.weight": rng.normal(size=(3, 2)).astype("f4") for i in range(3)}
    tensors = {k: LazyTensor(a.shape, a.dtype, lambda a=a: a) for k, a in arrays.items()}
    safetensors_file.write_safetensors(directory() / "whole.safetensors", tensors)
    return (directory() / "whole.safetensors").read_bytes()


def read_all(tensors: dict[str, LazyTensor]) -> None:
    for tensor in tensors.values():
        assert np.asarray(tensor).shape == tensor.shape


@budget(300)
@hypothesis.given(st.data())
def test_damaged_safetensors(data):
    file = directory() / "damaged.safetensors"
    file.write_bytes(damage(data, safetensors_content()))
    read_or_refuse(lambda: read_all(store.open_file(file)))


@budget(300)
@hypothesis.given(st.dictionaries(st.text(max_size=8), values, max_size=4), st.binary(max_size=64))
def test_any_json_as_safetensors_header(header, rest):
    file = directory() / "header.safetensors"
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    read_or_refuse(lambda: read_all(store.open_file(file)))


entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(values, st.sampled_from(["F32", "I8", "BOOL"])),
        "shape": st.one_of(values, st.lists(st.integers(-2, 2**65), max_size=4)),
        "data_offsets": st.one_of(values, st.lists(st.integers(-9, 2**65), max_size=3)),
    },
)


@budget(300)
@hypothesis.given(st.dictionaries(st.text(max_size=6), entries, max_size=3))
def test_any_entry_in_a_safetensors_header(header):
    file = directory() / "entry.safetensors"
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    read_or_refuse(lambda: read_all(store.open_file(file)))


@budget(150)
@hypothesis.given(values)
def test_any_index(content):
    folder = directory() / "indexed"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    (folder / "model-00001-of-00001.safetensors").write_bytes(safetensors_content())
    read_or_refuse(lambda: store.open_tensors(folder))


@budget(150)
@hypothesis.given(
    st.dictionaries(st.text(max_size=8), st.one_of(values, st.just("a.safetensors")), max_size=4)
)
def test_any_weight_map(weight_map):
    folder = directory() / "mapped"
    folder.mkdir(exist_ok=True)
    (folder / "a.safetensors").write_bytes(safetensors_content())
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    read_or_refuse(lambda: store.open_tensors(folder))


@functools.cache
def gguf_content(family: str) -> bytes:
    write_gguf(directory() / f"{family}.gguf", family)
    return (directory() / f"{family}.gguf").read_bytes()


@budget(300)
@hypothesis.given(st.data(), st.sampled_from(gguf_file.FAMILIES))
def test_damaged_gguf(data, family):
    """Most damage is placed in the header, which is a sixth of the file."""
    content = gguf_content(family)
    cut = data.draw(st.sampled_from([200, 2000, 12_000, len(content)]))
    file = directory() / "damaged.gguf"
    file.write_bytes(damage(data, content[:cut]) + content[cut:])

    def read() -> None:
        model = gguf_file.read_gguf(file)
        hf_config.decoder_from_hf(model.config)
        read_all(model.tensors)

    read_or_refuse(read)


@functools.cache
def llm_directory() -> pathlib.Path:
    return shutil.copytree(weights_cases.sources() / "llm", directory() / "llm")


@functools.cache
def llm_config() -> str:
    return (weights_cases.sources() / "llm" / "config.json").read_text()


@budget(200)
@hypothesis.given(st.data())
def test_any_value_in_config_json(data):
    """One or two entries of an LLM's config get any value."""
    config = json.loads(llm_config())
    for _ in range(data.draw(st.integers(1, 2))):
        config[data.draw(st.sampled_from(sorted(config)))] = data.draw(values)
    (llm_directory() / "config.json").write_text(json.dumps(config))
    read_or_refuse(lambda: sources.from_llm(llm_directory()))


@budget(200)
@hypothesis.given(st.data())
def test_damaged_config_json(data):
    content = damage(data, llm_config().encode())
    (llm_directory() / "config.json").write_bytes(content)
    read_or_refuse(lambda: sources.from_llm(llm_directory()))


VISION = {**weights_cases.VISION, "model_type": "siglip_vision_model"}
STEPS = ("do_resize", "do_rescale", "do_normalize", "do_center_crop")
VALUES = ("rescale_factor", "image_mean", "image_std", "size", "crop_size", "resample")


@budget(300)
@hypothesis.given(
    st.dictionaries(st.sampled_from([*VISION, "vision_feature_layer"]), values, max_size=2),
    st.dictionaries(st.sampled_from([*STEPS, *VALUES]), values, max_size=3),
)
def test_any_value_in_the_config_of_a_tower(changes, processor):
    read_or_refuse(lambda: hf_config.vision_from_hf({**VISION, **changes}, processor))


@budget(60)
@hypothesis.given(st.data())
def test_damaged_torch_files(data):
    torch = pytest.importorskip("torch")
    whole = directory() / "whole.bin"
    if not whole.exists():
        torch.save({"a": torch.ones(3, 2), "b": torch.ones(4)}, whole)
    file = directory() / "damaged.bin"
    file.write_bytes(damage(data, whole.read_bytes()))
    read_or_refuse(lambda: read_all(torch_file.open_torch(file)))
