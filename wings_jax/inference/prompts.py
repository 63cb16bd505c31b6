"""From requests to the slots that the engine computes, on the host."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from wings_jax.data import conversation, samples, tokenization
from wings_jax.data import images as image_files
from wings_jax.data import turns as turns_lib
from wings_jax.errors import UserError
from wings_jax.inference.engine import Chunk
from wings_jax.inference.sampling import SamplingParams
from wings_jax.model import layout
from wings_jax.model.layout import LEARNERS, VISUAL
from wings_jax.model.presets import WingsArch


@dataclasses.dataclass(frozen=True)
class PromptSlots:
    """A part of a conversation as slots of one row.

    tokens    i32[n]  0 in image slots
    modality  i32[n]  TEXT or IMAGE
    images    its images, u8[h,w,3] each
    """

    tokens: np.ndarray
    modality: np.ndarray
    images: tuple[np.ndarray, ...] = ()

    @property
    def count(self) -> int:
        """Returns how many slots there are."""
        return len(self.tokens)


EMPTY = PromptSlots(np.zeros(0, np.int32), np.zeros(0, np.int32))


def from_ids(
    ids: Sequence[int] | np.ndarray, images: Sequence[np.ndarray], image_slots: int
) -> PromptSlots:
    """Returns the slots of ids, in which `conversation.IMAGE_ID` stands for an image.

    >>> from_ids([5, conversation.IMAGE_ID, 6], (), image_slots=2).tokens
    array([5, 0, 0, 6], dtype=int32)
    """
    id_array = np.asarray(ids, np.int32).reshape(-1)
    labels = np.full_like(id_array, layout.IGNORE)
    expanded = conversation.expand(conversation.Encoded(id_array, labels), image_slots)
    return PromptSlots(expanded.tokens, expanded.modality, tuple(images))


def join(*parts: PromptSlots) -> PromptSlots:
    """Returns one conversation of several parts."""
    return PromptSlots(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.modality for part in parts]),
        tuple(image for part in parts for image in part.images),
    )


def tail(slots: PromptSlots, start: int, patches: int) -> PromptSlots:
    """Returns the slots from `start` on, which is not within an image of `patches` slots."""
    images_before = int((slots.modality[:start] == layout.IMAGE).sum()) // patches
    return PromptSlots(slots.tokens[start:], slots.modality[start:], slots.images[images_before:])


def make_chunk(
    rows: Sequence[PromptSlots],
    starts: np.ndarray,
    arch: WingsArch,
    *,
    length: int,
    images: int | None = None,
) -> Chunk:
    """Returns the rows as one chunk, padded on the right to `length`.

    The encoded features of all images are expected in the order of the rows. With the release's
    semantics a row that has an image must be a whole conversation: it cannot be extended.

    Args:
      starts: i32[B], the position of each row's first slot.
      length: T. The textual learner gets `length` slots.
      images: how many images the visual learner has slots for; by default the most of any row.
    """
    shape = (len(rows), length)
    tokens, modality = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for index, row in enumerate(rows):
        tokens[index, : row.count] = row.tokens
        modality[index, : row.count] = row.modality

    # [B, T]: padding has position 0, and visibility keeps it from being attended to.
    is_used = modality != layout.PADDING
    positions = np.where(is_used, np.asarray(starts)[:, None] + np.arange(length), 0)

    # Image slot k of the whole batch takes row k of the features.
    is_image = modality == layout.IMAGE
    ordinal = np.cumsum(is_image.reshape(-1)).reshape(shape) - 1
    features = np.where(is_image, ordinal, 0)

    if images is None:
        images = max(len(row.images) for row in rows)
    # A learner's slots in front: i32[B, width]. A learner without slots is left out.
    picks = {}
    for name in arch.learners:
        is_visual = LEARNERS[name] == VISUAL
        width = images * arch.vision.num_patches if is_visual else length
        if width:
            picks[name] = _pick_slots(
                modality == (layout.IMAGE if is_visual else layout.TEXT), width
            )

    return Chunk(
        tokens,
        modality,
        positions.astype(np.int32),
        _visible_from(positions, modality, arch),
        features.astype(np.int32),
        picks,
    )


def _visible_from(positions: np.ndarray, modality: np.ndarray, arch: WingsArch) -> np.ndarray:
    """Returns i32[B,T,3] by the semantics of the architecture; each row is one conversation."""
    # Only the release's semantics number the keys of a whole conversation.
    prompt_length = arch.semantics.prompt_length
    if prompt_length is None:
        return layout.paper_visible_from(positions, modality)
    segments = (modality != layout.PADDING).astype(np.int32)
    return layout.release_visible_from(positions, modality, segments, prompt_length)


def _pick_slots(is_picked: np.ndarray, width: int) -> np.ndarray:
    """Returns i32[B,width]: the slots where bool[B,T] holds, then T as filling.

    >>> _pick_slots(np.array([[False, True, False, True]]), width=3)
    array([[1, 3, 4]], dtype=int32)
    """
    length = is_picked.shape[1]
    slots = np.where(is_picked, np.arange(length), length)
    slots = np.sort(slots, axis=1)[:, :width]
    padding = ((0, 0), (0, width - slots.shape[1]))
    return np.pad(slots, padding, constant_values=length).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Request:
    """A conversation to be continued by an answer. Its last turn is a human's.

    conversations  turns {"from": system|human|gpt, "value": text}, or a text for a single human
                   turn. With images, `<image>` in a human turn stands for an image and
                   `\\<image>` for the word; without images `<image>` is the word
    images         paths, encoded bytes, u8[h,w,3] or PIL images, in the order of the markers; one
                   image, and all images of a single text, need no marker: they come first
    sampling       how the answer is sampled; None for the generator's default
    """

    conversations: Sequence[Mapping[str, str]] | str
    images: Sequence[Any] = ()
    sampling: SamplingParams | None = None

    @property
    def turns(self) -> Sequence[Mapping[str, str]]:
        """Returns the conversation as turns."""
        if not isinstance(self.conversations, str):
            return self.conversations
        text = self.conversations
        if not turns_lib.count_markers(text):
            text = f"{turns_lib.MARKER}\n" * len(self.images) + text
        return [{"from": "human", "value": text}]


@dataclasses.dataclass(frozen=True)
class PromptProcessor:
    """Turns requests into slots, for one model.

    arch           the architecture
    tokenizer      a fast tokenizer of `transformers`
    template       how conversations are written
    missing_parts  parts that images need and the parameters do not have, as those of a bare LLM
    """

    arch: WingsArch
    tokenizer: tokenization.HFTokenizer
    template: conversation.Template
    missing_parts: tuple[str, ...] = ()

    @property
    def max_slots(self) -> int:
        """Returns the longest conversation that the model supports, in slots."""
        llm = self.arch.decoder.max_positions
        return min(llm, self.arch.router_positions) if self.arch.router else llm

    def encode(self, request: Request) -> PromptSlots:
        """Returns the slots of a request up to the open answer; its images are not loaded yet.

        Raises:
          UserError: an empty prompt, markers and images that disagree, malformed turns, images
            for a text-only model, or more slots than the model supports.
        """
        if request.images and self.missing_parts:
            missing = " and no ".join(self.missing_parts)
            raise UserError(f"the model is text-only: it has no {missing}")

        turns = self.turns(request)
        if turns[-1]["from"] == "gpt":
            raise UserError("the last turn is an answer: there is nothing to answer")
        if not any(turn["value"].strip() for turn in turns if turn["from"] == "human"):
            raise UserError("the prompt is empty")

        # The header of the answer's turn is the end of the prompt.
        encoded = conversation.encode(turns, self.tokenizer, self.template, open_answer=True)
        slots = from_ids(encoded.ids, (), self.arch.vision.num_patches)
        self.check_length(slots.count, len(request.images))
        return slots

    def turns(self, request: Request) -> list[dict[str, str]]:
        """Returns the turns of a request, with as many markers as it has images.

        Data may have excess markers, which training ignores; in a request with images they are
        an error, and in one without images they are text.
        """
        sample = samples.Sample("", tuple(request.images), request.turns)
        turns = turns_lib.normalize_sample(sample, needs_answer=False)

        # `turns` has the right number of markers; what counts here is what the user wrote.
        markers = sum(
            turns_lib.count_markers(original["value"])
            for original, turn in zip(request.turns, turns, strict=True)
            if turn["from"] == "human"
        )
        if request.images and markers not in (0, len(request.images)):
            raise UserError(
                f"{len(request.images)} image(s), {markers} {turns_lib.MARKER} in the prompt"
            )
        return turns

    def check_length(self, length: int, images: int = 0) -> None:
        """Raises UserError if a prompt of `length` slots leaves no room for an answer."""
        if length < self.max_slots:
            return
        image_slots = images * self.arch.vision.num_patches
        share = f" ({image_slots} of them for {images} image(s))" if images else ""
        raise UserError(
            f"the prompt has {length} slots{share}, the model supports at most "
            f"{self.max_slots - 1} before an answer: {length - self.max_slots + 1} too many"
        )

    def fit(self, params: SamplingParams, prompt: PromptSlots) -> SamplingParams:
        """Returns the parameters with at most as many new tokens as fit after the prompt."""
        room = self.max_slots - prompt.count
        return dataclasses.replace(params, max_new_tokens=min(params.max_new_tokens, room))

    def answer_ids(self, request: Request, answer: str) -> list[int]:
        """Returns the ids of an answer to the request as in training, end of turn included."""
        check_unicode(answer, "the answer")
        turns = self.turns(request)
        prompt = conversation.encode(turns, self.tokenizer, self.template, open_answer=True)
        # The ids of the prompt are a prefix of those of the answered conversation.
        answered_turns = [*turns, {"from": "gpt", "value": answer}]
        whole = conversation.encode(answered_turns, self.tokenizer, self.template)
        return whole.ids[len(prompt.ids) :].tolist()

    def windows(self, text: str) -> list[tuple[int, ...]]:
        """Returns the ids of a plain text, without template or control tokens.

        A text that is longer than the model supports is cut into windows; each begins with the
        last token of the one before.

        Raises:
          UserError: the text has less than two tokens, so that no token follows another.
        """
        check_unicode(text, "the text")
        ids = tokenization.as_text_tokenizer(self.tokenizer).encode(text)
        if len(ids) < 2:
            raise UserError(
                f"the text {text[:40]!r} has {len(ids)} token(s), at least 2 are needed"
            )
        width = self.max_slots - 1
        return [ids[start : start + width] for start in range(0, len(ids) - 1, width - 1)]

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of an answer's tokens."""
        # The spaces of an answer are part of it: no cleaning up.
        text = self.tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.removeprefix(self.template.lead)

    def add_markers(self, text: str, images: int) -> str:
        """Returns a human turn with a marker for each image: its own, or else all in front.

        Without images `<image>` is a word; it is escaped, as later turns may have images.

        Raises:
          UserError: the text has markers, but not one for each image.
        """
        if not images:
            return turns_lib.escape_markers(text)
        markers = turns_lib.count_markers(text)
        if markers and markers != images:
            raise UserError(f"{images} image(s), {markers} {turns_lib.MARKER} in the text")
        return text if markers else f"{turns_lib.MARKER}\n" * images + text

    def load_images(self, images: Sequence[Any]) -> tuple[np.ndarray, ...]:
        """Returns the images as the vision tower's input, u8[h,w,3] each.

        Raises:
          UserError: an image is missing, or cannot be read.
        """
        vision = self.arch.vision
        return tuple(
            image_files.prepare_image(image_files.load_image(image), vision.image_size, vision.mean)
            for image in images
        )


def as_list(images: Sequence[Any] | Any) -> list[Any]:
    """Returns a list of images; one image alone (a path, bytes, an array, PIL) becomes a list.

    >>> as_list("scene.png"), as_list(["a.png", "b.png"])
    (['scene.png'], ['a.png', 'b.png'])
    """
    is_one = isinstance(images, str | bytes | os.PathLike | Image.Image)
    is_array = getattr(images, "ndim", None) == 3
    return [images] if is_one or is_array else list(images)


def check_unicode(text: str, where: str) -> None:
    """Raises UserError if a text has surrogates, which are not characters.

    They come from bytes that are not UTF-8, and from JSON escapes such as "\\ud83d" alone.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise UserError(
            f"{where} is not valid Unicode: {code} at character {error.start + 1}; give it as UTF-8"
        ) from error


def seen_tokens(rows: Sequence[PromptSlots], arch: WingsArch) -> np.ndarray:
    """Returns bool[B,V]: the tokens that occur in each row."""
    is_seen = np.zeros((len(rows), arch.decoder.vocab_size), bool)
    for index, row in enumerate(rows):
        is_seen[index, row.tokens[row.modality == layout.TEXT]] = True
    return is_seen


def bucket(length: int) -> int:
    """Returns the next of 16, 24, 32, 48, 64, 96, ...: few shapes, so few compilations.

    >>> [bucket(length) for length in (1, 16, 17, 25, 33, 100)]
    [16, 16, 24, 32, 48, 128]
    """
    # Powers of two, and the number half-way to the next one.
    size = 16
    while size < length:
        is_power = size & (size - 1) == 0
        size = size * 3 // 2 if is_power else size * 4 // 3
    return size


def power(count: int) -> int:
    """Returns the next power of two; 0 for 0.

    >>> [power(count) for count in (0, 1, 2, 3, 9)]
    [0, 1, 2, 4, 16]
    """
    return 1 << (count - 1).bit_length() if count else 0
