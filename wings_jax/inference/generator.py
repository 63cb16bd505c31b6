"""Answers about images and text: the library surface of inference.

restored = checkpoint.load("runs/stage2")
generator = Generator.of(restored)
print(generator.generate([Request("What is this?", ["cat.jpg"])])[0].text)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from wings_jax.data import conversation, tokenization
from wings_jax.errors import UserError
from wings_jax.inference import batch, engine
from wings_jax.inference.prompts import Reader, Request
from wings_jax.inference.sampling import Sampling
from wings_jax.model.presets import WingsArch


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model said.

    text      without what ended it
    tokens    ids, without the stop token
    reason    why it ended: "stop" (a stop token), "string" (a stop string) or "length"
    prompt    how many slots the prompt took
    logprobs  of each token, where asked for
    """

    text: str
    tokens: tuple[int, ...]
    reason: str
    prompt: int
    logprobs: tuple[float, ...] | None = None


class Generator:
    """Answers requests with one model.

    Args:
      params: nested parameters; matrices are kept in `dtype` (bfloat16 on accelerators, float32
        on a CPU by default).
      tokenizer: a fast tokenizer of `transformers`.
      template: a name of `conversation.TEMPLATES`, or a Template.
      rows: how many requests are answered at once.
      sampling: what a request that says nothing gets.
    """

    def __init__(
        self,
        arch: WingsArch,
        params: Mapping[str, Any],
        tokenizer: Any,
        template: str | conversation.Template,
        *,
        dtype: str | None = None,
        kernel: str = "auto",
        rows: int = 16,
        sampling: Sampling | None = None,
    ):
        if isinstance(template, str):
            template = conversation.template_named(template)
        self.spec = engine.Spec(arch, dtype or usual_dtype(), kernel)
        self.weights = engine.split_layers(params, self.spec)
        self.tokenizer = tokenizer
        self.template = template
        self.sampling = sampling or Sampling()
        self.reader = Reader(arch, tokenization.as_text_tokenizer(tokenizer), template)
        self.plan = batch.Plan(rows, stops=stop_tokens(tokenizer, template))

    @classmethod
    def of(cls, restored: Any, **options: Any) -> Generator:
        """Returns the generator of a checkpoint (`training.checkpoint.load`)."""
        template = restored.config.data.template
        return cls(restored.arch, restored.params, restored.tokenizer, template, **options)

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Returns an answer to every request, in their order.

        Raises:
          UserError: a request is wrong; the message says which one.
        """
        answers: list[Answer | None] = [None] * len(requests)
        for index, answer in self.answers(requests):
            if isinstance(answer, UserError):
                where = f"request {index + 1}: " if len(requests) > 1 else ""
                raise UserError(f"{where}{answer}") from answer
            answers[index] = answer
        return answers

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer | UserError]]:
        """Yields (index, answer) as they end, or what is wrong with a request instead."""
        tasks = []
        for index, request in enumerate(requests):
            try:
                tasks.append(self._task(index, request))
            except UserError as error:
                yield index, error
        for task, draft in batch.run(self.spec, self.weights, tasks, self.plan):
            is_error = isinstance(draft, UserError)
            yield task.index, draft if is_error else self._answer(draft)

    def _task(self, index: int, request: Request) -> batch.Task:
        slots = self.reader.read(request)
        wish = request.sampling or self.sampling
        room = self.reader.limit - len(slots.tokens)
        wish = dataclasses.replace(wish, max_new_tokens=min(wish.max_new_tokens, room))
        return batch.Task(
            index,
            slots,
            len(request.images),
            lambda: self.reader.load(request.images),
            wish,
            (lambda tokens: self._cut(tokens, wish)[1]) if wish.stop else None,
        )

    def _answer(self, draft: batch.Draft) -> Answer:
        tokens, wish = list(draft.tokens), draft.task.sampling
        reason = "length"
        if tokens and tokens[-1] in self.plan.stops:
            tokens, reason = tokens[:-1], "stop"
        text, is_cut = self._cut(tokens, wish)
        return Answer(
            text,
            tuple(tokens),
            "string" if is_cut else reason,
            len(draft.task.slots.tokens),
            tuple(draft.logprobs[: len(tokens)]) if wish.logprobs else None,
        )

    def _cut(self, tokens: Sequence[int], wish: Sampling) -> tuple[str, bool]:
        """Returns the text of an answer up to its first stop string, and whether there was one."""
        text = self.text(tokens)
        ends = [at for at in (text.find(string) for string in wish.stop) if at >= 0]
        return (text[: min(ends)], True) if ends else (text, False)

    def text(self, tokens: Sequence[int]) -> str:
        """Returns the text of an answer's tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).removeprefix(
            self.template.lead
        )


def usual_dtype() -> str:
    """Returns the dtype of the matmuls where none is asked for."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def stop_tokens(tokenizer: Any, template: conversation.Template) -> tuple[int, ...]:
    """Returns the ids that end an answer: end of turn (template) and of text (tokenizer)."""
    after = template.speakers["gpt"].after
    ids = {tokenization.as_text_tokenizer(tokenizer).id_of(after.strip())}
    ids.add(getattr(tokenizer, "eos_token_id", None))
    return tuple(sorted(ids - {None}))
