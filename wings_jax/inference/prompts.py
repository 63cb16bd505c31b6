"""Requests, and how they become the slots of a prompt, on the host."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from wings_jax import distributed
from wings_jax.data import conversation, examples, samples, tokenization
from wings_jax.data import turns as turns_lib
from wings_jax.errors import UserError
from wings_jax.inference import chunks
from wings_jax.inference.sampling import SamplingParams
from wings_jax.model.presets import WingsArch


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
        # Images without a marker come before the text.
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

    def encode(self, request: Request) -> chunks.PromptSlots:
        """Returns the slots of a request up to the open answer; its images are not loaded yet.

        Raises:
          UserError: an empty prompt, markers and images that disagree, malformed turns, images
            for a text-only model, or more slots than the model supports.
        """
        if request.images and self.missing_parts:
            missing = " and no ".join(self.missing_parts)
            raise UserError(f"the model is text-only: it has no {missing}")

        slots = self.encode_any_length(request)
        self.check_length(slots.count, len(request.images))
        return slots

    def encode_any_length(self, request: Request) -> chunks.PromptSlots:
        """Returns what `encode` does, also for a prompt that is too long for the model.

        Raises:
          UserError: as `encode`, apart from the length.
        """
        turns = self.turns(request)
        if turns[-1]["from"] == "gpt":
            raise UserError("the last turn is an answer: there is nothing to answer")
        if not any(turn["value"].strip() for turn in turns if turn["from"] == "human"):
            raise UserError("the prompt is empty")

        # The header of the answer's turn is the end of the prompt.
        encoded = conversation.encode(turns, self.tokenizer, self.template, open_answer=True)
        return chunks.from_ids(encoded.ids, (), self.arch.vision.num_patches)

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

    def fit(self, params: SamplingParams, prompt: chunks.PromptSlots) -> SamplingParams:
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

        The processes of a job load the same ones together.

        Raises:
          UserError: an image is missing or cannot be read, or another host has another one.
        """
        if not images:
            return ()
        with distributed.together():
            loaded = tuple(examples.load_square(image, self.arch.vision) for image in images)

        # The same path may hold other bytes on another host.
        if not distributed.is_alone():
            digest = hashlib.sha256()
            for image in loaded:
                digest.update(f"{image.shape}".encode() + image.tobytes())
            names = ", ".join(str(x) for x in images if isinstance(x, str | os.PathLike))
            distributed.check_same(digest.hexdigest(), f"images ({names or len(images)})")
        return loaded


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
