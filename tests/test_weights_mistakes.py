"""A user's mistakes with weights: each is one clear line, and nothing is left half-written."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import weights_cases
from weights_cases import LLM, VISION, edit_config, run

from wings_jax.model import hf_config, parameters, presets
from wings_jax.weights import exports, safetensors_file, store
from wings_jax.weights.tensors import LazyTensor, WeightsError

torch = pytest.importorskip("torch")


@pytest.fixture
def sources() -> pathlib.Path:
    return weights_cases.sources()


def edit_tensor(directory: pathlib.Path, key: str, change) -> None:
    """Rewrites the file that holds `key`."""
    tensors = store.open_tensors(directory)
    file = tensors[key].origin
    content = {k: np.asarray(t) for k, t in store.open_file(file).items()}
    content[key] = change(content[key])
    safetensors_file.write_safetensors(
        file, {k: LazyTensor(a.shape, a.dtype, lambda a=a: a) for k, a in content.items()}
    )


def to_nan(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flat[3] = np.nan
    return array


class Case:
    """The sources and the working directory of one mistake."""

    def __init__(self, tmp_path: pathlib.Path):
        self.sources = weights_cases.sources()
        self.tmp_path = tmp_path
        self.out = ("--out", tmp_path / "out")

    def broken(self, name: str) -> pathlib.Path:
        """Returns a copy of a source, to be broken."""
        return shutil.copytree(self.sources / name, self.tmp_path / f"broken_{name}")

    def import_llm(self, directory: pathlib.Path, *flags: object) -> tuple:
        return ("import", "--llm", directory, *self.out, *flags)

    def import_wings(self, directory: pathlib.Path, *flags: object) -> tuple:
        return ("import", "--wings", directory, *self.out, *flags)


# Each case returns the command, and what its message must name.


def case_family(case: Case) -> tuple:
    directory = case.broken("llm")
    edit_config(directory, model_type="gpt2")
    return case.import_llm(directory), ["model_type 'gpt2'"]


def case_tower_as_llm(case: Case) -> tuple:
    return case.import_llm(case.sources / "tower"), ["siglip_vision_model"]


def case_llm_as_wings(case: Case) -> tuple:
    return case.import_wings(case.sources / "llm"), ["model_type 'qwen2' is not one of"]


def case_missing_shard(case: Case) -> tuple:
    directory = case.broken("llm")
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    return case.import_llm(directory), [f"missing shards: {shard.name}"]


def case_truncated_shard(case: Case) -> tuple:
    directory = case.broken("llm")
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    return case.import_llm(directory), [shard.name, "cut short"]


def case_vocabulary(case: Case) -> tuple:
    directory = case.broken("llm")
    edit_config(directory, vocab_size=321)
    return case.import_llm(directory), ["model.embed_tokens.weight is [320, 32]", "[321, 32]"]


def case_rank(case: Case) -> tuple:
    directory = case.broken("wings_stage2")
    edit_config(directory, lora_dim=64)
    return case.import_wings(directory), ["lora_dim 64", "4"]


def case_one_rank(case: Case) -> tuple:
    directory = case.broken("wings_stage2")
    key = "model.layers.1.attn_pool.v_proj.0.weight"
    edit_tensor(directory, key, lambda a: a[:3])
    command = case.import_wings(directory, "--vision", case.sources / "tower")
    return command, [f"{key} is [3, 32]", "[4, 32]"]


def case_nan(case: Case) -> tuple:
    directory = case.broken("llm")
    key = "model.layers.1.mlp.up_proj.weight"
    edit_tensor(directory, key, to_nan)
    return case.import_llm(directory), [f"{key} of", "NaN"]


def case_no_tokenizer(case: Case) -> tuple:
    directory = case.broken("llm")
    (directory / "tokenizer.json").unlink()
    return case.import_llm(directory), ["no tokenizer", "give one with --tokenizer"]


def case_tokenizer_too_large(case: Case) -> tuple:
    directory = case.broken("llm")
    edit_config(directory, vocab_size=200)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        edit_tensor(directory, key, lambda a: a[:200])
    return case.import_llm(directory), ["has 259 tokens, the LLM's embedding 200"]


def case_llm_as_tower(case: Case) -> tuple:
    command = case.import_llm(case.sources / "llm", "--vision", case.sources / "llm")
    return command, ["qwen2", "SigLIP or CLIP"]


def case_projector_of_another_tower(case: Case) -> tuple:
    torch.save({"mm_projector.0.weight": torch.zeros(32, 17)}, case.tmp_path / "p.bin")
    flags = ("--vision", case.sources / "tower", "--projector", case.tmp_path / "p.bin")
    named = ["p.bin takes features of width 17", "has width 16"]
    return case.import_llm(case.sources / "llm", *flags), named


def case_tower_width(case: Case) -> tuple:
    directory = case.broken("wings_stage2")
    return case.import_wings(directory, "--vision", case.sources / "clip"), ["vision_model"]


def case_output_exists(case: Case) -> tuple:
    (case.tmp_path / "out").mkdir()
    (case.tmp_path / "out" / "mine.txt").write_text("x")
    return case.import_llm(case.sources / "llm"), ["out exists already"]


def case_nowhere(case: Case) -> tuple:
    named = ["--llm", "nowhere is not a directory"]
    return case.import_llm(case.tmp_path / "nowhere"), named


def case_zero_byte_in_a_path(case: Case) -> tuple:
    return case.import_llm("a\0b"), ["--llm", "is not a directory"]


def case_empty_name(case: Case) -> tuple:
    return case.import_llm(""), ["--llm:  is not a directory"]


def case_projector_kind(case: Case) -> tuple:
    command = case.import_llm(case.sources / "llm", "--projector-kind", "mlp3x")
    return command, ["--projector-kind: 'mlp3x' is not one of identity, linear, mlp2x_gelu"]


def case_mesh(case: Case) -> tuple:
    return case.import_llm(case.sources / "llm", "--mesh", "rows=2"), ["--mesh: 'rows=2'"]


def case_template(case: Case) -> tuple:
    return case.import_llm(case.sources / "llm", "--template", "haiku"), ["'haiku'"]


def case_no_checkpoint(case: Case) -> tuple:
    command = ("export", "--checkpoint", case.tmp_path, "--format", "llm", *case.out)
    return command, ["holds no checkpoint"]


MISTAKES = [case for name, case in list(globals().items()) if name.startswith("case_")]


def case_name(make_case: Callable) -> str:
    return make_case.__name__.removeprefix("case_")


@pytest.mark.parametrize("make_case", MISTAKES, ids=case_name)
def test_mistakes_are_one_line(make_case: Callable, tmp_path, capsys):
    arguments, named = make_case(Case(tmp_path))
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2

    # One line names the culprit, and nothing was written.
    output = capsys.readouterr().err
    message = output.strip().splitlines()[-1]
    assert message.startswith("wings_jax.convert: ")
    for part in named:
        assert part in message, (part, message)
    assert "Traceback" not in output
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_no_space_left(sources, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit):
        run("import", "--llm", sources / "llm", "--out", tmp_path / "out")
    assert "no space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def export_release(**changes) -> None:
    """Tries to export a model with the arch's `changes` in the release's layout."""
    arch = presets.WingsArch(
        hf_config.decoder_from_hf({**LLM, "model_type": "qwen2"}),
        hf_config.vision_from_hf({**VISION, "model_type": "siglip_vision_model"}),
        **{"learners": ("visual", "textual"), "router": True, **changes},
    )
    flat = {p: np.zeros(s.shape, s.dtype) for p, s in parameters.abstract_params(arch).items()}
    exports.as_release(flat, arch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learners": ("textual",), "router": False}, "no models with learners"),
        ({"router": False}, "a router exactly where"),
        ({"learner_layers": (1,)}, "on some layers only"),
        ({"router_positions": 64}, "reads 4096 positions, this model's 64"),
        ({"lora_rank": 2}, "LoRA is not merged"),
        ({"prefix_length": 2}, "cannot hold decoder/layers/prefix"),
    ],
)
def test_what_the_release_cannot_hold(changes: dict, message: str):
    with pytest.raises(WeightsError, match=message):
        export_release(**changes)


def test_an_llm_cannot_hold_a_prefix():
    arch = presets.WingsArch(
        hf_config.decoder_from_hf({**LLM, "model_type": "qwen2"}), presets.VISION["siglip_base_224"]
    )
    shapes = parameters.abstract_params(arch)
    flat = {p: np.zeros(s.shape, s.dtype) for p, s in shapes.items() if p.startswith("decoder/")}
    flat["decoder/layers/prefix/k"] = np.zeros((2, 5, 2, 8), np.float32)
    with pytest.raises(WeightsError, match="cannot hold decoder/layers/prefix/k"):
        exports.as_llm(flat, arch)
