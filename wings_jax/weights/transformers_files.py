"""The text files of an exported model: tokenizer, chat template, processor, torch code, card."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

import tokenizers

from wings_jax.data.templates import Template
from wings_jax.model import hf_checks, presets
from wings_jax.weights import store
from wings_jax.weights.transformers_format import IMAGE_TOKEN, wings_config

CODE_FILES = (
    "configuration_wings.py",
    "decoder_wings.py",
    "layers_wings.py",
    "modeling_wings.py",
    "packing_wings.py",
    "processing_wings.py",
    "slots_wings.py",
    "vision_wings.py",
)
_DIRECTORY = importlib.resources.files("wings_jax.weights") / "transformers_code"


def export_files(
    arch: presets.WingsArch,
    tokenizer: Mapping[str, str],
    template: Template,
    *,
    name: str,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns `config.json` and the text files of an exported directory, name -> content.

    The tokenizer gets the token `<image>`, if it does not have one: it stands for one slot of an
    image, and is never read from what people write.
    """
    tokenizer_json, image_token_id = with_image_token(tokenizer["tokenizer.json"])
    text_files = {**tokenizer, "tokenizer.json": tokenizer_json}

    # The template goes into a file of its own; batches are padded on the left for generation.
    tokenizer_config = json.loads(tokenizer.get("tokenizer_config.json", "{}"))
    tokenizer_config.pop("chat_template", None)
    tokenizer_config["padding_side"] = "left"
    text_files["tokenizer_config.json"] = store.dump_json(tokenizer_config)
    text_files["chat_template.jinja"] = chat_template(template)

    # The processor: the template as data, and how images are prepared.
    text_files["processor_config.json"] = store.dump_json(
        {
            "auto_map": {"AutoProcessor": "processing_wings.WingsProcessor"},
            "processor_class": "WingsProcessor",
            "template": dataclasses.asdict(template),
            "image_size": arch.vision.image_size,
            "resample": hf_checks.RESAMPLE[arch.vision.resample],
            "image_mean": list(arch.vision.mean),
            "image_std": list(arch.vision.std),
            "image_seq_length": arch.vision.num_patches,
        }
    )
    text_files["generation_config.json"] = store.dump_json(generation_config(tokenizer, template))

    # The model card, and the code that transformers runs.
    text_files["README.md"] = model_card(arch, name=name)
    for file in CODE_FILES:
        text_files[file] = (_DIRECTORY / file).read_text(encoding="utf-8")
    return wings_config(arch, image_token_id=image_token_id), text_files


def generation_config(tokenizer: Mapping[str, str], template: Template) -> dict[str, Any]:
    """Returns the ids that end an answer: the template's end of turn, and the LLM's own."""
    vocabulary = tokenizers.Tokenizer.from_str(tokenizer["tokenizer.json"])
    # `eos_token_id` is a number, a list, or missing.
    own = json.loads(tokenizer.get("generation_config.json", "{}")).get("eos_token_id")
    ids = own if isinstance(own, list) else [own]

    # `eos_token` is a text, or an object with its content.
    tokenizer_config = json.loads(tokenizer.get("tokenizer_config.json", "{}"))
    eos_token = tokenizer_config.get("eos_token")
    eos_token = eos_token["content"] if isinstance(eos_token, dict) else eos_token

    ids += [vocabulary.token_to_id(token) for token in _end_tokens(template, eos_token)]
    # A token that the vocabulary does not have has no id.
    ids = sorted({token_id for token_id in ids if token_id is not None})
    return {"eos_token_id": ids, "pad_token_id": ids[0]} if ids else {}


def _end_tokens(template: Template, eos_token: str | None) -> list[str]:
    return [token for token in (template.speakers["gpt"].after.strip(), eos_token) if token]


def model_card(arch: presets.WingsArch, *, name: str) -> str:
    """Returns the README of an exported model: what it is, and how it is loaded."""
    decoder, vision = arch.decoder, arch.vision
    is_release = arch.semantics != presets.PAPER
    rows = {
        "LLM": f"{decoder.num_layers} layers, width {decoder.hidden_size}, "
        f"vocabulary {decoder.vocab_size}",
        "vision tower": f"{vision.built_layers} layers, width {vision.hidden_size}, "
        f"{vision.num_patches} slots per image of {vision.image_size} pixels",
        "learners": ", ".join(arch.learners) or "none",
        "router": f"yes, gain {arch.gain:g}" if arch.router else "no",
        "semantics": "the authors' release: its masks are not causal around images, so generation "
        "recomputes the prefix at every token"
        if is_release
        else "the paper's, causal: generation uses a KV cache",
    }

    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    card = (_DIRECTORY / "model_card.md").read_text(encoding="utf-8")
    return card.replace("NAME", name, 1).replace("TABLE", table)


def chat_template(template: Template) -> str:
    """Returns the template in Jinja, for messages of texts or of text and image parts."""
    # Roles of transformers' messages -> speakers of LLaVA's conversations.
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    speakers = {
        role: template.speakers[name] for role, name in names.items() if name in template.speakers
    }

    # The template as data: one Jinja program computes all templates from it.
    markup = {
        "start": template.start,
        "system": template.system,
        "default_system": int(bool(template.system) or template.always_system),
        "before": {role: one.before for role, one in speakers.items()},
        "after": {role: one.after for role, one in speakers.items()},
        "after_system": template.after_system or "",
        "has_after_system": int(template.after_system is not None),
        "lead": template.lead,
        "between": template.between,
        "strip": int(template.strip),
    }

    program = (_DIRECTORY / "chat_template.jinja").read_text(encoding="utf-8")
    return "{%- set markup = " + json.dumps(markup) + " -%}\n" + program


def with_image_token(tokenizer_json: str) -> tuple[str, int]:
    """Returns `tokenizer.json` with the token `<image>`, and its id."""
    vocabulary = tokenizers.Tokenizer.from_str(tokenizer_json).get_vocab(with_added_tokens=True)
    if IMAGE_TOKEN in vocabulary:
        return tokenizer_json, vocabulary[IMAGE_TOKEN]

    # The new id is behind all others, so that no token changes its id.
    content = json.loads(tokenizer_json)
    image_token_id = max(vocabulary.values()) + 1
    content["added_tokens"].append(
        {
            "id": image_token_id,
            "content": IMAGE_TOKEN,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    )
    return json.dumps(content, ensure_ascii=False), image_token_id
