"""Named templates beside the chat templates of the models that they are for: Qwen3, Mistral."""

from __future__ import annotations

import pytest
import tiny_data
import transformers

from wings_jax.data import chat_template, conversation

# Of Qwen3, without tools: only the last answer keeps its thoughts, which may be empty.
QWEN3 = (
    "{%- if messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}"
    "{%- set ns = namespace(last_query=messages|length - 1) %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set ns.last_query = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}"
    "{{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}"
    "{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last_query %}"
    "{{- '<think>\n\n</think>\n\n' + message.content.lstrip('\n') }}"
    "{%- else %}{{- message.content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
# Of Mistral 7B v0.3: a system text is within the last question.
MISTRAL = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}"
    "{%- set messages = messages[1:] %}{%- endif %}<s>{%- for message in messages %}"
    "{%- if message.role == 'user' %}{{- '[INST] ' }}"
    "{%- if loop.last and system is defined %}{{- system + '\n\n' }}{%- endif %}"
    "{{- message.content + '[/INST]' }}"
    "{%- else %}{{- ' ' + message.content|trim + '</s>' }}{%- endif %}{%- endfor %}"
)
ASKED = tiny_data.turns("What is it?")
AGAIN = tiny_data.turns("What is it?", "A cat.", "Really?")
WITH_SYSTEM = tiny_data.turns("Be brief.", "What is it?", first="system")
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def open_tokenizer(template: str, name: str) -> transformers.PreTrainedTokenizerFast:
    """Returns a tokenizer with a chat template and the control tokens of a named template."""
    backend = tiny_data.byte_tokenizer(*conversation.TEMPLATES[name].controls)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = template
    return tokenizer


def rendered(tokenizer, turns, **options) -> str:
    """Returns the prompt that the chat template writes."""
    messages = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
    options = {"tokenize": False, "add_generation_prompt": True, **options}
    return tokenizer.apply_chat_template(messages, **options)


def written(name: str, turns) -> str:
    """Returns the prompt that a named template writes."""
    return conversation.render_text(turns, conversation.TEMPLATES[name], open_answer=True)


@pytest.mark.parametrize("turns", [ASKED, AGAIN, WITH_SYSTEM])
def test_qwen3_writes_the_prompts_of_its_chat_template(turns):
    tokenizer = open_tokenizer(QWEN3, "qwen3")
    assert written("qwen3", turns) == rendered(tokenizer, turns)


@pytest.mark.parametrize("turns", [ASKED, WITH_SYSTEM])
def test_qwen3_no_think_writes_the_prompts_without_thinking(turns):
    tokenizer = open_tokenizer(QWEN3, "qwen3")
    wanted = rendered(tokenizer, turns, enable_thinking=False)
    assert written("qwen3_no_think", turns) == wanted

    # An answered conversation too: the separator after its last turn is left out.
    answered = turns + tiny_data.turns("?", "A cat.")[1:]
    text = conversation.render_text(answered, conversation.TEMPLATES["qwen3_no_think"])
    assert text + "\n" == rendered(tokenizer, answered, add_generation_prompt=False)


def test_qwen3_no_think_keeps_the_prefix_of_a_conversation():
    """Its own template would drop the empty thoughts of the first answer."""
    first = written("qwen3_no_think", ASKED)
    assert written("qwen3_no_think", AGAIN).startswith(first + "A cat.<|im_end|>")


def test_the_template_of_qwen3_is_chosen_by_its_prompts():
    name, line = chat_template.choose_template(open_tokenizer(QWEN3, "qwen3"), prefer_named=False)
    assert name == "qwen3"
    assert line.startswith("template: qwen3, equal in prompts; ")


def test_a_template_that_reads_parts_is_derived():
    """As processors have it: the content of a message is a list of texts and images."""
    of_parts = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% for part in m.content %}{% if part.type == 'image' %}<image>\n"
        "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = open_tokenizer(of_parts, "chatml")
    name, line = chat_template.choose_template(tokenizer, prefer_named=False)
    assert (name, line) == ("qwen3", "template: qwen3, equal to the tokenizer's chat template")


@pytest.mark.parametrize("turns", [ASKED, AGAIN, WITH_SYSTEM])
def test_mistral_writes_the_prompts_of_its_chat_template(turns):
    tokenizer = open_tokenizer(MISTRAL, "mistral")
    assert written("mistral", turns) == rendered(tokenizer, turns)


def test_mistral_is_chosen_by_its_control_tokens():
    """It differs: white space around answers, and where a system text stands after a turn."""
    tokenizer = open_tokenizer(MISTRAL, "mistral")
    name, line = chat_template.choose_template(tokenizer, prefer_named=False)
    assert name == "mistral"
    assert "cannot be expressed" in line
