"""A conversation as people have it: ask, read along, ask on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from wings_jax.data import conversation
from wings_jax.errors import UserError
from wings_jax.inference.dialogue import Dialogue
from wings_jax.inference.prompts import PromptProcessor, Request
from wings_jax.inference.sampling import SamplingParams
from wings_jax.inference.streaming import TextStream


class Chat:
    """Turns, pictures, and the memory of what was read of them.

    turns   {"from", "value"} as in the data files, the answers included
    images  the pictures as the tower reads them
    """

    def __init__(
        self,
        reader: PromptProcessor,
        dialogue: Dialogue,
        sampling: SamplingParams,
        system: str = "",
    ):
        self._reader, self._dialogue = reader, dialogue
        self._sampling, self._system = sampling, system
        self.reset()

    @property
    def read(self) -> int:
        """Returns how many slots had to be read for the last answer; the others were known."""
        return self._dialogue.read

    def reset(self) -> None:
        """Begins anew, with the system text only."""
        self._dialogue.reset()
        system = [{"from": "system", "value": self._system}] if self._system else []
        self.turns: list[dict[str, str]] = system
        self.images: list[np.ndarray] = []

    def ask(
        self, text: str, images: Sequence[Any] = (), sampling: SamplingParams | None = None
    ) -> Iterator[str]:
        """Yields the answer piece by piece; what was yielded is what is remembered.

        Images without a marker in the text stand in front of it. If the caller stops reading, the
        answer ends there.

        Raises:
          UserError: as `Reader.read`, or it does not fit the devices' memory; the conversation is
            then as it was before.
        """
        loaded = self._reader.load(images)
        asked = self._reader.marked(text, len(loaded))
        turns = [*self.turns, {"from": "human", "value": asked}]
        pictures = [*self.images, *loaded]
        prompt = self._reader.read(Request(turns, pictures))
        prompt = dataclasses.replace(prompt, images=tuple(pictures))
        wish = self._reader.fit(sampling or self._sampling, prompt)
        before = self.turns, self.images
        self.turns, self.images = turns, pictures
        answer = {"from": "gpt", "value": ""}
        self.turns.append(answer)
        stream = TextStream(self._reader.text, wish.stop)
        try:
            for piece in self._dialogue.answer(prompt, wish):
                tokens = [t for t in piece.tokens if t not in self._dialogue.stops]
                fresh = stream.add(tokens, is_last=piece.is_last)
                answer["value"] += fresh
                if fresh:
                    yield fresh
                if stream.is_cut:
                    return
        except UserError:
            self.turns, self.images = before
            raise
        finally:
            if self.turns and self.turns[-1] is answer and not answer["value"]:
                self.turns.pop()

    def check_image(self, image: Any) -> None:
        """Raises UserError if a picture cannot be read."""
        self._reader.load([image])

    def undo(self) -> None:
        """Takes back the last question and its answer.

        Raises:
          UserError: nothing has been asked.
        """
        asked = [i for i, turn in enumerate(self.turns) if turn["from"] == "human"]
        if not asked:
            raise UserError("nothing has been asked yet")
        gone = self.turns[asked[-1]]["value"].count(conversation.MARKER)
        self.turns = self.turns[: asked[-1]]
        self.images = self.images[: len(self.images) - gone]
