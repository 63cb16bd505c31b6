"""From what people ask to the slots that the engine reads, on the host."""

from __future__ import annotations

import dataclasses
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
    """A piece of conversation as slots of one row.

    tokens    i32[n]  0 in image slots
    modality  i32[n]  TEXT or IMAGE
    images    its pictures, u8[h,w,3] each
    """

    tokens: np.ndarray
    modality: np.ndarray
    images: tuple[np.ndarray, ...] = ()

    @property
    def count(self) -> int:
        """Returns how many slots there are."""
        return len(self.tokens)


EMPTY = PromptSlots(np.zeros(0, np.int32), np.zeros(0, np.int32))


def from_ids(ids: Sequence[int], images: Sequence[np.ndarray], image_slots: int) -> PromptSlots:
    """Returns the slots of ids, in which `conversation.IMAGE_ID` stands for an image."""
    ids = np.asarray(ids, np.int32).reshape(-1)
    labels = np.full_like(ids, layout.IGNORE)
    expanded = conversation.expand(conversation.Encoded(ids, labels), image_slots)
    return PromptSlots(expanded.tokens, expanded.modality, tuple(images))


def join(*parts: PromptSlots) -> PromptSlots:
    """Returns one conversation made of several pieces."""
    return PromptSlots(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.modality for part in parts]),
        tuple(picture for part in parts for picture in part.images),
    )


def tail(slots: PromptSlots, start: int, patches: int) -> PromptSlots:
    """Returns the slots from `start` on, which is not within an image of `patches` slots."""
    gone = int((slots.modality[:start] == layout.IMAGE).sum()) // patches
    return PromptSlots(slots.tokens[start:], slots.modality[start:], slots.images[gone:])


def make_chunk(
    rows: Sequence[PromptSlots],
    starts: np.ndarray,
    arch: WingsArch,
    *,
    length: int,
    images: int | None = None,
) -> Chunk:
    """Returns rows side by side, padded on the right to `length`.

    Args:
      starts: i32[B], the position at which each row goes on.
      images: slots for how many images a row's visual part has; by default for the most of any
        row. The textual part has `length` slots.

    The features of all pictures are expected in the order of the rows. With the release's
    semantics a row that has an image must be whole: it cannot be extended.
    """
    shape = (len(rows), length)
    tokens, modality = (np.zeros(shape, np.int32) for _ in range(2))
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = row.tokens
        modality[index, : len(row.tokens)] = row.modality
    used = modality != layout.PADDING
    positions = np.where(used, np.asarray(starts)[:, None] + np.arange(length), 0)
    is_image = modality == layout.IMAGE
    features = np.cumsum(is_image.reshape(-1)).reshape(shape) - 1
    most = max(len(row.images) for row in rows) if images is None else images
    picks = {}
    for name in arch.learners:
        width = most * arch.vision.num_patches if LEARNERS[name] == VISUAL else length
        if width:
            wanted = layout.IMAGE if LEARNERS[name] == VISUAL else layout.TEXT
            picks[name] = _pick(modality == wanted, width)
    return Chunk(
        tokens,
        modality,
        positions.astype(np.int32),
        _visible_from(positions, modality, used, arch),
        np.where(is_image, features, 0).astype(np.int32),
        picks,
    )


def _visible_from(
    positions: np.ndarray, modality: np.ndarray, used: np.ndarray, arch: WingsArch
) -> np.ndarray:
    prompt_length = arch.semantics.prompt_length
    if prompt_length is None:
        return layout.paper_visible_from(positions, modality)
    return layout.release_visible_from(positions, modality, used.astype(np.int32), prompt_length)


def _pick(chosen: np.ndarray, width: int) -> np.ndarray:
    """Returns i32[B,width]: the indices where bool[B,T] holds, then T."""
    index = np.where(chosen, np.arange(chosen.shape[1]), chosen.shape[1])
    index = np.sort(index, axis=1)[:, :width]
    short = ((0, 0), (0, width - index.shape[1]))
    return np.pad(index, short, constant_values=chosen.shape[1]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked. The last turn is a human's; the answer follows.

    conversations  turns {"from": system|human|gpt, "value": text} with `<image>` where an image
                   stands; or a text, for a single human turn
    images         what `data.images.load` reads, or PIL images, in the order of the markers; one
                   image without a marker stands in front of the last human turn
    sampling       how the answer is drawn; None for the generator's default
    """

    conversations: Sequence[Mapping[str, str]] | str
    images: Sequence[Any] = ()
    sampling: SamplingParams | None = None

    @property
    def turns(self) -> Sequence[Mapping[str, str]]:
        """Returns the conversation as turns."""
        if isinstance(self.conversations, str):
            return [{"from": "human", "value": self.conversations}]
        return self.conversations


@dataclasses.dataclass(frozen=True)
class PromptProcessor:
    """Reads requests into slots, for one model.

    tokenizer  a fast tokenizer of `transformers`
    template   one of `conversation.TEMPLATES`
    lacks      parts that images need and the parameters do not have, as those of a bare LLM
    """

    arch: WingsArch
    tokenizer: Any
    template: conversation.Template
    lacks: tuple[str, ...] = ()

    @property
    def limit(self) -> int:
        """Returns the longest conversation that the model can read, in slots."""
        llm = self.arch.decoder.max_positions
        return min(llm, self.arch.router_positions) if self.arch.router else llm

    def read(self, request: Request) -> PromptSlots:
        """Returns the slots of a request up to the open answer; its images are not loaded yet.

        Raises:
          UserError: an empty prompt, markers and images that disagree, malformed turns, images
            for a model that reads text only, or more slots than it can read.
        """
        if request.images and self.lacks:
            raise UserError(f"the model reads text only: it has no {' and no '.join(self.lacks)}")
        turns = self.turns(request)
        last = turns[-1]
        if last["from"] == "gpt":
            raise UserError("the last turn is an answer: there is nothing to answer")
        if not any(turn["value"].strip() for turn in turns if turn["from"] == "human"):
            raise UserError("the prompt is empty")
        encoded = conversation.encode(turns, self.tokenizer, self.template, open_answer=True)
        slots = from_ids(encoded.ids, (), self.arch.vision.num_patches)
        self.check(len(slots.tokens), len(request.images))
        return slots

    def turns(self, request: Request) -> list[dict[str, str]]:
        """Returns the turns of a request, with as many markers as it has images.

        Data may hold markers too many, which training passes over; who asks so is told.
        """
        sample = samples.Sample("", tuple(request.images), request.turns)
        turns = turns_lib.normalize_sample(sample, needs_answer=False)
        asked = zip(request.turns, turns, strict=True)
        texts = [said["value"] for said, turn in asked if turn["from"] == "human"]
        have = sum(text.count(conversation.MARKER) for text in texts)
        if have not in (0, len(request.images)):
            raise UserError(
                f"{len(request.images)} image(s), {have} {conversation.MARKER} in the prompt"
            )
        return turns

    def check(self, length: int, images: int = 0) -> None:
        """Raises UserError if a prompt of `length` slots leaves no room for an answer."""
        if length < self.limit:
            return
        of_images = images * self.arch.vision.num_patches
        counted = f" ({of_images} of them for {images} image(s))" if images else ""
        raise UserError(
            f"the prompt takes {length} slots{counted}, the model reads at most "
            f"{self.limit - 1} before an answer: {length - self.limit + 1} too many"
        )

    def fit(self, wish: SamplingParams, prompt: PromptSlots) -> SamplingParams:
        """Returns the wish with no more new tokens than the model can read."""
        room = self.limit - prompt.count
        return dataclasses.replace(wish, max_new_tokens=min(wish.max_new_tokens, room))

    def answer_ids(self, request: Request, answer: str) -> list[int]:
        """Returns the ids of an answer to the request as it would be learned, end of turn too."""
        turns = self.turns(request)
        answered = [*turns, {"from": "gpt", "value": answer}]
        asked = conversation.encode(turns, self.tokenizer, self.template, open_answer=True).ids
        return (
            conversation.encode(answered, self.tokenizer, self.template).ids[len(asked) :].tolist()
        )

    def windows(self, text: str) -> list[tuple[int, ...]]:
        """Returns the ids of a plain text, without template or control tokens.

        A text that is longer than the model reads comes in several windows; each begins with the
        last token of the one before.

        Raises:
          UserError: the text is less than two tokens: nothing stands behind another.
        """
        ids = tokenization.as_text_tokenizer(self.tokenizer).encode(text)
        if len(ids) < 2:
            raise UserError(f"the text {text[:40]!r} is {len(ids)} token(s), at least 2 are needed")
        width = self.limit - 1
        return [ids[at : at + width] for at in range(0, len(ids) - 1, width - 1)]

    def text(self, tokens: Sequence[int]) -> str:
        """Returns the text of an answer's tokens."""
        text = self.tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.removeprefix(self.template.lead)

    def marked(self, text: str, images: int) -> str:
        """Returns a human turn with a marker for each image: its own, or else all in front."""
        have = text.count(conversation.MARKER)
        if have and have != images:
            raise UserError(f"{images} image(s), {have} {conversation.MARKER} in the text")
        return text if have else f"{conversation.MARKER}\n" * images + text

    def load(self, images: Sequence[Any]) -> tuple[np.ndarray, ...]:
        """Returns the pictures as the tower reads them, u8[h,w,3] each."""
        vision = self.arch.vision
        return tuple(
            image_files.prepare_image(
                image.convert("RGB")
                if isinstance(image, Image.Image)
                else image_files.load_image(image),
                vision.image_size,
                vision.mean,
            )
            for image in images
        )


def seen(rows: Sequence[PromptSlots], arch: WingsArch) -> np.ndarray:
    """Returns bool[B,V]: the tokens that each row has."""
    found = np.zeros((len(rows), arch.decoder.vocab_size), bool)
    for index, row in enumerate(rows):
        found[index, row.tokens[row.modality == layout.TEXT]] = True
    return found


def bucket(length: int) -> int:
    """Returns the next of 16, 24, 32, 48, 64, 96, ...: few shapes, few compilations."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def power(count: int) -> int:
    """Returns the next power of two; 0 for 0."""
    return 1 << (count - 1).bit_length() if count else 0
