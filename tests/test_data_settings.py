"""The leaves of `config.data` reach the data path: one dataclass, one recipe, one cache."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest
import tiny_data
import training_cases
import transformers

from wings_jax import config as config_lib
from wings_jax import serialization
from wings_jax.data import chat_template, mixture, settings
from wings_jax.errors import UserError
from wings_jax.model import presets
from wings_jax.training import start


def open_data(workdir: pathlib.Path, **changes):
    """Returns the loader of a config over a few scenes."""
    config = config_lib.from_config_dict(training_cases.tree_of("stage2", **changes))
    arch = presets.WingsArch(vision=presets.VISION["siglip_base_224"], decoder=None)
    backend = tiny_data.byte_tokenizer()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    return start.open_data(config, arch, tokenizer, workdir)


def test_config_data_is_the_dataclass_of_the_data_path():
    assert isinstance(config_lib.Config().data, settings.DataConfig)
    leaves = serialization.flatten(config_lib.default().to_dict())
    assert leaves["data.threads"] == settings.DataConfig().threads == 4
    assert (leaves["data.system"], leaves["data.cache"]) == ("", "")


@pytest.mark.parametrize(
    ("system", "text"),
    [("", "You are a helpful assistant."), ("Be brief.", "Be brief."), ("none", "")],
)
def test_system_prompt_of_a_config(system, text):
    data = settings.DataConfig(system=system)
    tokenizer = tiny_data.byte_tokenizer()
    assert chat_template.template_from_settings(data, tokenizer).system == text


def test_system_prompt_reaches_the_batches(tmp_path):
    records = [{"id": "a", "conversations": tiny_data.turns("q", "a")}]
    file = tiny_data.write_json(tmp_path / "x.json", records)
    backend = tiny_data.byte_tokenizer()
    for system, expected in (("none", False), ("Be brief.", True)):
        batch = tiny_data.loader(file, system=system, rows=1)[0]
        text = backend.decode(batch.layout.tokens[0].tolist())
        assert ("Be brief." in text) == expected


def test_packing_measures_once_for_a_workdir(tmp_path, monkeypatch):
    changes = {"data__packing": True, "data__sequence_length": 900}
    first = open_data(tmp_path / "run", **changes)
    assert [path.suffix for path in (tmp_path / "run" / "data_cache").iterdir()] == [".npz"]

    monkeypatch.setattr(mixture.parallel, "map_samples", None)  # nothing may be measured again
    again = open_data(tmp_path / "run", **changes)
    assert (again[1].layout.tokens == first[1].layout.tokens).all()

    monkeypatch.undo()
    open_data(tmp_path / "run", **changes, data__cache=str(tmp_path / "shared"))
    assert len(list((tmp_path / "shared").iterdir())) == 1
    open_data(tmp_path / "other", **changes, data__cache="none")
    assert not (tmp_path / "other").exists()


def test_a_damaged_cache_is_named(tmp_path):
    file = tiny_data.write_json(tmp_path / "x.json", tiny_data.write_records(tmp_path, 4))
    cache = tmp_path / "cache"
    tiny_data.loader(file, packing=True, cache=cache)
    (stored,) = cache.iterdir()
    stored.write_bytes(b"PK damaged")
    with pytest.raises(UserError, match=f"data.cache: {stored} cannot be read .*; remove it"):
        tiny_data.loader(file, packing=True, cache=cache)


def test_the_cache_may_change_between_a_run_and_its_resumption():
    config = config_lib.Config()
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, cache="elsewhere"))
    assert config_lib.differences(config, moved) == []
