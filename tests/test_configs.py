"""Every config with every preset, at full size, without allocating anything."""

from __future__ import annotations

import pathlib
import re
import sys

import jax
import pytest
import training_cases as cases

from configs import base
from wings_jax import axes, config_checks, serialization, train, tree
from wings_jax import config as config_lib
from wings_jax.errors import UserError
from wings_jax.evaluation import training_metric
from wings_jax.model import parameters
from wings_jax.training import loop, meshes, optim
from wings_jax.weights import starting

PRESETS = [*base.ON_SCENES, *base.REAL]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("stage", cases.STAGES)
def test_config_fits_its_preset(stage, preset):
    config = config_lib.from_config_dict(cases.STAGES[stage](preset))
    arch = starting.resolve_arch(config.model)
    shape = meshes.mesh_shape(config.mesh, arch, jax.device_count())
    abstract = parameters.abstract_params(arch, mesh=axes.make_mesh(shape))
    labels = optim.label_groups(abstract, config.optimizer)  # total, and no dead row
    trained = {p for p in abstract if optim.is_trained(labels, config.optimizer, p)}
    assert not any(p.startswith("vision/") for p in trained)
    assert any(p.startswith("projector/") for p in trained)
    trains_llm = any(p.startswith("decoder/embed") for p in trained)
    assert trains_llm == (stage == "stage2")
    total = tree.count({p: s for p, s in abstract.items() if p.startswith("decoder/embed")})
    assert total == arch.decoder.vocab_size * arch.decoder.hidden_size


@pytest.mark.parametrize("preset", base.REAL)
def test_learning_rates_of_the_real_presets_are_the_papers(preset):
    rates = config_lib.from_config_dict(cases.STAGES["stage1"](preset)).optimizer.learning_rates
    assert rates == {"vision": 0.0, "projector": 1e-3, "visual": 1e-3, "llm": 0.0}
    rates = config_lib.from_config_dict(cases.STAGES["stage2"](preset)).optimizer.learning_rates
    assert rates["projector"] == 1e-5
    assert {rates[g] for g in ("visual", "textual", "router", "llm")} == {2e-6}


def test_config_survives_json():
    config = config_lib.from_config_dict(cases.STAGES["stage2"]("qwen1_5_7b"))
    again = serialization.from_dict(config_lib.Config, serialization.to_dict(config), "config")
    assert again == config
    assert config_lib.differences(config, again) == []


def test_parameter_paths_are_public():
    """These paths are in checkpoints and in users' configs: a change breaks both."""
    arch = starting.resolve_arch(config_lib.from_config_dict(cases.STAGES["stage2"]()).model)
    abstract = parameters.abstract_params(arch)
    roots = sorted({re.sub(r"/(kernel|bias|scale|a|b)$", "", path) for path in abstract})
    attention = [f"decoder/layers/attn/{name}" for name in "kovq"]
    mlp = [f"decoder/layers/mlp/{name}" for name in ("down", "gate", "up")]
    wings = [f"decoder/layers/{w}/{name}" for w in ("textual", "visual") for name in "kovq"]
    tower = [f"vision/layers/attn/{name}" for name in "kovq"]
    tower += [f"vision/layers/{n}" for n in ("mlp/down", "mlp/up", "norm_attn", "norm_mlp")]
    tower += ["vision/patch", "vision/position", "vision/post_norm"]
    assert roots == sorted(
        [
            "decoder/embed/embedding",
            *attention,
            *mlp,
            *wings,
            "decoder/layers/norm_attn",
            "decoder/layers/norm_mlp",
            "decoder/layers/router",
            "decoder/norm",
            *tower,
            "projector/linear_0",
            "projector/linear_1",
        ]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"remat": "half"}, "config.remat: 'half' is not one of"),
        ({"model__learners": ("left",)}, "config.model.learners"),
        ({"model__router": True, "model__learners": ("visual",)}, "a router needs both learners"),
        ({"batch_size": 6, "optimizer__accumulation": 4}, "is not a multiple"),
        ({"data__sequence_length": 2048}, "config.data.sequence_length: 2048 is more than"),
        ({"steps": -2}, "config.steps: -2 is less than -1"),
        ({"model__prefix_length": -1}, "config.model.prefix_length: -1 is less than 0"),
        ({"model__llm": "gpt"}, "config.model.llm: 'gpt' is neither a"),
        ({"model__learner_layers": (7,)}, r"config.model.learner_layers: \(7,\) on 2 layers"),
    ],
)
def test_user_error_names_values_that_do_not_fit(change, message):
    with pytest.raises(UserError, match=message):
        starting.resolve_arch(config_lib.from_config_dict(cases.tree_of("stage2", **change)).model)


def test_every_leaf_of_the_tree_is_read(tmp_path, monkeypatch):
    """A key that nothing reads would do nothing; checks and conversions of configs do not count."""
    names = ("Model", "Data", "Source", "Optimizer", "Mesh", "Eval")
    kinds = ("Config", *(f"{name}Config" for name in names))
    conversions = {module.__file__ for module in (config_lib, config_checks, serialization)}
    read = set()

    def recording(self, name: str):
        if sys._getframe(1).f_code.co_filename not in conversions:
            read.add((type(self).__name__, name))
        return object.__getattribute__(self, name)

    for kind in kinds:
        monkeypatch.setattr(getattr(config_lib, kind), "__getattribute__", recording, raising=False)
    changes = {"steps": -1, "epochs": 0.5}
    ready = cases.set_up(tmp_path / "run", **changes)
    loop.train(ready)
    cases.set_up(tmp_path / "run", **changes)  # some leaves are for resuming
    starting.resolve_arch(
        config_lib.from_config_dict(cases.tree_of("stage2", model__semantics="release")).model
    )
    monkeypatch.undo()
    fields = {(kind, f) for kind in kinds for f in getattr(config_lib, kind).__dataclass_fields__}
    # The flag may replace the workdir, hosts are joined before anything else, and what is measured
    # beside the steps is made by the command.
    main = pathlib.Path(train.__file__).read_text()
    by_command = ("workdir", "host_timeout", "laws_every", "eval")
    assert all(f"config.{name}" in main for name in by_command)
    evaluation = main + pathlib.Path(training_metric.__file__).read_text()
    unread = {name for kind, name in fields - read if kind == "EvalConfig"}
    assert all(f"settings.{name}" in evaluation or f"eval.{name}" in evaluation for name in unread)
    assert {name for kind, name in fields - read if kind != "EvalConfig"} == set(by_command)
