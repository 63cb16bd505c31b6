"""Wings models as directories that `transformers` opens with the code that travels with them.

The tables reuse those of the LLM and the tower below the prefixes of `modeling_wings.py`; the
learners, the router, LoRA and the prefix have rows of their own. Everything that a checkpoint
holds has a key, so that an export is read back bit for bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from wings_jax.model import hf_config, presets
from wings_jax.weights import hf, release, rules, store, tokenizer_files, transfer
from wings_jax.weights.imports import ImportPart, ImportSpec
from wings_jax.weights.tensors import LazyTensor, WeightsError

IMAGE_TOKEN = "<image>"
LANGUAGE_MODEL = "model.language_model."
TOWER = "model.vision_tower."
PROJECTOR = "model.projector."
LAYER = f"{LANGUAGE_MODEL}layers.{rules.LAYER}."

LEARNER = rules.table("""
q.a.weight    q/a    R D <-> D R
q.b.weight    q/b    (N H) R <-> R N H
k.a.weight    k/a    R D <-> D R
k.b.weight    k/b    (N H) R <-> R N H
v.a.weight    v/a    R D <-> D R
v.b.weight    v/b    (N H) R <-> R N H
o.a.weight    o/a    R (N H) <-> N H R
o.b.weight    o/b    D R <-> R D
""")

ROUTER = rules.table("""
router.weight    router/kernel    M S <-> M S
router.bias      router/bias      M <-> M
""")

PREFIX = rules.table("""
self_attn.prefix.key      prefix/k       S K H <-> S K H
self_attn.prefix.value    prefix/v       S K H <-> S K H
self_attn.prefix.gate     prefix/gate    N <-> N
""")

# Projection -> its module in a layer, and the dimensions of LoRA's two matrices.
LORA = {
    "q": ("self_attn.q_proj", "attn/q", "R D <-> D R", "(N H) R <-> R N H"),
    "k": ("self_attn.k_proj", "attn/k", "R D <-> D R", "(K H) R <-> R K H"),
    "v": ("self_attn.v_proj", "attn/v", "R D <-> D R", "(K H) R <-> R K H"),
    "o": ("self_attn.o_proj", "attn/o", "R (N H) <-> N H R", "D R <-> R D"),
    "gate": ("mlp.gate_proj", "mlp/gate", "R D <-> D R", "F R <-> R F"),
    "up": ("mlp.up_proj", "mlp/up", "R D <-> D R", "F R <-> R F"),
    "down": ("mlp.down_proj", "mlp/down", "R F <-> F R", "D R <-> R D"),
}


def wings_rules(arch: presets.WingsArch) -> tuple[rules.Rule, ...]:
    """Returns the table of a whole model: every parameter path has exactly one row."""
    # The LLM's rows, below the prefix of the language model.
    rows = []
    for rule in hf.decoder_rules(arch.decoder):
        key = rule.hf_key.replace("model.", LANGUAGE_MODEL, 1)
        rows.append(rules.Rule(key, f"decoder/{rule.path}", rule.dims))

    # What Wings, LoRA and prefix tuning add to the layers.
    layers = "decoder/layers/"
    for name in arch.learners:
        key = f"{LAYER}learners.{name}."
        rows += rules.with_prefix(LEARNER, hf_key=key, path=f"{layers}{name}/")

    if arch.router:
        rows += rules.with_prefix(ROUTER, hf_key=LAYER, path=layers)
    if arch.prefix_length:
        rows += rules.with_prefix(PREFIX, hf_key=LAYER, path=layers)

    for target in arch.lora_targets if arch.lora_rank else ():
        module, path, a_dims, b_dims = LORA[target]
        rows.append(rules.Rule(f"{LAYER}{module}.lora_a.weight", f"{layers}{path}/a", a_dims))
        rows.append(rules.Rule(f"{LAYER}{module}.lora_b.weight", f"{layers}{path}/b", b_dims))

    # The first layer takes the features of the tower [E], the others the LLM's width [D].
    for index in range(release.projector_depth(arch.projector)):
        key, path = f"{PROJECTOR}layers.{index}", f"projector/linear_{index}"
        dims = "O D <-> D O" if index else "D E <-> E D"
        rows.append(rules.Rule(f"{key}.weight", f"{path}/kernel", dims))
        rows.append(rules.Rule(f"{key}.bias", f"{path}/bias", "D <-> D"))

    return (*rows, *rules.with_prefix(hf.vision_rules(arch.vision), hf_key=TOWER, path="vision/"))


def wings_config(arch: presets.WingsArch, *, image_token_id: int) -> dict[str, Any]:
    """Returns the `config.json` of an exported model."""
    semantics = arch.semantics

    return {
        "architectures": ["WingsForConditionalGeneration"],
        # The classes of the exported code that transformers opens.
        "auto_map": {
            "AutoConfig": "configuration_wings.WingsConfig",
            "AutoModel": "modeling_wings.WingsForConditionalGeneration",
            "AutoModelForImageTextToText": "modeling_wings.WingsForConditionalGeneration",
            "AutoProcessor": "processing_wings.WingsProcessor",
        },
        "model_type": "wings",
        # The LLM and the tower, each as in a config of its own.
        "text_config": hf.llm_config(arch.decoder),
        "vision_config": {
            **hf.vision_config(arch.vision),
            # What the tower was before the layers behind the features were left out.
            "tower_num_hidden_layers": arch.vision.num_layers,
            "tower_feature_layer": arch.vision.feature_layer,
        },
        "tie_word_embeddings": arch.decoder.tie_embeddings,
        # The token that stands for an image's slots, and how many slots an image has.
        "image_token_id": image_token_id,
        "image_seq_length": arch.vision.num_patches,
        # The projector, and whether the LLM normalizes q and k.
        "projector": arch.projector,
        "qk_norm": arch.decoder.qk_norm,
        # The learners and the router.
        "learners": list(arch.learners),
        "learner_rank": arch.rank,
        "learner_layers": None if arch.learner_layers is None else list(arch.learner_layers),
        "router": arch.router,
        "router_positions": arch.router_positions,
        "gain": arch.gain,
        # How learners are computed: `presets.Semantics`.
        "learner_query": semantics.query,
        "learner_scaled_rope": semantics.scaled_rope,
        "ungated_when_alone": semantics.ungated_when_alone,
        "prompt_length": semantics.prompt_length,
        # LoRA and the prefix.
        "lora_rank": arch.lora_rank,
        "lora_alpha": arch.lora_alpha,
        "lora_targets": list(arch.lora_targets) if arch.lora_rank else [],
        "prefix_length": arch.prefix_length,
    }


def as_transformers(
    params: Mapping[str, Any], arch: presets.WingsArch, *, dtype: Any = None
) -> dict[str, LazyTensor]:
    """Returns the tensors of a whole model under the keys of `modeling_wings.py`.

    Raises:
      WeightsError: the checkpoint is not a whole model, as an LLM without a tower.
    """
    table = wings_rules(arch)
    missing = sorted({rules.group_name(rule.path) for rule in table if rule.path not in params})
    if missing:
        raise WeightsError(
            f"the transformers format holds whole models, {missing[0]} is missing; "
            "--format llm exports the LLM alone"
        )

    return transfer.export_tree(table, params, dtype=dtype)


def from_transformers(directory: str | os.PathLike) -> ImportSpec:
    """Returns the import of a directory that `--format transformers` wrote, bit for bit.

    Raises:
      WeightsError, UserError: it is not one, or it is incomplete.
    """
    config = store.read_config(directory)
    if config.get("model_type") != "wings":
        raise WeightsError(
            f"{directory}/config.json: model_type {config.get('model_type')!r} is not 'wings'"
        )

    # One part with all the tensors: an export is a whole model.
    arch = arch_from_config(config, processor=store.read_config(directory, "processor_config.json"))
    part = ImportPart("Wings", str(directory), wings_rules(arch), store.open_tensors(directory))

    # An `<image>` token that the export put behind the embedding is left out again.
    text_files = tokenizer_files.read_tokenizer_files(directory, flag="--tokenizer")
    vocab_size = arch.decoder.vocab_size
    text_files["tokenizer.json"] = _without_image_token(text_files["tokenizer.json"], vocab_size)
    return ImportSpec(
        arch, (part,), fresh=(), hf_config=config["text_config"], tokenizer_files=text_files
    )


def _without_image_token(tokenizer_json: str, vocab_size: int) -> str:
    """Returns `tokenizer.json` without a token `<image>` that the LLM has no embedding for."""
    content = json.loads(tokenizer_json)
    # A token with a row in the embedding is the LLM's own and stays.
    content["added_tokens"] = [
        token
        for token in content["added_tokens"]
        if token["content"] != IMAGE_TOKEN or token["id"] < vocab_size
    ]
    return json.dumps(content, ensure_ascii=False)


def arch_from_config(
    config: Mapping[str, Any], *, processor: Mapping[str, Any]
) -> presets.WingsArch:
    """Returns the architecture of an exported `config.json`: the reverse of `wings_config`."""
    # The tower as it was before the layers behind its features were left out.
    tower = config["vision_config"]
    tower = {
        **tower,
        "num_hidden_layers": tower["tower_num_hidden_layers"],
        "vision_feature_layer": tower["tower_feature_layer"],
    }

    # JSON has lists where the dataclass has tuples.
    layers = config["learner_layers"]
    return presets.WingsArch(
        decoder=hf_config.decoder_from_hf(config["text_config"]),
        vision=hf_config.vision_from_hf(tower, processor),
        projector=config["projector"],
        learners=tuple(config["learners"]),
        router=config["router"],
        rank=config["learner_rank"],
        learner_layers=None if layers is None else tuple(layers),
        gain=config["gain"],
        router_positions=config["router_positions"],
        semantics=presets.Semantics(
            config["learner_query"],
            scaled_rope=config["learner_scaled_rope"],
            ungated_when_alone=config["ungated_when_alone"],
            prompt_length=config["prompt_length"],
        ),
        lora_rank=config["lora_rank"],
        lora_alpha=config["lora_alpha"],
        # Without LoRA the config lists no targets: the default, as for a model that never had it.
        lora_targets=tuple(config["lora_targets"]) or presets.WingsArch.lora_targets,
        prefix_length=config["prefix_length"],
    )
