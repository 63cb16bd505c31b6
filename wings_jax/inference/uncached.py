"""Generation without a KV cache, for models that are not causal.

Text-only conversations are causal with any semantics. With the release's semantics a conversation
with an image is not: every slot attends to all its image slots, and textual keys are renumbered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from wings_jax import distributed
from wings_jax.inference import chunks, decode, sampling
from wings_jax.inference.chunks import PromptSlots
from wings_jax.inference.engine import ModelSpec, Weights
from wings_jax.inference.sampling import SamplingParams


def is_causal(spec: ModelSpec, images: int) -> bool:
    """Returns whether the states of a conversation stay valid when tokens follow."""
    return spec.arch.semantics.prompt_length is None or not images


def recompute(
    spec: ModelSpec,
    weights: Weights,
    prompt: PromptSlots,
    features: jax.Array | None,
    params: SamplingParams,
    stops: Sequence[int],
) -> Iterator[tuple[int, float, bool]]:
    """Yields token, log-probability and whether it is the last, of the answer to a prompt.

    The whole conversation is computed again for every token.

    Args:
      features: f32[n,D] of the prompt's images, which are encoded once.
    """
    arch = spec.arch
    batch_params = sampling.stack_params([params], arch.decoder.vocab_size)
    images = chunks.power(len(prompt.images))
    stop_ids = np.asarray(stops or (-1,), np.int32)

    tokens: list[int] = []
    is_done = False
    while not is_done:
        whole = chunks.join(prompt, chunks.from_ids(tokens, (), 1))
        length = chunks.bucket(whole.count)
        # Lengths are rounded up to buckets: one compilation for many tokens.
        chunk = chunks.make_chunk(
            [whole], np.zeros(1, np.int32), arch, length=length, images=images
        )
        # The logits f32[1,V] after the last slot of the whole conversation.
        logits = decode.forward(spec, weights, chunk, features)

        seen = None if batch_params.penalty is None else chunks.seen_tokens([whole], arch)
        count = np.array([len(tokens)], np.int32)
        state = decode.resume(logits, batch_params, stop_ids, count, seen)
        found = distributed.fetch((state.tokens, state.logprobs, state.done))
        token, logprob, is_done = (column[0].item() for column in found)
        tokens.append(token)
        yield token, logprob, is_done
