"""From a config to the arrays of a run: architecture, parameters, shardings, where each comes from.

Parameters start in one of three ways, printed by group before a run: loaded from Hugging Face
folders (the LLM and the tower), loaded from a checkpoint, or fresh.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wings_jax import axes, tree
from wings_jax import config as config_lib
from wings_jax.errors import UserError
from wings_jax.model import layout, presets
from wings_jax.model.wings import Wings
from wings_jax.training.step import TrainState
from wings_jax.weights import hf, store

# What may start fresh: a run that would start an LLM or a tower from noise is a mistake.
_ADDED = ("visual", "textual", "router", "prefix")
MAY_BE_FRESH = ("projector/", *(f"decoder/layers/{part}/" for part in _ADDED))
LORA = ("/a", "/b")
ADAPTERS = re.compile("decoder/layers/(prefix/.*|(attn|mlp)/.*/[ab])")  # there to be trained


def folder(name: str, half: str) -> pathlib.Path | None:
    """Returns the folder that `config.model.llm` or `.vision` names; None for a preset's name."""
    if name == "tiny":
        return pathlib.Path(str(importlib.resources.files("wings_jax"))) / "assets" / "tiny" / half
    known = presets.DECODERS if half == "llm" else presets.VISION
    if name in known:
        return None
    path = pathlib.Path(name)
    if not path.is_dir():
        names = ", ".join(["tiny", *known])
        raise UserError(f"config.model.{half}: {name!r} is neither a folder nor one of {names}")
    return path


def resolve_arch(model: config_lib.Model) -> presets.WingsArch:
    """Returns the architecture that a config names. Raises UserError naming key or file."""
    llm, vision = folder(model.llm, "llm"), folder(model.vision, "vision")
    if llm is None:
        decoder = presets.DECODERS[model.llm]
    else:
        decoder = presets.decoder_from_hf(store.read_config(llm))
    if vision is None:
        tower = presets.VISION[model.vision]
    else:
        has_processor = (vision / hf.PROCESSOR_FILE).is_file()
        processor = store.read_config(vision, hf.PROCESSOR_FILE) if has_processor else None
        tower = presets.vision_from_hf(store.read_config(vision), processor)
    layers = model.learner_layers
    if any(i not in range(decoder.num_layers) for i in layers):
        raise UserError(f"config.model.learner_layers: {layers} on {decoder.num_layers} layers")
    if model.learners and decoder.num_heads * decoder.head_dim != decoder.hidden_size:
        raise UserError("config.model.learners: heads x head width must equal the model's width")
    semantics = presets.PAPER
    if model.semantics == "release":
        semantics = presets.release_semantics(model.prompt_length)
    return presets.WingsArch(
        decoder=decoder,
        vision=tower,
        projector=model.projector,
        learners=model.learners,
        router=model.router,
        rank=model.rank,
        learner_layers=layers or None,
        gain=model.gain,
        semantics=semantics,
        router_positions=model.router_positions,
        lora_rank=model.lora_rank,
        lora_alpha=model.lora_alpha,
        lora_targets=model.lora_targets,
        prefix_length=model.prefix_length,
    )


def check_mesh(
    arch: presets.WingsArch, mesh: Mesh, batch_size: int = 0, *, flag: str = "config.mesh"
) -> None:
    """Raises MeshError naming a dimension of the model, or the batch, that the mesh cannot cut."""
    decoder, vision = arch.decoder, arch.vision
    parts = {
        "the batch": {"B": batch_size},
        "the LLM": {
            "D": decoder.hidden_size,
            "N": decoder.num_heads,
            "K": decoder.num_kv_heads,
            "F": decoder.ffn_size,
            "V": decoder.vocab_size,
        },
        "the vision tower": {
            "E": vision.hidden_size,
            "N": vision.num_heads,
            "F": vision.ffn_size,
        },
    }
    for part, sizes in parts.items():
        try:
            axes.check_divides(mesh.shape, sizes)
        except axes.MeshError as error:
            raise axes.MeshError(f"{flag}: {part}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Plan:
    """All parameters of a model before any of them exists, as flat trees.

    shapes      path -> shape, float32
    shardings   path -> where it lies
    """

    model: Wings
    shapes: dict[str, jax.ShapeDtypeStruct]
    shardings: dict[str, NamedSharding]


def plan(model: Wings, mesh: Mesh) -> Plan:
    """Returns shapes and shardings without allocating anything."""
    boxed = jax.eval_shape(lambda key: _initialise(model, key), jax.random.key(0))
    specs = tree.flatten(nn.get_partition_spec(boxed))
    shapes = tree.flatten(nn.unbox(boxed))
    shardings = {path: axes.sharding_of(mesh, specs[path]) for path in shapes}
    return Plan(model, shapes, shardings)


def _initialise(model: Wings, key: jax.Array) -> Mapping[str, Any]:
    """Returns boxed parameters; a row with one image touches them all."""
    vision = model.arch.vision
    modality = np.full((1, vision.num_patches + 1), layout.IMAGE)
    modality[:, -1] = layout.TEXT
    empty = np.zeros(modality.shape, np.int32)
    images = np.zeros((1, 1, vision.image_size, vision.image_size, 3), np.uint8)
    batch = layout.Batch(layout.make_layout(empty, modality), empty, images)
    return model.init(key, batch, method=Wings.initialise)["params"]


def fresh(plan: Plan, paths: Sequence[str], seed: int) -> dict[str, jax.Array]:
    """Returns newly initialised f32 parameters of these paths, born where they will lie."""
    if not paths:
        return {}

    def init(key: jax.Array) -> dict[str, jax.Array]:
        flat = tree.flatten(nn.unbox(_initialise(plan.model, key)))
        return {path: flat[path] for path in paths}

    shardings = {path: plan.shardings[path] for path in paths}
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def load_base(plan: Plan, model: config_lib.Model) -> dict[str, np.ndarray]:
    """Returns the flat parameters that the folders named by `config.model` hold."""
    found: dict[str, Any] = {}
    llm, vision = folder(model.llm, "llm"), folder(model.vision, "vision")
    if llm is not None:
        found["decoder"] = hf.load_llm(llm, plan.model.arch.decoder)
    if vision is not None:
        found["vision"] = hf.load_vision(vision, plan.model.arch.vision)
    return tree.flatten(found)


def check_sources(plan: Plan, loaded: Mapping[str, Any], start: str) -> list[str]:
    """Returns the paths that start fresh.

    Raises:
      UserError: parts of the LLM or the tower are missing in `start`, or shapes disagree.
    """
    missing = [path for path in plan.shapes if path not in loaded]
    unborn = [p for p in missing if not p.startswith(MAY_BE_FRESH) and not p.endswith(LORA)]
    if unborn:
        raise UserError(
            f"{start} does not hold {unborn[0]} (and {len(unborn) - 1} more): give "
            "--config.init_from=DIR (see python -m wings_jax.convert) or folders as "
            "config.model.llm and config.model.vision"
        )
    for path, shape in plan.shapes.items():
        if path in loaded and tuple(loaded[path].shape) != tuple(shape.shape):
            found = tuple(loaded[path].shape)
            raise UserError(f"{start}: {path} has shape {found}, the config's {shape.shape}")
    return missing


def is_adapter(path: str) -> bool:
    """Returns whether a parameter is LoRA's or a prefix's."""
    return ADAPTERS.fullmatch(path) is not None


def place(plan: Plan, flat: Mapping[str, Any], dtype: jnp.dtype) -> dict[str, jax.Array]:
    """Returns the parameters in `dtype` where they belong, from host or device arrays."""

    def put(path: str, value: Any) -> jax.Array:
        sharding = plan.shardings[path]
        if isinstance(value, jax.Array):
            return jax.device_put(value.astype(dtype), sharding)
        value = np.asarray(value)
        return jax.make_array_from_callback(
            value.shape, sharding, lambda index: value[index].astype(dtype)
        )

    return {path: put(path, value) for path, value in flat.items()}


def make_state(
    trained: Mapping[str, jax.Array],
    frozen: Mapping[str, jax.Array],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """Returns the state of step 0; moments lie where their parameters do."""
    replicated = NamedSharding(mesh, PartitionSpec())
    abstract = jax.eval_shape(optimizer.init, trained)
    shardings = optax.tree_map_params(
        optimizer,
        lambda _, parameter: parameter.sharding,
        abstract,
        dict(trained),
        transform_non_params=lambda _: replicated,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(dict(trained))
    step, skipped = (jax.device_put(np.zeros((), np.int32), replicated) for _ in range(2))
    return TrainState(step, skipped, dict(trained), dict(frozen), opt_state)
