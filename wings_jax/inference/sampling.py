"""How the next token is chosen, and when an answer ends.

`Sampling` is what a user says, one per request; `Choice` the same for a batch, as arrays, so that
requests with different wishes share one compiled loop. The order of the filters is that of
Hugging Face: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from wings_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """One request's wishes. The defaults are greedy.

    max_new_tokens      an answer ends after so many, if not before
    temperature         0 takes the likeliest token; else logits are divided by it
    top_k               only the k likeliest tokens; 0 for all
    top_p               only the likeliest tokens that make up this probability
    min_p               only tokens at least this fraction as likely as the likeliest
    repetition_penalty  > 1 makes what stands in prompt and answer less likely (CTRL)
    seed                of the draws; a request's answer never depends on its batch mates
    stop                strings that end an answer, and are not part of it
    logprobs            whether the log-probability of each token is returned
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer):
                raise UserError(f"{name}: {value!r} is not a whole number")
        if isinstance(self.stop, str) or not all(isinstance(part, str) for part in self.stop):
            raise UserError(f"stop: {self.stop!r} is not a list of strings")
        bounds = {
            "max_new_tokens": (1, None),
            "temperature": (0, None),
            "top_k": (0, None),
            "top_p": (0, 1),
            "min_p": (0, 1),
        }
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if not value >= least or (most is not None and value > most):
                limit = f"at least {least}" if most is None else f"between {least} and {most}"
                raise UserError(f"{name}: {value} is not {limit}")
        if not self.repetition_penalty > 0:
            raise UserError(f"repetition_penalty: {self.repetition_penalty} is not positive")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchSamplingParams:
    """The wishes of B rows. What no row asks for is None, and costs nothing.

    limits       i32[B]    most tokens of an answer
    keys         u32[B,2]  None if all rows are greedy, and then the next four too
    temperature  f32[B]    0 for a greedy row
    top_k        i32[B]    V for all
    top_p, min_p f32[B]
    penalty      f32[B]    repetition penalty, or None
    """

    limits: jax.Array
    keys: jax.Array | None = None
    temperature: jax.Array | None = None
    top_k: jax.Array | None = None
    top_p: jax.Array | None = None
    min_p: jax.Array | None = None
    penalty: jax.Array | None = None


def stack_params(wishes: Sequence[SamplingParams], vocab_size: int) -> BatchSamplingParams:
    """Returns the wishes of a batch as arrays (numpy)."""

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(wish, name) for wish in wishes], dtype)

    limits = column("max_new_tokens", np.int32)
    penalty = column("repetition_penalty", np.float32)
    penalty = None if (penalty == 1).all() else penalty
    temperature = column("temperature", np.float32)
    if not temperature.any():
        return BatchSamplingParams(limits, penalty=penalty)
    top_k = column("top_k", np.int32)
    seeds = column("seed", np.int64) & 0xFFFFFFFFFFFFFFF
    return BatchSamplingParams(
        limits=limits,
        keys=np.stack([seeds >> 32, seeds & 0xFFFFFFFF], axis=-1).astype(np.uint32),
        temperature=temperature,
        top_k=np.where(top_k == 0, vocab_size, np.minimum(top_k, vocab_size)),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        penalty=penalty,
    )


def sample_tokens(
    logits: jax.Array, choice: BatchSamplingParams, count: jax.Array, seen: jax.Array | None
) -> jax.Array:
    """Returns the next tokens i32[B].

    Args:
      logits: f32[B,V].
      count: i32[B], how many tokens of the answer there are already.
      seen: bool[B,V], the tokens of prompt and answer; needed with a repetition penalty.
    """
    if choice.penalty is not None:
        penalty = choice.penalty[:, None]
        milder = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(seen, milder, logits)
    likeliest = logits.argmax(-1).astype(jnp.int32)
    if choice.keys is None:
        return likeliest
    warm = choice.temperature > 0
    logits = filter_logits(logits / jnp.where(warm, choice.temperature, 1.0)[:, None], choice)
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(choice.keys), count)
    drawn = jax.vmap(jax.random.categorical)(keys, logits)
    return jnp.where(warm, drawn, likeliest).astype(jnp.int32)


def filter_logits(logits: jax.Array, choice: BatchSamplingParams) -> jax.Array:
    """Returns f32[B,V] with -inf where top-k, top-p or min-p rules a token out."""
    ordered = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    ordered = jnp.where(rank < choice.top_k[:, None], ordered, -jnp.inf)
    likely = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(likely, axis=-1) - likely
    kept = (before < choice.top_p[:, None]) & (likely >= choice.min_p[:, None] * likely[:, :1])
    last = jnp.maximum((kept & jnp.isfinite(ordered)).sum(-1), 1) - 1
    floor = jnp.take_along_axis(ordered, last[:, None], axis=-1)
    return jnp.where(logits >= floor, logits, -jnp.inf)
