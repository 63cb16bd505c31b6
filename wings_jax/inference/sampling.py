"""How the next token is sampled, and when an answer ends.

`SamplingParams` are set by the user, one per request; `BatchSamplingParams` hold the same for a
batch, as arrays, so that requests with different parameters share one compiled loop. The order of
the filters is that of Hugging Face: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wings_jax.errors import UserError
from wings_jax.model.layout import Array

SEED_MASK = 0xFFFFFFFFFFFFFFF  # 60 bits of a seed are used
MOST_TOKENS = 2**31 - 1
MIN_TEMPERATURE = 1e-5  # below, float32 logits overflow; the limit is greedy

# name -> least and greatest value; None without a limit
BOUNDS = {
    "max_new_tokens": (1, None),
    "temperature": (0, None),
    "top_k": (0, None),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (1e-5, 1e9),  # beyond, float32 logits overflow
}


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request is answered. The defaults are greedy.

    max_new_tokens      the most tokens of an answer
    temperature         0 takes the likeliest token, as does less than 1e-5; otherwise logits are
                        divided by it
    top_k               only the k likeliest tokens; 0 for all
    top_p               only the likeliest tokens that together have this probability
    min_p               only tokens at least this fraction as likely as the likeliest
    repetition_penalty  > 1 makes tokens of prompt and answer less likely (CTRL)
    seed                any whole number, of which 60 bits are used; an answer never depends on the
                        rest of its batch
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
        """Raises UserError naming the first value of a wrong type or out of range."""
        for name in ("max_new_tokens", "top_k", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or isinstance(value, bool):
                raise UserError(f"{name}: {value!r} is not a whole number")

        is_list = isinstance(self.stop, tuple | list)
        if not is_list or not all(isinstance(part, str) for part in self.stop):
            raise UserError(f"stop: {self.stop!r} is not a list of strings")

        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if not _is_finite_number(value):
                raise UserError(f"{name}: {value!r} is not a finite number")

        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name)
            if not value >= least or (most is not None and value > most):
                limit = f"at least {least}" if most is None else f"between {least} and {most}"
                raise UserError(f"{name}: {value} is not {limit}")


def _is_finite_number(value: object) -> bool:
    """Returns whether a value is a number that a float can hold, and not a bool.

    >>> [_is_finite_number(value) for value in (1, 0.5, True, "1", 10**400, float("nan"))]
    [True, True, False, False, False, False]
    """
    if not isinstance(value, int | float | np.number) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def change_params(params: SamplingParams, changes: Mapping[str, Any]) -> SamplingParams:
    """Returns the parameters with some fields changed; `stop` may be one string.

    >>> change_params(SamplingParams(), {"stop": "END"}).stop
    ('END',)

    Raises:
      UserError: an unknown field, or a value of a wrong type or out of range.
    """
    known = [field.name for field in dataclasses.fields(SamplingParams)]
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise UserError(f"unknown sampling parameter {unknown[0]!r}; there are {', '.join(known)}")

    changes = dict(changes)
    if isinstance(changes.get("stop"), str):
        changes["stop"] = (changes["stop"],)
    elif isinstance(changes.get("stop"), list):
        changes["stop"] = tuple(changes["stop"])
    return dataclasses.replace(params, **changes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchSamplingParams:
    """The parameters of B rows. What no row uses is None, and costs nothing.

    limits       i32[B]    the most tokens of an answer
    keys         u32[B,2]  random keys; if all rows are greedy, None like the next four
    temperature  f32[B]    0 for a greedy row
    top_k        i32[B]    V for all
    top_p        f32[B]    1 for all
    min_p        f32[B]    0 for all
    penalty      f32[B]    repetition penalty, or None
    """

    limits: Array
    keys: Array | None = None
    temperature: Array | None = None
    top_k: Array | None = None
    top_p: Array | None = None
    min_p: Array | None = None
    penalty: Array | None = None


def stack_params(params: Sequence[SamplingParams], vocab_size: int) -> BatchSamplingParams:
    """Returns the parameters of a batch as numpy arrays."""

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(row, name) for row in params], dtype)

    # Python's integers have no limit, arrays do: clamp before the conversion.
    limits = np.array([min(row.max_new_tokens, MOST_TOKENS) for row in params], np.int32)
    penalties = column("repetition_penalty", np.float32)
    penalty = None if (penalties == 1).all() else penalties

    temperature = column("temperature", np.float32)
    temperature[temperature < MIN_TEMPERATURE] = 0
    if not temperature.any():
        return BatchSamplingParams(limits, penalty=penalty)

    top_k = np.array([min(row.top_k, vocab_size) for row in params], np.int32)
    seeds = np.array([int(row.seed) & SEED_MASK for row in params], np.int64)
    return BatchSamplingParams(
        limits=limits,
        keys=np.stack([seeds >> 32, seeds & 0xFFFFFFFF], axis=-1).astype(np.uint32),
        temperature=temperature,
        top_k=np.where(top_k == 0, vocab_size, top_k),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        penalty=penalty,
    )


def sample_tokens(
    logits: jax.Array, params: BatchSamplingParams, count: jax.Array, seen: jax.Array | None
) -> jax.Array:
    """Returns the next tokens i32[B].

    Args:
      logits: f32[B,V].
      count: i32[B], how many tokens of the answer there are already.
      seen: bool[B,V], the tokens of prompt and answer; needed with a repetition penalty.
    """
    # A penalty above 1 makes positive logits smaller and negative ones larger in magnitude.
    if params.penalty is not None and seen is not None:
        penalty = params.penalty[:, None]
        penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(seen, penalized, logits)

    likeliest = logits.argmax(-1).astype(jnp.int32)
    if params.keys is None or params.temperature is None:
        return likeliest

    # Greedy rows of a mixed batch are computed at temperature 1 and then replaced.
    is_sampled = params.temperature > 0
    temperature = jnp.where(is_sampled, params.temperature, 1.0)
    filtered = filter_logits(logits / temperature[:, None], params)

    # Token n of a row is a function of its seed and n only.
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(jnp.asarray(params.keys)), count)
    sampled = jax.vmap(jax.random.categorical)(keys, filtered)
    return jnp.where(is_sampled, sampled, likeliest).astype(jnp.int32)


def filter_logits(logits: jax.Array, params: BatchSamplingParams) -> jax.Array:
    """Returns f32[B,V] with -inf where top-k, top-p or min-p excludes a token."""
    if params.top_k is None or params.top_p is None or params.min_p is None:
        return logits

    # Logits in descending order; the rank i32[V] is the place in it.
    ordered = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    ordered = jnp.where(rank < params.top_k[:, None], ordered, -jnp.inf)

    # A token passes top-p if the likelier ones together have less than that probability.
    probability = jax.nn.softmax(ordered, axis=-1)
    likelier = jnp.cumsum(probability, axis=-1) - probability
    passes_top_p = likelier < params.top_p[:, None]
    passes_min_p = probability >= params.min_p[:, None] * probability[:, :1]
    passes = passes_top_p & passes_min_p & jnp.isfinite(ordered)

    # The likeliest token always passes. What passes is a prefix of the order, so its last logit
    # is a threshold.
    last = jnp.maximum(passes.sum(-1), 1) - 1
    threshold = jnp.take_along_axis(ordered, last[:, None], axis=-1)
    return jnp.where(logits >= threshold, logits, -jnp.inf)
