"""Templates from a tokenizer's own chat template: ids, targets, prompts, and what is refused."""

from __future__ import annotations

import importlib.resources
import pathlib
import shutil
import sys

import numpy as np
import pytest
import tiny_data
import transformers

from wings_jax import checkpoint, convert
from wings_jax.data import chat_template, conversation, samples, settings
from wings_jax.errors import UserError
from wings_jax.model import layout

CHATML = (
    "{% if messages[0]['role'] != 'system' and default %}"
    "<|im_start|>system\n{{ default }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
TEMPLATES = {
    "chatml": (CHATML.replace("default", "'You are a helpful assistant.'"), CHATML_TOKENS),
    "chatml without default": (CHATML.replace("default", "''"), CHATML_TOKENS),
    "chatml with another default": (CHATML.replace("default", "'You are Qwen.'"), CHATML_TOKENS),
    "zephyr": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ("<s>", "</s>"),
    ),
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
        "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
        "{% for m in rest %}{% if m['role'] == 'user' %}"
        "<s>[INST] {{ (system if loop.index0 == 0 else '') + m['content'].strip() }} [/INST]"
        "{% else %} {{ m['content'].strip() }} </s>{% endif %}{% endfor %}",
        ("<s>", "</s>"),
    ),
    "llama3": (
        "<|begin_of_text|>{% for m in messages %}"
        "<|start_header_id|>{{ m['role'] }}<|end_header_id|>"
        "\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "llama3.1 with its date": (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}"
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Today Date: {{ date_string }}\n\n{{ system }}<|eot_id|>"
        "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>"
        "\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "gemma without system turns": (
        "<bos>{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m['role'] == 'assistant' else 'user' }}\n{{ m['content'] | trim }}"
        "<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
    ),
}
TINY = pathlib.Path(str(importlib.resources.files("wings_jax"))) / "assets" / "tiny"
TALK = tiny_data.turns("Hi there", "Hello.", "Why?", "So.")
SYSTEM = tiny_data.turns("Be brief.", "Hi there", "Hello.", "Why?", "So.", first="system")


def open_tokenizer(name: str) -> transformers.PreTrainedTokenizerFast:
    template, tokens = TEMPLATES[name]
    backend = tiny_data.byte_tokenizer(*tokens)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    if "bos" in tokens[0] or "begin" in tokens[0]:
        tokenizer.bos_token = tokens[0]
    tokenizer.chat_template = template
    return tokenizer


def render(tokenizer, turns, *, is_open: bool = False) -> str:
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=is_open, date_string="26 Jul 2024"
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_the_rendered_text(name):
    tokenizer = open_tokenizer(name)
    template = chat_template.derive_template(tokenizer)
    for turns in (TALK, SYSTEM) if "system" in template.speakers else (TALK,):
        for is_open in (False, True):
            part = turns[:-1] if is_open else turns
            encoded = conversation.encode(part, tokenizer, template, open_answer=is_open)
            text = render(tokenizer, part, is_open=is_open)
            ids = tokenizer(text, add_special_tokens=False).input_ids
            if not is_open and template.between:
                text = text.removesuffix(template.between)
                ids = tokenizer(text, add_special_tokens=False).input_ids
            assert encoded.ids.tolist() == ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_targets_are_the_answers_and_their_end_of_turn(name):
    tokenizer = open_tokenizer(name)
    template = chat_template.derive_template(tokenizer)
    encoded = conversation.encode(TALK[:2], tokenizer, template)
    learned = encoded.labels[encoded.labels != layout.IGNORE]
    prompt = conversation.encode(TALK[:1], tokenizer, template, open_answer=True)
    assert encoded.ids[: len(prompt.ids)].tolist() == prompt.ids.tolist()
    assert learned.tolist() == encoded.ids[len(prompt.ids) :].tolist()
    end = TEMPLATES[name][1][-1]
    assert learned[-1] == tokenizer.convert_tokens_to_ids(end)
    assert tokenizer.decode(learned[:-1]).strip() == "Hello."


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_the_derived_template_equals_the_named_one(name):
    tokenizer = open_tokenizer(name)
    named = conversation.TEMPLATES[name]
    derived = chat_template.derive_template(tokenizer)
    for turns in (TALK, SYSTEM, TALK[:2]):
        ids = [conversation.encode(turns, tokenizer, one) for one in (named, derived)]
        np.testing.assert_array_equal(ids[0].ids, ids[1].ids)
        np.testing.assert_array_equal(ids[0].labels, ids[1].labels)


@pytest.mark.parametrize(
    ("name", "chosen", "line"),
    [
        ("chatml", "chatml", "template: chatml, equal to the tokenizer's chat template"),
        (
            "chatml without default",
            "qwen3",
            "template: qwen3, equal to the tokenizer's chat template",
        ),
        ("chatml with another default", "tokenizer", "instead of 'tem\\nYou are Qwen."),
        ("zephyr", "tokenizer", "template: the tokenizer's chat template; vicuna differs: "),
        ("llama2", "tokenizer", "template: the tokenizer's chat template; vicuna differs: "),
        ("llama3", "llama3", "template: llama3, equal to the tokenizer's chat template"),
        ("gemma without system turns", "tokenizer", "template: the tokenizer's chat template"),
    ],
)
def test_the_template_of_a_tokenizer_is_chosen_and_explained(name, chosen, line):
    tokenizer = open_tokenizer(name)
    name, printed = chat_template.choose_template(tokenizer, prefer_named=False)
    assert name == chosen
    assert line in printed
    data = settings.DataConfig(template=name)
    template = chat_template.template_from_settings(data, tokenizer)
    assert not chat_template.compare_templates(template, tokenizer)


def test_a_named_template_that_differs_is_reported():
    tokenizer = open_tokenizer("chatml without default")
    name, printed = chat_template.choose_template(tokenizer, prefer_named=True)
    assert (name, printed) == ("chatml", chat_template.explain_template("chatml", tokenizer))
    assert "the tokenizer's chat template differs: '<|im_start|>system" in printed

    tokenizer.chat_template = None
    name, printed = chat_template.choose_template(tokenizer, prefer_named=False)
    assert name == "chatml"
    assert "the tokenizer has no chat template" in printed
    with pytest.raises(UserError, match="has no chat template"):
        chat_template.explain_template("tokenizer", tokenizer)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "control token"),
        ("constant", "every turn once"),
        ("{{ messages[0]['content'] }}", "every turn once"),
        ("{% for m in messages %", "end of template"),
        ("{{ raise_exception('never') }}", "never"),
        (
            "{% for m in messages %}{{ loop.index }}{{ m['content'] }}<|im_end|>{% endfor %}",
            "in another way",
        ),
    ],
)
def test_chat_templates_that_cannot_be_used(text, reason):
    tokenizer = open_tokenizer("chatml")
    tokenizer.chat_template = text
    with pytest.raises(UserError, match=reason) as raised:
        chat_template.derive_template(tokenizer)
    assert "\n" not in str(raised.value)
    name, printed = chat_template.choose_template(tokenizer, prefer_named=False)
    assert name == "chatml"
    assert reason in printed


def test_a_system_turn_where_the_template_has_none_is_a_bad_sample():
    tokenizer = open_tokenizer("gemma without system turns")
    template = chat_template.derive_template(tokenizer)
    with pytest.raises(samples.BadSample, match="the template has no system turns"):
        conversation.encode(SYSTEM, tokenizer, template)


def test_no_system_text_by_the_config():
    tokenizer = open_tokenizer("chatml with another default")
    data = settings.DataConfig(template="tokenizer", system="none")
    template = chat_template.template_from_settings(data, tokenizer)
    text = conversation.render_text(TALK[:1], template)
    assert text == "<|im_start|>user\nHi there<|im_end|>"


def test_a_template_file(tmp_path):
    path = tmp_path / "x.jinja"
    path.write_text("\ufeff{{ messages }}", "utf-8")
    files = chat_template.with_template_file({"tokenizer.json": "{}"}, path)
    assert files == {"tokenizer.json": "{}", "chat_template.jinja": "{{ messages }}"}
    with pytest.raises(UserError, match=r"--template .*nowhere: not one of chatml, "):
        chat_template.with_template_file({}, tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["of the tokenizer", "of a file", "named"])
def test_an_import_prints_and_stores_the_choice(tmp_path, monkeypatch, capsys, kind):
    """The template of the checkpoint is the chat template wherever chatml differs from it."""
    llm = shutil.copytree(TINY / "llm", tmp_path / "llm")
    file = tmp_path / "mine.jinja"
    target = file if kind == "of a file" else llm / "chat_template.jinja"
    target.write_text(TEMPLATES["chatml with another default"][0])
    flags = {
        "of the tokenizer": [],
        "of a file": ["--template", file],
        "named": ["--template", "chatml"],
    }

    command = ["convert", "import", "--llm", llm, "--vision", TINY / "vision"]
    command += ["--out", tmp_path / "out", *flags[kind]]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    convert.main()
    printed = capsys.readouterr().out
    expected = {
        "of the tokenizer": "template: the tokenizer's chat template; chatml differs: ",
        "of a file": "template: the tokenizer's chat template\n",
        "named": "template: chatml; the tokenizer's chat template differs: ",
    }
    assert expected[kind] in printed

    restored = checkpoint.load(tmp_path / "out")
    template = chat_template.template_from_settings(restored.config.data, restored.tokenizer)
    is_named = kind == "named"
    assert restored.config.data.template == ("chatml" if is_named else "tokenizer")
    assert template.system == ("You are a helpful assistant." if is_named else "You are Qwen.")
