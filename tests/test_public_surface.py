"""The public surface of the package, as a program outside of the checkout uses it."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import inference_cases as cases
import pytest
from PIL import Image

import wings_jax
from wings_jax.errors import UserError
from wings_jax.inference.answers import Answer
from wings_jax.inference.prompts import Request

ROOT = pathlib.Path(wings_jax.__file__).parents[1]


def run_outside(script: str, directory: pathlib.Path) -> str:
    """Runs a script in another directory, with the package importable as when installed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A directory with a small random checkpoint "run" and an image."""
    directory = tmp_path_factory.mktemp("outside")
    cases.write_checkpoint(directory / "run")
    Image.new("RGB", (9, 8), "red").save(directory / "scene.png")
    return directory


def test_public_import_is_lazy(tmp_path):
    script = "import sys, wings_jax; print('jax' in sys.modules, wings_jax.__version__)"
    is_imported, version = run_outside(script, tmp_path).split()
    assert is_imported == "False"
    assert version[0].isdigit()


def test_public_names_exist_and_are_documented(tmp_path):
    for name in wings_jax.__all__:
        value = getattr(wings_jax, name)
        assert name in dir(wings_jax)
        assert name == "__version__" or value.__doc__
        assert name in wings_jax.__doc__
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        wings_jax.lode  # noqa: B018


def test_public_surface_from_a_checkpoint_to_answers(workdir):
    script = """
import wings_jax
model = wings_jax.load("run", rows=2)
answer = model.generate("What is red?", images=["scene.png"], max_new_tokens=3)
print(repr(str(answer)) == repr(answer.text), len(answer.tokens) <= 3)
params = wings_jax.SamplingParams(max_new_tokens=3)
requests = [wings_jax.Request("What is red?", ["scene.png"], params)]
print(model.generate(requests) == [answer])
((likelihood,),) = wings_jax.score(model, [(wings_jax.Request("red"), ["blue"])])
print(likelihood.logprob < 0)
print("".join(model.chat().ask("What is red?", ["scene.png"], params)) == answer.text)
print(callable(wings_jax.chat.run), callable(wings_jax.convert.import_model))
"""
    output = run_outside(script, workdir).split()
    assert output == ["True"] * 7


def test_generate_of_a_text_is_one_answer(workdir):
    model = cases.generator(4)
    image = str(workdir / "scene.png")
    one = model.generate("What is red?", images=image, max_new_tokens=4, stop="zzz")
    assert isinstance(one, Answer)
    assert f"{one}" == one.text
    request = Request("What is red?", [image])
    assert model.generate(request, max_new_tokens=4) == one
    two = model.generate("Which is it?", images=[image, Image.new("RGB", (4, 4))], max_new_tokens=2)
    markers = Request("<image>\n<image>\nWhich is it?", [image, Image.new("RGB", (4, 4))])
    assert two == model.generate(markers, max_new_tokens=2)


def test_generate_mistakes_are_user_errors(workdir):
    model = cases.generator(4)
    with pytest.raises(UserError, match="unknown sampling parameter 'max_tokens'; there are max_"):
        model.generate("red", max_tokens=5)
    with pytest.raises(UserError, match="temperature: 'hot' is not a finite number"):
        model.generate("red", temperature="hot")
    with pytest.raises(UserError, match="a Request has its own images"):
        model.generate([Request("red")], images=["scene.png"])
    with pytest.raises(UserError, match=r"seed: .*set Request.sampling"):
        model.generate([Request("red")], seed=3)
    with pytest.raises(UserError, match=r"^checkpoint: no/such "):
        wings_jax.load("no/such")


def test_convert_from_python(tmp_path):
    cases.write_checkpoint(tmp_path / "run", "plain", parts=("decoder",))
    exported = wings_jax.convert.export_model(
        checkpoint=tmp_path / "run", format="llm", out=tmp_path / "llm"
    )
    assert (exported / "config.json").is_file()
    imported = wings_jax.convert.import_model(llm=exported, out=tmp_path / "again")
    one, two = (
        wings_jax.load(path).generate("red", max_new_tokens=3)
        for path in (tmp_path / "run", imported)
    )
    assert one == two
    with pytest.raises(UserError, match="unrecognized arguments: --visoin="):
        wings_jax.convert.import_model(llm=exported, visoin="x", out=tmp_path / "x")
    with pytest.raises(UserError, match="required: --format"):
        wings_jax.convert.export_model(checkpoint="run", out=tmp_path / "x")


def test_no_warning_that_torch_is_missing(tmp_path):
    """transformers warns at its first import, unless the package turns that off."""
    script = """
import sys
sys.modules["torch"] = None  # as if it were not installed
import importlib.util as util
find = util.find_spec
util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
import wings_jax, transformers
assert not transformers.utils.is_torch_available()
transformers.PreTrainedTokenizerFast
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRANSFORMERS")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "PyTorch" not in done.stderr
