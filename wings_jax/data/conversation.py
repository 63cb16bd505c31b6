"""Conversations to token ids and targets, in one pass, turn by turn.

A template is data: what stands before and after the text of each speaker. Only a template's own
strings are read for control tokens; what people wrote is always text, so a user who types
`<|im_end|>` ends nothing. Labels come from knowing whose text is being encoded, never from
searching the ids afterwards. The ids of a history with an open answer are a prefix of the ids
of the same history answered, so a model is asked exactly what it was trained on.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wings_jax.data import samples, tokenization
from wings_jax.errors import UserError
from wings_jax.model import layout

MARKER = "<image>"  # how people write an image
IMAGE_ID = -200  # how an image stands among ids, before it is expanded
SPEAKERS = {"system": "system", "human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}

Turns = Sequence[Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class TurnMarkup:
    """What stands before and after the text of a speaker."""

    before: str
    after: str


@dataclasses.dataclass(frozen=True)
class Template:
    """How a conversation is written down.

    controls  strings that are one control token each, wherever the template itself has them
    start     stands before everything
    system    system text where a conversation brings none; "" for no system turn
    speakers  Form of "system", "human" and "gpt"
    lead      written before an answer's text and learned with it
    between   written between two turns; learned where it follows an answer
    strip     whether white space around a turn's text is dropped
    """

    controls: tuple[str, ...]
    start: str
    system: str
    speakers: Mapping[str, TurnMarkup]
    lead: str = ""
    between: str = ""
    strip: bool = False


TEMPLATES: Mapping[str, Template] = {
    # Qwen, SmolLM2 and many others; the form of the Wings release.
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
    """Returns the template called `name`, with another default system text where one is given.

    Raises:
      UserError: there is no such template.
    """
    if name not in TEMPLATES:
        raise UserError(f"template {name!r} is unknown; known are {', '.join(TEMPLATES)}")
    found = TEMPLATES[name]
    return found if system is None else dataclasses.replace(found, system=system)


def get_template_for(tokenizer: Any) -> str:
    """Returns the name of the first template whose control tokens the tokenizer has."""
    vocabulary = tokenization.as_text_tokenizer(tokenizer)
    for name, template in TEMPLATES.items():
        if all(vocabulary.id_of(control) is not None for control in template.controls):
            return name
    raise UserError(
        "the tokenizer has the control tokens of none of the templates "
        + "; ".join(f"{name}: {' '.join(t.controls)}" for name, t in TEMPLATES.items())
    )


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation before its images are expanded.

    ids     i32[n]  token ids, IMAGE_ID where an image stands
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
    images    how many images have their slots here
    """

    tokens: np.ndarray
    modality: np.ndarray
    targets: np.ndarray
    images: int


class _Writer:
    """Collects ids and labels. Adjacent context is spelt as one text, answers on their own."""

    def __init__(self, tokenizer: tokenization.TextTokenizer, template: Template):
        self.tokenizer = tokenizer
        self.template = template
        self.controls = tokenizer.controls(template.controls)
        self.ids: list[int] = []
        self.learned: list[bool] = []
        self.pending = ""

    def flush(self) -> None:
        if self.pending:
            self.put(self.tokenizer.encode(self.pending), learned=False)
            self.pending = ""

    def put(self, ids: Sequence[int], *, learned: bool) -> None:
        self.ids.extend(ids)
        self.learned.extend([learned] * len(ids))

    def control(self, token: str, *, learned: bool) -> None:
        self.flush()
        self.put([self.controls[token]], learned=learned)

    def frame(self, text: str, *, learned: bool = False) -> None:
        """Writes a string of the template itself."""
        for part in _parts(self.template.controls, text):
            if part in self.controls:
                self.control(part, learned=learned)
            elif learned:
                self.put(self.tokenizer.encode(part), learned=True)
            else:
                self.pending += part

    def context(self, text: str) -> None:
        """Writes a person's text, in which MARKER stands for an image."""
        first, *rest = text.split(MARKER)
        self.pending += first
        for part in rest:
            self.flush()
            self.put([IMAGE_ID], learned=False)
            self.pending = part

    def answer(self, text: str) -> None:
        """Writes an answer, spelt as it is after the header's last words."""
        self.flush()
        header = _parts(self.template.controls, self.template.speakers["gpt"].before)
        anchor = header[-1] if header and header[-1] not in self.controls else ""
        self.put(self.tokenizer.encode_after(anchor, text), learned=True)

    def encoded(self) -> Encoded:
        self.flush()
        ids = np.array(self.ids, np.int32)
        return Encoded(ids, np.where(self.learned, ids, layout.IGNORE).astype(np.int32))


@functools.lru_cache(maxsize=64)
def _parts(controls: tuple[str, ...], text: str) -> tuple[str, ...]:
    """Returns a template's string cut into its control tokens and the text between them."""
    pattern = "(" + "|".join(map(re.escape, controls)) + ")"
    return tuple(filter(None, re.split(pattern, text)))


def encode(
    conversations: Turns, tokenizer: Any, template: Template, *, open_answer: bool = False
) -> Encoded:
    """Returns the ids and labels of a conversation.

    Learned are the answers, their ends of turn and, where another turn follows, what stands
    between the two. With `open_answer` the assistant's header follows, for a model to go on.

    Args:
      conversations: turns {"from": system|human|gpt, "value": text}, as `normalise` returns.
      tokenizer: a TextTokenizer, or a fast tokenizer of `transformers`.
      template: one of TEMPLATES.

    Raises:
      UserError: the tokenizer does not fit the template.
      BadSample: a turn of an unknown speaker, or of something that is not text.
    """
    writer = _Writer(tokenization.as_text_tokenizer(tokenizer), template)
    turns = [_turn(turn, template.strip) for turn in conversations]
    if template.system and (not turns or turns[0][0] != "system"):
        turns.insert(0, ("system", template.system))
    writer.frame(template.start)
    for number, (speaker, text) in enumerate(turns):
        form = template.speakers[speaker]
        is_answer = speaker == "gpt"
        is_last = number + 1 == len(turns) and not open_answer
        writer.frame(form.before)
        if is_answer:
            writer.answer(template.lead + text)
        elif speaker == "human":
            writer.context(text)
        else:
            writer.pending += text
        writer.frame(form.after, learned=is_answer)
        if not is_last:
            writer.frame(template.between, learned=is_answer)
    if open_answer:
        writer.frame(template.speakers["gpt"].before)
    return writer.encoded()


def expand(encoded: Encoded, image_slots: int, *, length: int | None = None) -> Expanded:
    """Returns the conversation's slots, each image as `image_slots` of them.

    With `length`, what lies beyond is cut off; an image that would be cut through goes whole,
    and the conversation ends before it.

        ids      a  -200  b  c        with 2 slots per image, "b c" learned:
        tokens   a  0  0  b  c
        targets  -  -  b  c  -
        length 2 gives just "a"
    """
    is_image = encoded.ids == IMAGE_ID
    sizes = np.where(is_image, image_slots, 1)
    if length is not None:
        kept = int(np.searchsorted(np.cumsum(sizes), length, side="right"))
        encoded = Encoded(encoded.ids[:kept], encoded.labels[:kept])
        is_image, sizes = is_image[:kept], sizes[:kept]
    tokens = np.repeat(np.where(is_image, 0, encoded.ids), sizes).astype(np.int32)
    modality = np.repeat(np.where(is_image, layout.IMAGE, layout.TEXT), sizes).astype(np.int32)
    targets = np.full_like(tokens, layout.IGNORE)
    targets[:-1] = np.repeat(encoded.labels, sizes)[1:]
    return Expanded(tokens, modality, targets, int(is_image.sum()))


def normalize_sample(sample: samples.Sample, *, needs_answer: bool = True) -> list[dict[str, str]]:
    """Returns the turns with as many markers as the sample has images, each in a human turn.

    One image: the first marker of the first human turn that has one stays where it is, all
    others go; where no human turn has one, the last human turn begins with it. No image: all
    markers go. Several images: the human turns must hold exactly as many markers.

    Raises:
      BadSample: malformed turns, no human turn, no assistant turn (with `needs_answer`), or
        counts that differ.
    """
    if not isinstance(sample.conversations, Sequence) or isinstance(sample.conversations, str):
        raise samples.BadSample(samples.MALFORMED, "conversations is not a list of turns")
    turns = [_turn(turn, strip=False) for turn in sample.conversations]
    speakers = [speaker for speaker, _ in turns]
    if "human" not in speakers:
        raise samples.BadSample(samples.NO_HUMAN_TURN, f"{len(turns)} turns")
    if needs_answer and "gpt" not in speakers:
        raise samples.BadSample(samples.NO_ANSWER, f"{len(turns)} turns")
    counts = [text.count(MARKER) * (speaker == "human") for speaker, text in turns]
    keep = _kept_markers(speakers, counts, len(sample.images))
    if keep is None:
        last = len(speakers) - 1 - speakers[::-1].index("human")
        turns = [(speaker, text.replace(MARKER, "")) for speaker, text in turns]
        turns[last] = ("human", f"{MARKER}\n{turns[last][1]}")
    else:
        turns = [
            (speaker, _keep_first(text, count))
            for (speaker, text), count in zip(turns, keep, strict=True)
        ]
    return [{"from": speaker, "value": text} for speaker, text in turns]


def _kept_markers(
    speakers: Sequence[str], counts: Sequence[int], images: int
) -> Sequence[int] | None:
    """Returns how many markers each turn keeps; None to put one into the last human turn."""
    if images > 1:
        if sum(counts) != images:
            detail = f"{images} images, {sum(counts)} {MARKER} in human turns"
            raise samples.BadSample(samples.MARKERS, detail)
        return counts
    keep = [0] * len(speakers)
    if images == 1:
        first = next((turn for turn, count in enumerate(counts) if count), None)
        if first is None:
            return None
        keep[first] = 1
    return keep


def _keep_first(text: str, count: int) -> str:
    """Returns `text` with its first `count` markers, the others dropped."""
    head, *rest = text.split(MARKER)
    return head + "".join(
        (MARKER if number < count else "") + part for number, part in enumerate(rest)
    )


def _turn(turn: Any, strip: bool) -> tuple[str, str]:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        detail = f'a turn is {samples.shorten(turn)}, not {{"from", "value"}}'
        raise samples.BadSample(samples.MALFORMED, detail)
    speaker, text = turn["from"], turn["value"]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        known = ", ".join(SPEAKERS)
        raise samples.BadSample(samples.MALFORMED, f"speaker {speaker!r} is none of {known}")
    if not isinstance(text, str):
        raise samples.BadSample(samples.MALFORMED, f"a turn's value is {samples.shorten(text)}")
    return SPEAKERS[speaker], text.strip() if strip else text
