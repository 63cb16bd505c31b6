"""Conversation templates as data: what is written before and after the text of each speaker."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from wings_jax.data import tokenization
from wings_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TurnMarkup:
    """What a template writes around the text of a speaker.

    before  written before the text
    after   written after it; learned if the turn is an answer
    """

    before: str
    after: str


@dataclasses.dataclass(frozen=True)
class Template:
    """How a conversation is written as one text.

    controls  strings that are one control token each, wherever the template's own strings have
              them
    start     written before everything else
    system    system text of a conversation that has none; "" for no system turn
    speakers  markup of "human", "gpt" and, unless a template refuses system turns, "system"
    lead      written before an answer's text and learned with it
    between   written between two turns; learned where it follows an answer
    strip     whether white space around a turn's text is removed
    always_system  whether a conversation without system text begins with an empty system turn
    after_system   written instead of the header of a human turn that follows a system turn
    """

    controls: tuple[str, ...]
    start: str
    system: str
    speakers: Mapping[str, TurnMarkup]
    lead: str = ""
    between: str = ""
    strip: bool = False
    always_system: bool = False
    after_system: str | None = None


def _mark_roles(header: str, end: str) -> Mapping[str, TurnMarkup]:
    """Returns the markup of a template whose headers differ in the name of the role only."""
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    return {name: TurnMarkup(header.format(role=role), end) for name, role in roles.items()}


# Qwen, SmolLM2 and many others; the format of the Wings release.
CHATML = Template(
    controls=("<|im_start|>", "<|im_end|>"),
    start="",
    system="You are a helpful assistant.",
    speakers=_mark_roles("<|im_start|>{role}\n", "<|im_end|>"),
    between="\n",
)
# How Qwen3 begins an answer without thoughts (enable_thinking=False).
NO_THOUGHTS = TurnMarkup("<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>")

# Of templates with the same control tokens, a tokenizer without a chat template gets the first.
TEMPLATES: Mapping[str, Template] = {
    "chatml": CHATML,
    # Qwen3: prompts as with thinking, and earlier answers as its template writes them, without
    # their thoughts.
    "qwen3": dataclasses.replace(CHATML, system=""),
    # Qwen3 without thinking. Its own template drops the empty thoughts of earlier answers; here
    # they stay, so that a conversation's prefix never changes.
    "qwen3_no_think": dataclasses.replace(
        CHATML, system="", speakers={**CHATML.speakers, "gpt": NO_THOUGHTS}
    ),
    # Llama 3 and 3.1 without tools; the published template trims every turn.
    "llama3": Template(
        controls=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        start="<|begin_of_text|>",
        system="",
        speakers=_mark_roles("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
        strip=True,
    ),
    # Mistral 7B v0.3, whose [INST] is a control token; a system text begins the first question.
    "mistral": Template(
        controls=("<s>", "</s>", "[INST]", "[/INST]"),
        start="<s>",
        system="",
        speakers={
            "system": TurnMarkup("[INST] ", "\n\n"),
            "human": TurnMarkup("[INST] ", "[/INST]"),
            "gpt": TurnMarkup("", "</s>"),
        },
        lead=" ",
        after_system="",
    ),
    # Vicuna 1.1 and 1.5, LLaVA "v1".
    "vicuna": Template(
        controls=("<s>", "</s>"),
        start="<s>",
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        speakers={
            "system": TurnMarkup("", " "),
            "human": TurnMarkup("USER: ", " "),
            "gpt": TurnMarkup("ASSISTANT:", "</s>"),
        },
        lead=" ",
    ),
}


def get_template(name: str, *, system: str | None = None) -> Template:
    """Returns the template called `name`, with another default system text if one is given.

    >>> get_template("chatml").system
    'You are a helpful assistant.'
    >>> get_template("chatml", system="Be brief.").system
    'Be brief.'

    Raises:
      UserError: the name is unknown.
    """
    if name not in TEMPLATES:
        raise UserError(f"template {name!r} is unknown; known are {', '.join(TEMPLATES)}")
    template = TEMPLATES[name]
    return template if system is None else dataclasses.replace(template, system=system)


def find_template_names(tokenizer: tokenization.AnyTokenizer) -> list[str]:
    """Returns the names of the templates whose control tokens the tokenizer has."""
    vocabulary = tokenization.as_text_tokenizer(tokenizer)
    # Without its control tokens a template's markup would be split into pieces of text.
    return [
        name
        for name, template in TEMPLATES.items()
        if all(vocabulary.id_of(control) is not None for control in template.controls)
    ]


def get_template_for(tokenizer: tokenization.AnyTokenizer) -> str:
    """Returns the first of `find_template_names`.

    Raises:
      UserError: the tokenizer fits no template.
    """
    names = find_template_names(tokenizer)
    if names:
        return names[0]

    controls = (f"{name}: {' '.join(known.controls)}" for name, known in TEMPLATES.items())
    raise UserError(
        f"the tokenizer does not have the control tokens of any template ({'; '.join(controls)})"
    )
