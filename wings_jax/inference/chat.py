"""A multi-turn conversation: ask, stream the answer, ask again."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np

from wings_jax.data import turns as turns_lib
from wings_jax.errors import UserError
from wings_jax.inference import streaming
from wings_jax.inference.dialogue import Dialogue
from wings_jax.inference.prompts import PromptProcessor, Request
from wings_jax.inference.sampling import SamplingParams


class Chat:
    """The turns and images of a conversation, and the KV cache of what was computed of them.

    turns   {"from", "value"} as in the data files, the answers included
    images  u8[h,w,3], the vision tower's input
    """

    def __init__(
        self,
        processor: PromptProcessor,
        dialogue: Dialogue,
        sampling: SamplingParams,
        system: str = "",
    ):
        self._processor, self._dialogue = processor, dialogue
        self._sampling, self._system = sampling, system
        self.reset()

    @property
    def computed_slots(self) -> int:
        """Returns how many prompt slots the last answer had to compute; the others were cached."""
        return self._dialogue.computed_slots

    def reset(self) -> None:
        """Starts a new conversation, with the system text only."""
        self._dialogue.reset()
        system = [{"from": "system", "value": self._system}] if self._system else []
        self.turns: list[dict[str, str]] = system
        self.images: list[np.ndarray] = []

    def ask(
        self, text: str, images: Sequence[Any] = (), sampling: SamplingParams | None = None
    ) -> Generator[str]:
        """Yields the answer piece by piece, and records what was yielded as the answer's turn.

        Images without a marker in the text come before it. If the caller stops iterating, the
        answer ends there; before any text of it, the question is removed too.

        Raises:
          UserError: as `PromptProcessor.encode`, or the conversation does not fit the devices'
            memory; it is then as it was before the question.
        """
        new_images = self._processor.load_images(images)
        question = self._processor.add_markers(text, len(new_images))
        all_images = [*self.images, *new_images]

        # In a conversation with images, `<image>` in a turn without images has to be escaped.
        earlier = self.turns
        if new_images and not self.images:
            earlier = [escape_turn(turn) for turn in earlier]

        turn = {"from": "human", "value": question}
        turns = [*earlier, escape_turn(turn) if self.images and not new_images else turn]

        # Nothing is changed until the prompt is known to be valid.
        prompt = self._processor.encode(Request(turns, all_images))
        prompt = dataclasses.replace(prompt, images=tuple(all_images))
        params = self._processor.fit(sampling or self._sampling, prompt)

        # The answer's turn grows with what is yielded, so it is right wherever the caller stops.
        before = self.turns, self.images
        answer, is_complete = {"from": "gpt", "value": ""}, False
        self.turns, self.images = [*turns, answer], all_images
        try:
            for piece in streaming.stream_text(
                self._dialogue.answer(prompt, params),
                self._processor.decode,
                stop_tokens=self._dialogue.stops,
                stop_strings=params.stop,
            ):
                answer["value"] += piece
                yield piece
            is_complete = True
        except UserError:
            answer["value"] = ""
            raise
        finally:
            # An answer of no text is not a turn. The caller may have changed the turns meanwhile.
            is_last = bool(self.turns) and self.turns[-1] is answer
            if is_last and not answer["value"]:
                self.turns.pop()
                if not is_complete:
                    self.turns, self.images = before

    def check_image(self, image: Any) -> None:
        """Raises UserError if an image cannot be read."""
        self._processor.load_images([image])

    def undo(self) -> None:
        """Removes the last question and its answer.

        Raises:
          UserError: there is no question.
        """
        questions = [i for i, turn in enumerate(self.turns) if turn["from"] == "human"]
        if not questions:
            raise UserError("no question has been asked yet")

        last = questions[-1]
        image_count = turns_lib.count_markers(self.turns[last]["value"]) if self.images else 0
        self.turns = self.turns[:last]
        self.images = self.images[: len(self.images) - image_count]
        if image_count and not self.images:
            self.turns = [unescape_turn(turn) for turn in self.turns]


def escape_turn(turn: Mapping[str, str]) -> dict[str, str]:
    """Returns a turn of a conversation without images as a turn of one with images.

    >>> print(escape_turn({"from": "human", "value": "What does <image> mean?"})["value"])
    What does \\<image> mean?
    """
    is_human = turn["from"] == "human"
    text = turn["value"]
    return {**turn, "value": turns_lib.escape_markers(text) if is_human else text}


def unescape_turn(turn: Mapping[str, str]) -> dict[str, str]:
    """Returns a turn of a conversation that has no images any more: undoes `escape_turn`."""
    is_human = turn["from"] == "human"
    text = turn["value"]
    return {**turn, "value": "".join(turns_lib.split_markers(text)) if is_human else text}
