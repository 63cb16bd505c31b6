"""The passes of a benchmark over a model: which requests answer which protocols.

Protocols whose prompts are the same text are answered by one pass. A likelihood pass has a scoring
request for every different context of an item, usually one; a generation pass one completion.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from wings_jax import distributed
from wings_jax.errors import UserError
from wings_jax.evaluation.benchmarks import prompts
from wings_jax.evaluation.benchmarks.record import (
    PROTOCOLS,
    TURNS,
    Benchmark,
    DataSet,
    Item,
    Prompt,
)
from wings_jax.inference import plain_text
from wings_jax.inference.prompts import PromptProcessor, Request
from wings_jax.inference.sampling import SamplingParams
from wings_jax.inference.scoring_plan import ScoringRequest

GENERATE, PERPLEXITY = "generate", "perplexity"
MAX_OPTIONS = 64  # of an item: part of the number of an entry
ANY_SIZE, ADDED_SLOTS = sys.maxsize, 4  # of `byte_sizes`


@dataclasses.dataclass(frozen=True)
class EvaluationPass:
    """One pass over the items of a benchmark."""

    # Key of its prompt, which its results are named by.
    key: str
    # How items are written.
    prompt: Prompt
    # What is computed from it.
    protocols: tuple[str, ...]

    @property
    def is_generation(self) -> bool:
        """Returns whether answers are generated, not scored."""
        return self.protocols == (GENERATE,)

    @property
    def is_text(self) -> bool:
        """Returns whether the items are texts whose own likelihood counts."""
        return self.protocols == (PERPLEXITY,)


@dataclasses.dataclass(frozen=True)
class OptionRequest:
    """A scoring request of an item, for some of its options."""

    # Position of the item.
    item: int
    # Options that its answers are, in their order.
    options: tuple[int, ...]
    # Prompt without images, and answers.
    request: ScoringRequest


def plan_passes(benchmark: Benchmark, protocols: Sequence[str]) -> list[EvaluationPass]:
    """Returns the passes that answer the protocols; equal prompts make one pass."""
    passes: list[EvaluationPass] = []
    for protocol in sorted(protocols, key=PROTOCOLS.index):
        key = benchmark.prompt_key(protocol)
        prompt = benchmark.prompts[key]

        # Likelihoods of one prompt answer all protocols; a generation is a pass of its own.
        same = [
            i
            for i, one in enumerate(passes)
            if one.prompt == prompt and GENERATE not in (protocol, *one.protocols)
        ]

        if same:
            found = passes[same[0]]
            passes[same[0]] = dataclasses.replace(found, protocols=(*found.protocols, protocol))
        else:
            passes.append(EvaluationPass(key, prompt, (protocol,)))
    return passes


def make_option_requests(
    processor: PromptProcessor, one: EvaluationPass, data: DataSet, shots: Sequence[Sequence[Item]]
) -> list[OptionRequest]:
    """Returns the scoring requests of a pass, item by item, without images.

    Args:
      shots: solved examples of each item.

    Raises:
      UserError: an item cannot be written or tokenized.
    """
    requests = []
    for index, (item, examples) in enumerate(zip(data.items, shots, strict=True)):
        text = prompts.render_choice(one.prompt, item, examples)
        # Usually all options have one context; in WinoGrande each has its own.
        options_of: dict[str, list[int]] = {}
        for option, context in enumerate(text.contexts):
            options_of.setdefault(context, []).append(option)

        # The options of one context are scored together.
        for context, options in options_of.items():
            continuations = [text.continuations[option] for option in options]
            whole = text.beginning + context
            try:
                request = _scoring_request(processor, one, item, whole, continuations)
            except UserError as error:
                raise UserError(f"item {item.id}: {error}") from error
            requests.append(OptionRequest(index, tuple(options), request))
    return requests


def _scoring_request(
    processor: PromptProcessor,
    one: EvaluationPass,
    item: Item,
    context: str,
    continuations: Sequence[str],
) -> ScoringRequest:
    """Returns the request of one context, as plain text or as a turn of the chat template."""
    with_prompt = "ppl" in one.protocols
    group = f"{one.key}:{item.group}"
    if not (one.prompt.chat or item.images):
        return plain_text.make_request(
            processor, context, continuations, with_prompt=with_prompt, group=group
        )

    # In a chat, the context is a human turn and each option an answer to it.
    request = chat_request(item, context)

    ends = processor.template.speakers["gpt"].after
    # The answer's turn has no space in front, and its end does not count.
    answers = []
    for text in continuations:
        whole = processor.answer_ids(request, text.strip())
        end = processor.answer_ids(request, "")
        answers.append(whole[: len(whole) - len(end)] if ends else whole)
    return ScoringRequest(processor.encode_any_length(request), answers, with_prompt, group)


def entry_number(pass_number: int, items: int, item: int, option: int) -> int:
    """Returns the number of an entry in the journal of a task."""
    return (pass_number * items + item) * MAX_OPTIONS + option


def entry_item(number: int, items: int) -> int:
    """Returns the position of the item of an entry, given its number.

    >>> entry_item(entry_number(2, 10, 7, 3), 10)
    7
    """
    return number // MAX_OPTIONS % items


def chat_request(item: Item, text: str, sampling: SamplingParams | None = None) -> Request:
    """Returns an item as a human turn with its images, which are read later.

    `Item.extra` may have turns before it, {"from": human|gpt, "value": text}, as TURNS.
    The images are those of `Item.images`; `read_images` gives their bytes.
    """
    # Without images, a marker in the text is a word.
    marked = text if item.images else text.replace("<image>", "\\<image>")
    names = [image.name for image in item.images]
    history = item.extra.get(TURNS, ())
    if not history:
        return Request(marked, names, sampling)
    return Request([*history, {"from": "human", "value": marked}], names, sampling)


def read_images(item: Item) -> list[bytes]:
    """Returns the encoded bytes of an item's images. Raises UserError naming the image."""
    if not item.images:
        return []
    with distributed.together():
        return [image.read() for image in item.images]


def byte_sizes(
    one: EvaluationPass, items: Sequence[Item], shots: Sequence[Sequence[Item]]
) -> dict[int, int]:
    """Returns position -> bytes of an item's longest text: at least its tokens, of plain text.

    Items with images and turns of a chat have other tokens, too: their size is `ANY_SIZE`.
    """
    sizes = {}
    for index, (item, examples) in enumerate(zip(items, shots, strict=True)):
        if one.prompt.chat or item.images:
            sizes[index] = ANY_SIZE
            continue

        if one.is_generation:
            texts = [prompts.render_generation(one.prompt, item, examples)]
        else:
            choice = prompts.render_choice(one.prompt, item, examples)
            pairs = zip(choice.contexts, choice.continuations, strict=True)
            texts = [choice.beginning + context + answer for context, answer in pairs]
        # The tokenizer may add a start token and a space, and a new token needs a slot.
        sizes[index] = max((len(text.encode()) for text in texts), default=0) + ADDED_SLOTS
    return sizes


def option_sizes(asked: Sequence[OptionRequest]) -> dict[int, int]:
    """Returns position of an item -> slots of its longest request, which decides if it fits."""
    sizes: dict[int, int] = {}
    for request in asked:
        sizes[request.item] = max(sizes.get(request.item, 0), sum(request.request.size))
    return sizes


def load_images(processor: PromptProcessor, item: Item) -> tuple[np.ndarray, ...]:
    """Returns an item's images as the vision tower's input. Raises UserError naming the image."""
    loaded: list[np.ndarray] = []
    for image, content in zip(item.images, read_images(item), strict=True):
        try:
            loaded += processor.load_images([content])
        except UserError as error:
            raise UserError(f"{image.name}: {error}") from error
    return tuple(loaded)


def image_problem(processor: PromptProcessor, item: Item) -> str:
    """Returns why the images of an item cannot be read, "" if they can."""
    try:
        load_images(processor, item)
    except UserError as error:
        return str(error)
    return ""


def check_lengths(name: str, sizes: Mapping[int, int], total: int, limit: int, shots: int) -> None:
    """Raises UserError if items are longer than the model supports, saying how many.

    Args:
      sizes: position of an item -> its slots with the longest answer.
      limit: the most slots that the model supports.
    """
    long = [size for size in sizes.values() if size > limit]
    if long:
        with_shots, advice = (f" with {shots} shots", "lower --shots or ") if shots else ("", "")
        raise UserError(
            f"{name}: {len(long)} of {total} items do not fit the model's {limit} positions"
            f"{with_shots} (the longest has {max(long)}): {advice}leave the task out"
        )
