"""Answers of a model: which tokens end one, and the text of one that has ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from wings_jax.data import conversation, tokenization
from wings_jax.inference import streaming
from wings_jax.inference.scheduler import PartialOutput


@dataclasses.dataclass(frozen=True)
class Answer:
    """A generated answer. `str(answer)` is its text.

    text      without the stop token or stop string that ended it
    tokens    ids, without the stop token
    reason    why it ended: "stop" (a stop token), "string" (a stop string) or "length"
    prompt    how many slots the prompt has
    logprobs  the log-probability of each token, with `SamplingParams.logprobs`
    """

    text: str
    tokens: tuple[int, ...]
    reason: str
    prompt: int
    logprobs: tuple[float, ...] | None = None

    def __str__(self) -> str:
        return self.text


def stop_tokens(
    tokenizer: tokenization.HFTokenizer,
    template: conversation.Template,
    eos_ids: Sequence[int] = (),
) -> tuple[int, ...]:
    """Returns the ids that end an answer.

    They are the template's end of turn, the tokenizer's end of text, and `eos_ids`.
    """
    end_of_turn = template.speakers["gpt"].after.strip()
    ids = {
        tokenization.as_text_tokenizer(tokenizer).id_of(end_of_turn),
        tokenizer.eos_token_id,
        *eos_ids,
    }
    return tuple(sorted(token for token in ids if token is not None))


def finish_answer(
    output: PartialOutput, decode: Callable[[Sequence[int]], str], stops: Sequence[int]
) -> Answer:
    """Returns the answer of a finished task of the scheduler.

    Args:
      decode: returns the text of token ids.
      stops: the ids that end an answer, of `stop_tokens`.
    """
    # The stop token is generated, but not part of the answer.
    tokens, params = list(output.tokens), output.task.sampling
    reason = "length"
    if tokens and tokens[-1] in stops:
        tokens, reason = tokens[:-1], "stop"

    # Tokens after a stop string may have been generated in the same device call.
    text, is_cut = streaming.cut_at_stop(decode(tokens), params.stop)
    return Answer(
        text,
        tuple(tokens),
        "string" if is_cut else reason,
        output.task.slots.count,
        tuple(output.logprobs[: len(tokens)]) if params.logprobs else None,
    )
