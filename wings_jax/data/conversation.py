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
from collections.abc import Sequence

import numpy as np

from wings_jax.data import tokenization
from wings_jax.data.samples import MALFORMED, BadSample

# The templates are part of this module's interface.
from wings_jax.data.templates import TEMPLATES as TEMPLATES
from wings_jax.data.templates import Template as Template
from wings_jax.data.templates import TurnMarkup as TurnMarkup
from wings_jax.data.templates import find_template_names as find_template_names
from wings_jax.data.templates import get_template as get_template
from wings_jax.data.templates import get_template_for as get_template_for
from wings_jax.data.turns import Turns, parse_turn, split_markers
from wings_jax.model import layout

IMAGE_ID = -200  # stands for an image among the ids, before it is expanded


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
    _write_conversation(writer, conversations, template, open_answer=open_answer)
    return writer.encoded()


def render_text(conversations: Turns, template: Template, *, open_answer: bool = False) -> str:
    """Returns the conversation as one text, control tokens and image markers included.

    >>> turns = [{"from": "human", "value": "Hi"}]
    >>> render_text(turns, get_template("chatml", system=""), open_answer=True)
    '<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n'
    """
    writer = _TextWriter()
    _write_conversation(writer, conversations, template, open_answer=open_answer)
    return "".join(writer.parts)


def _write_conversation(
    writer: _IdWriter | _TextWriter, conversations: Turns, template: Template, *, open_answer: bool
) -> None:
    """Writes the turns with their markup."""
    turns = [parse_turn(turn, strip=template.strip) for turn in conversations]
    # A conversation without system text gets the template's own, which may be empty.
    has_default = bool(template.system) or template.always_system
    if has_default and (not turns or turns[0][0] != "system"):
        turns.insert(0, ("system", template.system))

    # Each turn: header, text, end of turn, and what separates it from the next turn.
    writer.write_markup(template.start)
    previous = ""
    for number, (speaker, text) in enumerate(turns):
        if speaker not in template.speakers:
            raise BadSample(MALFORMED, f"the template has no {speaker} turns")
        markup = template.speakers[speaker]
        is_answer = speaker == "gpt"
        is_last = number + 1 == len(turns) and not open_answer

        before = markup.before
        if previous == "system" and speaker == "human" and template.after_system is not None:
            before = template.after_system
        writer.write_markup(before)

        if is_answer:
            writer.write_answer(template.lead + text)
        elif speaker == "human":
            writer.write_question(text)
        else:
            writer.write_context(text)

        # What follows an answer is learned with it, or the model would never end its turn.
        writer.write_markup(markup.after, learned=is_answer)
        if not is_last:
            writer.write_markup(template.between, learned=is_answer)
        previous = speaker

    # The header of the answer that the model is to write.
    if open_answer:
        writer.write_markup(template.speakers["gpt"].before)


class _TextWriter:
    """Collects the texts of a conversation, with the methods of `_IdWriter`."""

    def __init__(self):
        self.parts: list[str] = []

    def write_markup(self, text: str, *, learned: bool = False) -> None:
        """Writes a string of the template itself."""
        del learned
        self.parts.append(text)

    def write_context(self, text: str) -> None:
        """Writes any other text."""
        self.parts.append(text)

    write_question = write_answer = write_context


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
        # Control tokens are ids of their own; the text between them may merge with its neighbors.
        for part in _split_controls(self.template.controls, text):
            if part in self.controls:
                self._flush()
                self._append([self.controls[part]], learned=learned)
            elif learned:
                self._append(self.tokenizer.encode(part), learned=True)
            else:
                self.pending += part

    def write_context(self, text: str) -> None:
        """Writes a system text."""
        self.pending += text

    def write_question(self, text: str) -> None:
        """Writes a human turn's text, in which `turns.MARKER` stands for an image."""
        first, *rest = split_markers(text)
        self.pending += first
        for part in rest:
            self._flush()
            self._append([IMAGE_ID], learned=False)
            self.pending = part

    def write_answer(self, text: str) -> None:
        """Writes an answer, tokenized as it is after the last words of its header."""
        self._flush()
        # The text after the header's last control token, with which the first word may merge.
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
    # Every id takes one slot, an image `image_slots` of them.
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
