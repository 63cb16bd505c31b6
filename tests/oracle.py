"""A naive Wings decoder in float64: loops over rows, slots, heads and keys, no layers stacked.

Written from the paper's equations alone (equations 4 and 5, and the semantics that this project
fixes for them), and independent of the model's code except for the public names of its
parameters. It is slow, and for sequences of a few dozen slots.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

PADDING, TEXT, IMAGE = 0, 1, 2
MODALITY_OF = {"visual": IMAGE, "textual": TEXT}


@dataclasses.dataclass(frozen=True)
class Slots:
    """One row: positions, modality, segments, each of length T."""

    positions: np.ndarray
    modality: np.ndarray
    segments: np.ndarray


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the weights do not determine: heads, rope, the norm's epsilon, gain and learners."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    inv_freq: np.ndarray
    norm_eps: float
    gain: float = 1.0
    learners: tuple[str, ...] = ()
    has_router: bool = False
    learner_layers: tuple[int, ...] | None = None
    no_rope_layers: tuple[int, ...] = ()


def plain_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """theta^(-2i/H) for the H/2 pairs of a head."""
    return np.array([theta ** (-2 * i / head_dim) for i in range(head_dim // 2)])


def llama3_frequencies(
    head_dim: int, theta: float, factor: float, low: float, high: float, original: int
) -> np.ndarray:
    """Llama 3.1: low frequencies are divided by the factor, high ones not, others are blended."""
    scaled = []
    for frequency in plain_frequencies(head_dim, theta):
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            scaled.append(frequency)
        elif wavelength > original / low:
            scaled.append(frequency / factor)
        else:
            blend = (original / wavelength - low) / (high - low)
            scaled.append((1 - blend) * frequency / factor + blend * frequency)
    return np.array(scaled)


def rotate(vector: np.ndarray, position: int, inv_freq: np.ndarray) -> np.ndarray:
    """Rope of one head's vector [H]: element i pairs with element i + H/2."""
    half = len(vector) // 2
    out = np.empty_like(vector)
    for i in range(half):
        angle = position * inv_freq[i]
        first, second = vector[i], vector[i + half]
        out[i] = first * math.cos(angle) - second * math.sin(angle)
        out[i + half] = second * math.cos(angle) + first * math.sin(angle)
    return out


def rms_norm(vector: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return vector / math.sqrt(np.mean(vector * vector) + eps) * scale


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def softmax(values: list[float]) -> np.ndarray:
    exps = np.exp(np.array(values) - max(values))
    return exps / exps.sum()


def sees(slots: Slots, query: int, key: int, modality: int | None) -> bool:
    """Same conversation, not later, not padding, and of the given modality (None: of any)."""
    if slots.modality[query] == PADDING or slots.modality[key] == PADDING:
        return False
    if slots.segments[query] != slots.segments[key]:
        return False
    if slots.positions[key] > slots.positions[query]:
        return False
    return modality is None or slots.modality[key] == modality


def main_attention(h: np.ndarray, slots: Slots, p: Mapping, shape: Shape, *, has_rope: bool):
    """Returns the main branch [T,D] and its rows a[N,T,T] (0 where a key is not visible)."""
    count, heads = len(h), shape.num_heads
    group = heads // shape.num_kv_heads

    def project(name: str, head: int, slot: int) -> np.ndarray:
        out = h[slot] @ p["attn"][name]["kernel"][:, head]
        return out + p["attn"][name]["bias"][head] if "bias" in p["attn"][name] else out

    def project_rotated(name: str, head: int, slot: int) -> np.ndarray:
        vector = project(name, head, slot)
        if f"{name}_norm" in p["attn"]:
            vector = rms_norm(vector, p["attn"][f"{name}_norm"]["scale"], shape.norm_eps)
        return rotate(vector, slots.positions[slot], shape.inv_freq) if has_rope else vector

    rows = np.zeros((heads, count, count))
    main = np.zeros_like(h)
    for n in range(heads):
        queries = [project_rotated("q", n, t) for t in range(count)]
        keys = [project_rotated("k", n // group, s) for s in range(count)]
        values = [project("v", n // group, s) for s in range(count)]

        for t in range(count):
            visible = [s for s in range(count) if sees(slots, t, s, None)]
            if not visible:
                continue
            rows[n, t, visible] = softmax(
                [queries[t] @ keys[s] / math.sqrt(shape.head_dim) for s in visible]
            )
            mixed = sum(rows[n, t, s] * values[s] for s in visible)
            if "prefix" in p:
                mixed = mixed + prefix(queries[t], n, p["prefix"], shape)
            main[t] += mixed @ p["attn"]["o"]["kernel"][n]
    return main, rows


def prefix(query: np.ndarray, head: int, p: Mapping, shape: Shape) -> np.ndarray:
    """Returns [H], one head's attention over the trained keys and values, times its gate."""
    kv_head = head // (shape.num_heads // shape.num_kv_heads)
    keys, values = p["k"][:, kv_head], p["v"][:, kv_head]
    weights = softmax([query @ key / math.sqrt(shape.head_dim) for key in keys])
    mixed = sum(weight * value for weight, value in zip(weights, values, strict=True))
    return math.tanh(p["gate"][head]) * mixed


def learner(
    h: np.ndarray, x0: np.ndarray, slots: Slots, p: Mapping, shape: Shape, modality: int
) -> np.ndarray:
    """Returns equation 4 for one modality, [T,D]; 0 for a slot without visible keys."""
    count, width = h.shape
    heads, head_dim = width // shape.head_dim, shape.head_dim

    def project(name: str, vector: np.ndarray) -> np.ndarray:
        low_rank = p[name]["a"] @ p[name]["b"].reshape(-1, heads * head_dim)
        return (vector + vector @ low_rank).reshape(heads, head_dim)

    output = p["o"]["a"].reshape(heads * head_dim, -1) @ p["o"]["b"]
    queries = [project("q", h[t]) for t in range(count)]
    keys = [project("k", x0[s]) for s in range(count)]
    values = [project("v", x0[s]) for s in range(count)]

    out = np.zeros((count, width))
    for t in range(count):
        visible = [s for s in range(count) if sees(slots, t, s, modality)]
        if not visible:
            continue
        mixed = np.zeros((heads, head_dim))
        for n in range(heads):
            query = rotate(queries[t][n], slots.positions[t], shape.inv_freq)
            rotated = [rotate(keys[s][n], slots.positions[s], shape.inv_freq) for s in visible]
            weights = softmax([query @ key / math.sqrt(head_dim) for key in rotated])
            for weight, s in zip(weights, visible, strict=True):
                mixed[n] += weight * values[s][n]
        out[t] = mixed.reshape(-1) @ output
    return out


def gates(rows: np.ndarray, slots: Slots, p: Mapping) -> np.ndarray:
    """Returns the router's weights of the learners, [T,M], from the rows a[N,T,T]."""
    kernel, bias = p["router"]["kernel"], p["router"]["bias"]
    count = rows.shape[1]
    out = np.zeros((count, len(kernel)))
    for t in range(count):
        z = []
        for m in range(len(kernel)):
            total = bias[m]
            for s in range(count):
                total += rows[:, t, s].sum() * kernel[m, slots.positions[s]]
            z.append(float(silu(total)))
        out[t] = softmax(z)
    return out


def layer(
    x: np.ndarray,
    x0: np.ndarray,
    slots: Slots,
    p: Mapping,
    shape: Shape,
    *,
    has_learners: bool,
    has_rope: bool = True,
) -> np.ndarray:
    """Returns the residual stream [T,D] after one layer (equation 5, then the MLP)."""
    h = np.stack([rms_norm(v, p["norm_attn"]["scale"], shape.norm_eps) for v in x])
    main, rows = main_attention(h, slots, p, shape, has_rope=has_rope)

    out = x + main
    if has_learners and shape.learners:
        weights = gates(rows, slots, p) if shape.has_router else np.ones((len(x), 2))
        for m, name in enumerate(MODALITY_OF):
            if name in shape.learners:
                output = learner(h, x0, slots, p[name], shape, MODALITY_OF[name])
                out = out + shape.gain * weights[:, m : m + 1] * output

    mlp = p["mlp"]
    for t in range(len(out)):
        g = rms_norm(out[t], p["norm_mlp"]["scale"], shape.norm_eps)
        hidden = silu(g @ mlp["gate"]["kernel"]) * (g @ mlp["up"]["kernel"])
        out[t] = out[t] + hidden @ mlp["down"]["kernel"]
    return out


def at_layer(tree: Mapping, index: int) -> dict:
    """Returns one layer's parameters in float64, of a tree whose arrays stack the layers first."""
    return {
        name: at_layer(node, index)
        if isinstance(node, Mapping)
        else np.asarray(node[index], np.float64)
        for name, node in tree.items()
    }


def decoder(x0: np.ndarray, slots: Slots, params: Mapping, shape: Shape):
    """Returns logits [T,V] and the residual stream before and after every layer, of one row.

    Args:
      x0: [T,D], token embeddings in text slots, projected image features in image slots.
      params: the subtree `decoder/`.
    """
    x0 = np.asarray(x0, np.float64)
    states = [x0]
    count = len(params["layers"]["norm_attn"]["scale"])
    for index in range(count):
        p = at_layer(params["layers"], index)
        carries = shape.learner_layers is None or index in shape.learner_layers
        has_rope = index not in shape.no_rope_layers
        options = {"has_learners": carries, "has_rope": has_rope}
        states.append(layer(states[-1], x0, slots, p, shape, **options))
    scale = np.asarray(params["norm"]["scale"], np.float64)
    final = np.stack([rms_norm(v, scale, shape.norm_eps) for v in states[-1]])
    if "head" in params:
        head = np.asarray(params["head"]["kernel"], np.float64)
    else:
        head = np.asarray(params["embed"]["embedding"], np.float64).T
    return final @ head, states
