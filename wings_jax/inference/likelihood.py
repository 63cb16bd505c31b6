"""How likely given answers are. The prompt is read once, however many answers it is offered."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from wings_jax import errors
from wings_jax.inference import decode, device_memory, engine, prompts, scheduler
from wings_jax.inference.engine import Chunk, ModelSpec, Weights
from wings_jax.inference.kv_cache import KVCache
from wings_jax.inference.prompts import PromptSlots


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """One given answer under the model.

    logprob    sum over its tokens, in nats
    tokens     how many there are
    is_greedy  whether it is what greedy decoding would have said
    """

    logprob: float
    tokens: int
    is_greedy: bool

    def __add__(self, other: Likelihood) -> Likelihood:
        """Returns both as one, the other behind this one."""
        return Likelihood(
            self.logprob + other.logprob,
            self.tokens + other.tokens,
            self.is_greedy and other.is_greedy,
        )


@dataclasses.dataclass(frozen=True)
class ScoringRequest:
    """A prompt, and the answers that are offered for it, as ids."""

    prompt: PromptSlots
    answers: Sequence[Sequence[int]]

    @property
    def size(self) -> tuple[int, int]:
        """Returns the slots of the prompt and of the longest answer."""
        return self.prompt.count, max(map(len, self.answers), default=0)


@functools.partial(jax.jit, static_argnames="spec")
def read_answers(
    spec: ModelSpec, weights: Weights, memory: KVCache, first: jax.Array, chunk: Chunk
) -> tuple[jax.Array, jax.Array]:
    """Returns f32[B], i32[B]: log-probability of the chunk's tokens, and how many are likeliest.

    `first` f32[B,V] are the logits behind the prompt. The memory stays as it is.
    """
    _, hidden = engine.extend(spec, weights, memory, chunk)

    def one(column: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        state, token, used = column
        return judge(engine.logits(spec, weights, state), token, used)

    used = chunk.modality > 0
    logprob, right = judge(first, chunk.tokens[:, 0], used[:, 0])
    later = (hidden[:, :-1], chunk.tokens[:, 1:], used[:, 1:])
    if chunk.tokens.shape[1] > 1:
        columns = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), later)
        more = jax.lax.map(one, columns)
        logprob, right = logprob + more[0].sum(0), right + more[1].sum(0)
    return logprob, right


def judge(logits: jax.Array, tokens: jax.Array, used: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns f32[B], i32[B] of f32[B,V] and tokens i32[B]: log-probability, and if likeliest."""
    picked = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    logprob = jnp.where(used, picked - jax.nn.logsumexp(logits, axis=-1), 0.0)
    return logprob, ((logits.argmax(-1) == tokens) & used).astype(jnp.int32)


def score(
    spec: ModelSpec, weights: Weights, offers: Sequence[ScoringRequest], rows: int
) -> Iterator[tuple[int, list[Likelihood]]]:
    """Yields (index, the likelihood of every answer) of every offer, the short ones first.

    Raises:
      UserError: the rows do not fit the devices' memory.
    """
    order = sorted(range(len(offers)), key=lambda i: offers[i].size)
    for first in range(0, len(order), rows):
        chosen = order[first : first + rows]
        with errors.full_memory(device_memory.ADVICE):
            scored = _score_some(spec, weights, [offers[i] for i in chosen])
        yield from zip(chosen, scored, strict=True)


def _score_some(
    spec: ModelSpec, weights: Weights, offers: Sequence[ScoringRequest]
) -> list[list[Likelihood]]:
    size, arch = prompts.power(len(offers)), spec.arch
    rows = [offer.prompt for offer in offers] + [prompts.EMPTY] * (size - len(offers))
    length = prompts.bucket(max(row.count for row in rows))
    images = prompts.power(max(len(row.images) for row in rows))
    starts = np.zeros(size, np.int32)
    chunk = prompts.make_chunk(rows, starts, arch, length=length, images=images)
    pictures = [picture for row in rows for picture in row.images]
    features = scheduler.encode(spec, weights, pictures, at_once=size, room=size * images)
    longest = max((len(ids) for offer in offers for ids in offer.answers), default=1)
    room = prompts.bucket(longest)
    slots = {name: picks.shape[1] for name, picks in chunk.picks.items()}
    slots |= {"main": length + room} | ({"textual": length + room} if "textual" in slots else {})
    device_memory.check(spec, size, slots)
    memory, logits = decode.prefill(
        spec, weights, chunk, features, slots=tuple(sorted(slots.items()))
    )
    starts = np.array([row.count for row in rows], np.int32)
    found: list[list[Likelihood]] = [[] for _ in offers]
    for turn in range(max(len(offer.answers) for offer in offers)):
        ids = [offer.answers[turn] if turn < len(offer.answers) else () for offer in offers]
        said = [prompts.from_ids(some, (), 1) for some in ids]
        said += [prompts.EMPTY] * (size - len(said))
        answer = prompts.make_chunk(said, starts, arch, length=room, images=0)
        logprob, right = jax.device_get(read_answers(spec, weights, memory, logits, answer))
        for row, some in enumerate(ids):
            if turn < len(offers[row].answers):
                is_greedy = int(right[row]) == len(some)
                found[row].append(Likelihood(float(logprob[row]), len(some), is_greedy))
    return found
