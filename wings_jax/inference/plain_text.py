"""Plain text without a chat template: ids of contexts and continuations, and completions.

Pairs are tokenized as lm-eval does, so that log-likelihoods can be compared: spaces at the end of
the context belong to the continuation, and the continuation's ids are what the ids of both
together have after as many as the context alone has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from wings_jax.data import tokenization
from wings_jax.errors import UserError
from wings_jax.inference import chunks, prompts, scheduler, streaming
from wings_jax.inference.answers import Answer
from wings_jax.inference.generator import Generator
from wings_jax.inference.prompts import PromptProcessor
from wings_jax.inference.sampling import SamplingParams
from wings_jax.inference.scoring_plan import ScoringRequest

Ids = tuple[int, ...]


def start_ids(processor: PromptProcessor) -> Ids:
    """Returns what the tokenizer puts before every text: the id of BOS, or nothing."""
    tokenizer = processor.tokenizer.backend_tokenizer
    marked = tokenizer.encode("a", add_special_tokens=True).ids
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    # Some tokenizers put an end of text behind it as well; that one is left out.
    count = next((i for i in range(len(marked)) if marked[i:][: len(plain)] == plain), 0)
    return tuple(marked[:count])


def prefix_id(processor: PromptProcessor) -> int:
    """Returns the id that a text without context is conditioned on: BOS or, without it, EOS.

    Raises:
      UserError: the tokenizer has neither.
    """
    tokenizer = processor.tokenizer
    for token in (getattr(tokenizer, "bos_token_id", None), tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UserError("the tokenizer has neither a BOS nor an EOS token to begin a text with")


def split_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Returns both, with the spaces at the end of the context moved to the continuation.

    >>> split_spaces("Answer: ", "A")
    ('Answer:', ' A')
    """
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation


def encode_context(processor: PromptProcessor, text: str) -> Ids:
    """Returns the ids of a text that is to be continued, at least one. Raises UserError."""
    prompts.check_unicode(text, "the text")
    tokenizer = tokenization.as_text_tokenizer(processor.tokenizer)
    # Without any id, one token stands for the empty text.
    return (*start_ids(processor), *tokenizer.encode(text)) or (prefix_id(processor),)


def encode_pairs(
    processor: PromptProcessor, context: str, continuations: Sequence[str]
) -> tuple[Ids, list[Ids]]:
    """Returns the ids of a context, which are never none, and of each continuation.

    Raises:
      UserError: a text is not valid Unicode, or a continuation has no ids.
    """
    prompts.check_unicode(context + "".join(continuations), "the text")
    tokenizer = tokenization.as_text_tokenizer(processor.tokenizer)
    start = start_ids(processor)

    # The tokenizer's own BOS, or else what stands for it before an empty context.
    pairs = [split_spaces(context, continuation) for continuation in continuations]
    own = tokenizer.encode(context.rstrip())
    before = start if start or own else (prefix_id(processor),)
    answers = [tokenizer.encode(head + tail)[len(own) :] for head, tail in pairs]

    # A tokenizer may join a continuation with the context's last token.
    for continuation, ids in zip(continuations, answers, strict=True):
        if not ids:
            raise UserError(f"the continuation {continuation[:40]!r} has no tokens of its own")
    return (*before, *own), answers


def make_request(
    processor: PromptProcessor,
    context: str,
    continuations: Sequence[str],
    *,
    with_prompt: bool = False,
    group: str = "",
) -> ScoringRequest:
    """Returns the request that scores continuations of a plain text. Raises UserError."""
    ids, answers = encode_pairs(processor, context, continuations)
    return ScoringRequest(chunks.from_ids(ids, (), 1), answers, with_prompt, group)


def complete_texts(
    generator: Generator, texts: Sequence[tuple[str, SamplingParams]]
) -> Iterator[tuple[int, Answer | UserError]]:
    """Yields (index, how the model continues the text), or what is wrong with the text.

    A text that is too long is an error; nothing is cut off.
    """
    processor = generator.processor
    # Texts are encoded first, so that mistakes come before any computation.
    indices, wanted = [], []
    for index, (text, params) in enumerate(texts):
        try:
            slots = chunks.from_ids(encode_context(processor, text), (), 1)
            processor.check_length(slots.count)
            wanted.append((slots, (), params))
            indices.append(index)
        except UserError as error:
            yield index, error

    for number, answer in complete_slots(generator, wanted):
        yield indices[number], answer


def complete_slots(
    generator: Generator,
    wanted: Sequence[tuple[chunks.PromptSlots, Sequence[Any], SamplingParams]],
) -> Iterator[tuple[int, Answer | UserError]]:
    """Yields (index, how the model continues the slots), or which image cannot be read.

    Args:
      wanted: slots without images, the images as in `Request`, and how the answer is sampled.
    """
    processor = generator.processor
    # Rows of one batch, as for requests; images are loaded when a row is free.
    tasks = [
        _completion_task(processor, index, slots, images, processor.fit(params, slots))
        for index, (slots, images, params) in enumerate(wanted)
    ]
    for task, output in scheduler.run(generator.spec, generator.weights, tasks, generator.options):
        yield task.index, output if isinstance(output, UserError) else generator.answer(output)


def _completion_task(
    processor: PromptProcessor,
    index: int,
    slots: chunks.PromptSlots,
    images: Sequence[Any],
    params: SamplingParams,
) -> scheduler.GenerationTask:
    """Returns the task of one completion, which ends at its stop strings too."""

    def is_ended(tokens: Sequence[int]) -> bool:
        return streaming.cut_at_stop(processor.decode(tokens), params.stop)[1]

    return scheduler.GenerationTask(
        index,
        slots,
        len(images),
        lambda: processor.load_images(images),
        params,
        is_ended if params.stop else None,
    )
