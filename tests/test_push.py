"""`convert push`: an export and its model card, in one commit, on a stand-in of the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import hub_server
import pytest
import training_cases
import weights_cases
import yaml
from weights_cases import run

from wings_jax import checkpoint
from wings_jax import config as config_lib
from wings_jax.errors import UserError
from wings_jax.model import parameters
from wings_jax.weights import model_card, push, starting


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """An import, a run on it with data, a report and an adapter, and an export of the run."""
    root = tmp_path_factory.mktemp("push")
    sources = training_cases.folder()
    hub = root / "models--some--llm" / "snapshots" / "1"
    hub.mkdir(parents=True)
    for file in (sources / "llm").iterdir():
        (hub / file.name).symlink_to(file)
    (hub / "README.md").write_text("---\nlicense: apache-2.0\n---\n# LLM\n")
    flags = ("--llm", hub, "--vision", sources / "vision", "--template", "chatml")
    run("import", *flags, "--out", root / "base")

    # What training writes: a checkpoint that names its start, the data, and a report.
    config = config_lib.from_config_dict(
        training_cases.tree_of("frozen_llm", init_from=str(root / "base"))
    )
    arch = starting.resolve_arch(config.model)
    step = checkpoint.find_step(root / "base", flag="")
    base, abstract = checkpoint.read_params(step), parameters.abstract_params(arch)
    flat = {
        path: base.get(path, 0.5 * weights_cases.np.ones(s.shape, "f4"))
        for path, s in abstract.items()
    }
    checkpoint.write_checkpoint(
        root / "run", flat, config, arch, checkpoint.read_tokenizer_files(step)
    )
    data = {"scenes": {"path": "/home/someone/data/scenes.json", "digest": "0123abcd"}}
    (root / "run" / "data.json").write_text(json.dumps(data))
    score = {"right": 3, "total": 4, "accuracy": 0.75, "interval95": [0.3, 0.95]}
    models = [
        {"name": "base", "origin": str(root / "base"), "step": None, "tasks": {}},
        {
            "name": "run",
            "origin": str(root / "run"),
            "step": 0,
            "tasks": {"scenes_text": {"all text": score}},
        },
    ]
    (root / "run" / "evaluation").mkdir()
    (root / "run" / "evaluation" / "report.json").write_text(json.dumps({"models": models}))
    flags = ("export", "--checkpoint", root / "run", "--format")
    run(*flags, "transformers", "--out", root / "export")
    run(*flags, "adapter", "--out", root / "sight.safetensors")
    return root


def push_command(server, root, *arguments, token: str = "") -> subprocess.CompletedProcess:
    """Runs `convert push` in a process of its own; HF_ENDPOINT is read at its start."""
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(root / "home")}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
    command = [sys.executable, "-m", "wings_jax.convert", "push", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_card_is_generated_from_the_checkpoint(root):
    step = checkpoint.find_step(root / "run", flag="")
    card = model_card.make_card(step, name="sight", kind="adapter")
    front, text = model_card.split_card(card)
    assert yaml.safe_load(front) == {
        "library_name": "wings_jax",
        "pipeline_tag": "image-text-to-text",
        "base_model": ["some/llm"],
    }
    assert text.startswith("# sight\n")
    for line in (
        "| LLM | some/llm | apache-2.0 |",
        "| tower | vision | not recorded |",
        "|  | frozen_llm |",
        "| learning rate of visual | 0.001 |",
        "| batch size | 8 |",
        "| frozen_llm | scenes | scenes.json | 0123abcd |",
        "| scenes_text | all text | 4 | 75.0 [30.0, 95.0] |",
    ):
        assert line in text, line
    assert "/home/someone" not in card
    assert str(root) not in card

    # The text of an export stays, and so does its metadata; LLMs alone have one license.
    existing = "---\nlibrary_name: other\nlicense: mit\n---\n# Title\n\nText.\n"
    card = model_card.make_card(step, name="x", kind="llm", existing=existing)
    front, text = model_card.split_card(card)
    assert yaml.safe_load(front)["library_name"] == "other"
    assert yaml.safe_load(front)["license"] == "mit"
    assert text.startswith("# Title\n\nText.\n\n## Base models")
    fresh = model_card.make_card(step, name="x", kind="llm")
    assert yaml.safe_load(model_card.split_card(fresh)[0])["license"] == "apache-2.0"


@pytest.mark.slow
def test_push_uploads_in_one_commit(root):
    flags = ("--checkpoint", root / "run", "--repo")
    with hub_server.serve({}) as server:
        # Without a token, with a wrong one, and to somebody else's account.
        for token, repo, message in (
            ("", "me/wings", "there is no token for the Hugging Face hub: run `hf auth login`"),
            ("hf_old", "me/wings", "the hub does not accept the token"),
            (server.token, "you/wings", "no permission to write"),
        ):
            result = push_command(server, root, root / "export", *flags, repo, token=token)
            assert result.returncode == 2
            assert message in result.stderr.splitlines()[-1]
            assert "Traceback" not in result.stderr
        assert not server.created

        words = (root / "export", *flags, "me/wings", "--private", "--message", "First")
        result = push_command(server, root, *words, token=server.token)
        assert result.returncode == 0, result.stderr
        assert server.created == {"me/wings": True}
        ((message, files),) = server.commits["me/wings"]
        assert message == "First"
        assert result.stdout.splitlines()[-1] == f"{server.url}/me/wings"

        # Every file as it was exported; the card has both texts.
        exported = {file.name: file.read_bytes() for file in (root / "export").iterdir()}
        card = files.pop("README.md").decode()
        assert exported.pop("README.md").decode().partition("---\n\n")[2].strip() in card
        assert "## Base models" in card
        assert files == exported

        # An adapter, into a repository that exists.
        words = (root / "sight.safetensors", *flags, "me/wings")
        assert push_command(server, root, *words, token=server.token).returncode == 0
        assert set(server.commits["me/wings"][1][1]) == {"sight.safetensors", "README.md"}


def test_what_is_not_an_export_is_not_pushed(root, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_text("{}")
    (cut / "model-00001-of-00002.safetensors").write_bytes(b"")
    file = tmp_path / "other.safetensors"
    weights_cases.safetensors_file.write_safetensors(file, {})
    for path, message in (
        (root / "run", "is a wings_jax checkpoint: export it first"),
        (root / "nowhere", "does not exist"),
        (tmp_path / "empty", "is not a complete export"),
        (cut, "missing shards: model-00002-of-00002.safetensors"),
        (file, "is not an adapter"),
    ):
        with pytest.raises(UserError, match=message):
            push.find_kind(path)
    for words, message in (
        ((root / "export", "--repo", "wings"), "--repo: 'wings' is not the id"),
        ((root / "export", "--repo", "me/wings@v1"), "is not the id of a repository"),
    ):
        with pytest.raises(SystemExit):
            run("push", *words, "--checkpoint", root / "run")
        assert message in capsys.readouterr().err

    # A dry run prints the card.
    run("push", root / "export", "--repo", "me/x", "--checkpoint", root / "run", "--dry-run")
    assert "## Base models" in capsys.readouterr().out
