"""Conversations to token ids and targets, in one pass, turn by turn.

A template is data: the strings before and after the text of each speaker. Control tokens are
read from a template's own strings only; what people wrote is always text, so a user who writes
`<|im_end|>` does not end the turn. Targets are set while the ids are written, turn by turn, and
never searched for in the ids afterwards. The ids of a conversation up to an open answer are a
prefix of the ids of the same conversation with the answer, so inference uses exactly the prompts
of training.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from wings_jax.data import settings, tokenization
from wings_jax.data.turns import MARKER, Turns, parse_turn
from wings_jax.errors import UserError
from wings_jax.model import layout

IMAGE_ID = -200  # stands for an image among the ids, before it is expanded


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
    speakers  markup of "system", "human" and "gpt"
    lead      written before an answer's text and learned with it
    between   written between two turns; learned where it follows an answer
    strip     whether white space around a turn's text is removed
    """

    controls: tuple[str, ...]
    start: str
    system: str
    speakers: Mapping[str, TurnMarkup]
    lead: str = ""
    between: str = ""
    strip: bool = False


TEMPLATES: Mapping[str, Template] = {
    # Qwen, SmolLM2 and many others; the format of the Wings release.
    "chatml": Template(
        controls=("<|im_start|>", "<|im_end|>"),
        start="",
        system="You are a helpful assistant.",
        speakers={
            "system": TurnMarkup("<|im_start|>system\n", "<|im_end|>"),
            "human": TurnMarkup("<|im_start|>user\n", "<|im_end|>"),
            "gpt": TurnMarkup("<|im_start|>assistant\n", "<|im_end|>"),
        },
        between="\n",
    ),
    # Llama 3 and 3.1 without tools; the published template trims every turn.
    "llama3": Template(
        controls=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        start="<|begin_of_text|>",
        system="",
        speakers={
            "system": TurnMarkup("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
            "human": TurnMarkup("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
            "gpt": TurnMarkup("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        },
        strip=True,
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


def template_from_settings(data: settings.DataConfig) -> Template:
    """Returns the template of a config, with the config's system text.

    Raises:
      UserError: the template's name is unknown.
    """
    if data.system == "none":
        return get_template(data.template, system="")
    return get_template(data.template, system=data.system or None)


def get_template_for(tokenizer: tokenization.AnyTokenizer) -> str:
    """Returns the name of the first template whose control tokens the tokenizer has."""
    vocabulary = tokenization.as_text_tokenizer(tokenizer)
    for name, template in TEMPLATES.items():
        if all(vocabulary.id_of(control) is not None for control in template.controls):
            return name

    controls = (f"{name}: {' '.join(known.controls)}" for name, known in TEMPLATES.items())
    raise UserError(
        f"the tokenizer does not have the control tokens of any template ({'; '.join(controls)})"
    )


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation before its images are expanded.

    ids     i32[n]  token ids, IMAGE_ID for an image
    labels  i32[n]  the id itself where it is to be learned, else IGNORE (not shifted)
    """

    ids: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Expanded:
    """A conversation as slots of a row.

    tokens    i32[n]  token ids, 0 in image slots
    modality  i32[n]  TEXT or IMAGE
    targets   i32[n]  id of the next slot where it is to be learned, else IGNORE (shifted)
    images    number of images that have their slots here
    """

    tokens: np.ndarray
    modality: np.ndarray
    targets: np.ndarray
    images: int


def encode(
    conversations: Turns,
    tokenizer: tokenization.AnyTokenizer,
    template: Template,
    *,
    open_answer: bool = False,
) -> Encoded:
    """Returns the ids and labels of a conversation.

    Learned are the answers, their ends of turn and, if another turn follows, what the template
    writes between the two. With `open_answer` the assistant's header follows, for generation.

    Args:
      conversations: turns {"from": system|human|gpt, "value": text}, as `turns.normalize_sample`
        returns them.
      tokenizer: a TextTokenizer, or a fast tokenizer of `transformers`.
      template: how the turns are written.

    Raises:
      UserError: the tokenizer does not fit the template.
      BadSample: a turn of an unknown speaker, or of something that is not text.
    """
    writer = _IdWriter(tokenization.as_text_tokenizer(tokenizer), template)
    turns = [parse_turn(turn, strip=template.strip) for turn in conversations]
    if template.system and (not turns or turns[0][0] != "system"):
        turns.insert(0, ("system", template.system))

    # Each turn: header, text, end of turn, and what separates it from the next turn.
    writer.write_markup(template.start)
    for number, (speaker, text) in enumerate(turns):
        markup = template.speakers[speaker]
        is_answer = speaker == "gpt"
        is_last = number + 1 == len(turns) and not open_answer

        writer.write_markup(markup.before)
        if is_answer:
            writer.write_answer(template.lead + text)
        elif speaker == "human":
            writer.write_question(text)
        else:
            writer.pending += text
        writer.write_markup(markup.after, learned=is_answer)
        if not is_last:
            writer.write_markup(template.between, learned=is_answer)

    if open_answer:
        writer.write_markup(template.speakers["gpt"].before)
    return writer.encoded()


class _IdWriter:
    """Collects ids and labels.

    Adjacent strings that are not learned are tokenized as one text, answers separately.
    """

    def __init__(self, tokenizer: tokenization.TextTokenizer, template: Template):
        self.tokenizer = tokenizer
        self.template = template
        self.controls = tokenizer.controls(template.controls)
        self.ids: list[int] = []
        self.learned: list[bool] = []
        self.pending = ""  # text that is not learned and not tokenized yet

    def write_markup(self, text: str, *, learned: bool = False) -> None:
        """Writes a string of the template itself."""
        for part in _split_controls(self.template.controls, text):
            if part in self.controls:
                self._flush()
                self._append([self.controls[part]], learned=learned)
            elif learned:
                self._append(self.tokenizer.encode(part), learned=True)
            else:
                self.pending += part

    def write_question(self, text: str) -> None:
        """Writes a human turn's text, in which MARKER stands for an image."""
        first, *rest = text.split(MARKER)
        self.pending += first
        for part in rest:
            self._flush()
            self._append([IMAGE_ID], learned=False)
            self.pending = part

    def write_answer(self, text: str) -> None:
        """Writes an answer, tokenized as it is after the last words of its header."""
        self._flush()
        header = _split_controls(self.template.controls, self.template.speakers["gpt"].before)
        prefix = header[-1] if header and header[-1] not in self.controls else ""
        self._append(self.tokenizer.encode_after(prefix, text), learned=True)

    def encoded(self) -> Encoded:
        """Returns what was written."""
        self._flush()
        ids = np.array(self.ids, np.int32)
        return Encoded(ids, np.where(self.learned, ids, layout.IGNORE).astype(np.int32))

    def _flush(self) -> None:
        if self.pending:
            self._append(self.tokenizer.encode(self.pending), learned=False)
            self.pending = ""

    def _append(self, ids: Sequence[int], *, learned: bool) -> None:
        self.ids.extend(ids)
        self.learned.extend([learned] * len(ids))


@functools.lru_cache(maxsize=64)
def _split_controls(controls: tuple[str, ...], text: str) -> tuple[str, ...]:
    """Returns a template's string, split into its control tokens and the text between them.

    >>> _split_controls(("<s>", "</s>"), "</s>USER: ")
    ('</s>', 'USER: ')
    """
    pattern = "(" + "|".join(map(re.escape, controls)) + ")"
    return tuple(filter(None, re.split(pattern, text)))


def expand(encoded: Encoded, image_slots: int, *, length: int | None = None) -> Expanded:
    """Returns the slots of a conversation, `image_slots` of them for each image.

    With `length` the slots beyond it are cut off; if that would split an image, the conversation
    ends before the image.

    >>> ids = np.array([7, IMAGE_ID, 8, 9], np.int32)
    >>> labels = np.array([layout.IGNORE, layout.IGNORE, 8, 9], np.int32)
    >>> slots = expand(Encoded(ids, labels), 2)
    >>> slots.tokens.tolist(), slots.targets.tolist()
    ([7, 0, 0, 8, 9], [-100, -100, 8, 9, -100])
    >>> expand(Encoded(ids, labels), 2, length=2).tokens.tolist()
    [7]
    """
    is_image = encoded.ids == IMAGE_ID
    sizes = np.where(is_image, image_slots, 1)  # slots of each id
    if length is not None:
        count = int(np.searchsorted(np.cumsum(sizes), length, side="right"))
        encoded = Encoded(encoded.ids[:count], encoded.labels[:count])
        is_image, sizes = is_image[:count], sizes[:count]

    tokens = np.repeat(np.where(is_image, 0, encoded.ids), sizes).astype(np.int32)
    modality = np.repeat(np.where(is_image, layout.IMAGE, layout.TEXT), sizes).astype(np.int32)

    # Slot i predicts the token of slot i + 1.
    targets = np.full_like(tokens, layout.IGNORE)
    targets[:-1] = np.repeat(encoded.labels, sizes)[1:]
    return Expanded(tokens, modality, targets, int(is_image.sum()))
