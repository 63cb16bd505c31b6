"""Floating-point operations of a training step, by part of the model.

Counted are the matrix products, one multiply-add as two operations. A product y = x w of m
multiply-adds costs 2 m forward; backward another 2 m for the gradient of w where w trains, and
2 m for that of x where something before x trains. An attention with p visible (query, key) pairs
has two products of p H per head forward and four backward; keys that a query does not see are not
counted, so causal attention counts half. Norms, rope, softmax, activations and the optimizer are
not counted: at width 1000 and above they are less than 1 %.

    part              products per layer or model
    vision tower      patch embedding; q, k, v, o, up, down; full attention, per image
    projector         its linear layers, per image slot
    main linears      q, k, v, o, gate, up, down, with LoRA's pairs, per slot
    main attention    q k^T and a v; with a prefix also those of its keys and values
    visual, textual   low-rank q and o per slot, k and v per key of the modality; attention
    router            the probes: a times M values per key
    head and loss     hidden states times the vocabulary

What the model needs (`forward`, `backward`) does not depend on rematerialization; what is
computed again for it is counted apart (`recomputed`) and is no part of MFU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np

from wings_jax.model import layout as layout_lib
from wings_jax.model.layout import IMAGE, MAIN, PADDING, TEXT, Batch
from wings_jax.model.presets import WingsArch
from wings_jax.model.vision import PROJECTORS

PARTS = (
    "vision tower",
    "projector",
    "main linears",
    "main attention",
    "visual",
    "textual",
    "router",
    "head and loss",
)

PROMPT = 14  # slots before the images of `full_rows`, as of the release's prompt

# Remat policy -> what the backward pass computes again, kinds of `Product`. "values" are a v
# where only a frozen projection reads it: if that one's output is saved, it is not needed again.
RECOMPUTED: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "full": ("linears", "attention", "values"),
    "dots": ("attention",),
    "save_attn": ("linears",),
    "save_dots": (),
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a step computes on, summed over its rows.

    slots   query slots
    images  images that the tower encodes
    keys    learner -> slots whose keys and values it computes
    pairs   "main", "visual", "textual" -> (query, key) pairs of its attention in one layer
    """

    slots: int
    images: int
    keys: Mapping[str, int]
    pairs: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class PartFlops:
    """Operations of one part in one step.

    forward     of the forward pass
    backward    of the gradients
    recomputed  of the forward pass again, for rematerialization
    """

    forward: float = 0.0
    backward: float = 0.0
    recomputed: float = 0.0

    @property
    def model(self) -> float:
        """Forward and backward: what the model needs, the numerator of MFU."""
        return self.forward + self.backward

    @property
    def executed(self) -> float:
        """With what is computed again."""
        return self.forward + self.backward + self.recomputed


@dataclasses.dataclass(frozen=True)
class Product:
    """Matrix products of one kind.

    part   one of PARTS
    macs   multiply-adds of the forward pass
    wgrad  whether the gradient of the weights (of an attention: keys and values) is computed
    dgrad  whether the gradient of the input (of an attention: the queries) is computed
    kind   which remat policies compute it again, see `RECOMPUTED`; "" for none
    """

    part: str
    macs: float
    wgrad: bool
    dgrad: bool
    kind: str = "linears"


def count_workload(batch: Batch, arch: WingsArch) -> Workload:
    """Returns the workload of a batch on the host: slots that are not padding, visible pairs.

    >>> from wings_jax.model.presets import DECODERS, VISION
    >>> arch = WingsArch(DECODERS["qwen1_5_0_5b"], VISION["siglip_base_224"])
    >>> tokens = np.array([[5, 6, 7, 0]])
    >>> rows = layout_lib.make_layout(tokens, np.array([[TEXT, TEXT, TEXT, PADDING]]))
    >>> batch = Batch(rows, tokens, np.zeros((1, 0, 224, 224, 3), np.uint8))
    >>> count_workload(batch, arch).pairs
    {'main': 6, 'visual': 0, 'textual': 6}
    """
    rows = batch.layout
    modality = np.asarray(rows.modality)
    keys = {"visual": int((modality == IMAGE).sum()), "textual": int((modality == TEXT).sum())}
    indices = {"main": MAIN, **layout_lib.LEARNERS}

    return Workload(
        slots=int((modality != PADDING).sum()),
        images=keys["visual"] // arch.vision.num_patches,
        keys=keys,
        pairs={name: _count_pairs(rows, index) for name, index in indices.items()},
    )


def _count_pairs(rows: layout_lib.Layout, attention: int) -> int:
    """Returns how many (query, key) pairs of an attention are visible, in all rows."""
    positions, segments = np.asarray(rows.positions), np.asarray(rows.segments)
    visible_from = np.asarray(rows.visible_from)[..., attention]
    # NEVER is larger than any number of slots.
    is_key = (segments > 0) & (visible_from < segments.shape[1])

    # A segment's slots are adjacent: the slot at whose position a key becomes visible.
    slots = np.arange(segments.size).reshape(segments.shape)
    first_slots = slots - positions
    new_keys = np.bincount((first_slots + visible_from)[is_key], minlength=segments.size)

    # Keys visible to a query: those since the first slot of its segment.
    until = np.concatenate([[0], np.cumsum(new_keys)])
    is_query = segments > 0
    return int((until[slots + 1] - until[first_slots])[is_query].sum())


def full_rows(arch: WingsArch, rows: int, slots: int, images: int) -> Workload:
    """Returns the workload of rows [rows, slots] without padding: a prompt, images, then text.

    Args:
      images: images per row; those that do not fit are left out.
    """
    patches = arch.vision.num_patches
    images = min(images, max(0, slots - PROMPT) // patches)
    modality = np.full((1, slots), TEXT)
    modality[:, PROMPT : PROMPT + images * patches] = IMAGE
    row = layout_lib.make_layout(modality, modality, prompt_length=arch.semantics.prompt_length)

    work = count_workload(Batch(row, row.tokens, np.zeros((1, images, 1, 1, 3), np.uint8)), arch)
    return Workload(
        slots=rows * work.slots,
        images=rows * work.images,
        keys={name: rows * count for name, count in work.keys.items()},
        pairs={name: rows * count for name, count in work.pairs.items()},
    )


def padded_workload(arch: WingsArch, rows: int, slots: int, images: int) -> Workload:
    """Returns the workload of full rows [rows, slots] in which every pair is computed.

    That is what the einsum kernel computes, whatever the rows hold.

    Args:
      images: images per row.
    """
    # The visual learner's keys are image slots only, at most a whole row.
    visual = min(images * arch.vision.num_patches, slots)
    pairs = {"main": slots * slots, "visual": slots * visual, "textual": slots * slots}
    return Workload(
        slots=rows * slots,
        images=rows * images,
        keys={"visual": rows * visual, "textual": rows * slots},
        pairs={name: rows * count for name, count in pairs.items()},
    )


def count_flops(
    arch: WingsArch, work: Workload, trained: Collection[str], remat: str = "none"
) -> dict[str, PartFlops]:
    """Returns part -> operations of one step.

    Args:
      trained: paths of the parameters that train.
      remat: a key of `RECOMPUTED`.
    """
    recomputed = RECOMPUTED[remat]
    totals = dict.fromkeys(PARTS, PartFlops())

    for product in list_products(arch, work, trained):
        has_backward = product.wgrad or product.dgrad
        is_recomputed = has_backward and product.kind in recomputed

        # A multiply-add is two operations.
        total = totals[product.part]
        totals[product.part] = PartFlops(
            total.forward + 2 * product.macs,
            total.backward + 2 * product.macs * (product.wgrad + product.dgrad),
            total.recomputed + 2 * product.macs * is_recomputed,
        )
    return totals


def model_flops(arch: WingsArch, work: Workload, trained: Collection[str]) -> float:
    """Returns the forward and backward operations of one step, the numerator of MFU."""
    return sum(part.model for part in count_flops(arch, work, trained).values())


def list_products(arch: WingsArch, work: Workload, trained: Collection[str]) -> Iterable[Product]:
    """Yields all matrix products of a step; the layers of a stack are one product."""

    def trains(*prefixes: str) -> bool:
        return any(path.startswith(prefixes) for path in trained)

    # Whether gradients reach the layer-0 features, and the residual stream within the layers.
    features = trains("vision/", "projector/")
    x0 = features or trains("decoder/embed/")
    stream = x0 or trains("decoder/layers/")

    yield from _vision_products(arch, work, trains, features)
    yield from _main_products(arch, work, trains, stream)
    for name in arch.learners:
        yield from _learner_products(arch, work, name, trains, x0, stream)

    decoder = arch.decoder
    head = "decoder/embed/" if decoder.tie_embeddings else "decoder/head/"
    macs = work.slots * decoder.hidden_size * decoder.vocab_size
    has_gradient = stream or trains("decoder/norm/")
    yield Product("head and loss", macs, trains(head), has_gradient, "")


def _vision_products(
    arch: WingsArch, work: Workload, trains: Callable[..., bool], features: bool
) -> Iterable[Product]:
    """Yields the products of the tower and the projector."""
    tower, width = arch.vision, arch.decoder.hidden_size
    patches = (tower.image_size // tower.patch_size) ** 2
    slots = patches + tower.class_token
    is_trained = trains("vision/")

    # [P, p p 3] x [p p 3, E]; then per layer q, k, v, o, up and down, and full attention.
    patch = patches * tower.patch_size**2 * 3 * tower.hidden_size
    linears = slots * (4 * tower.hidden_size**2 + 2 * tower.hidden_size * tower.ffn_size)
    attention = 2 * slots**2 * tower.hidden_size
    layers = work.images * tower.built_layers
    yield Product("vision tower", work.images * patch, is_trained, False, "")
    yield Product("vision tower", layers * (linears + attention), is_trained, is_trained, "")

    image_slots = work.images * tower.num_patches
    for i in range(PROJECTORS[arch.projector]):
        macs = image_slots * (tower.hidden_size if i == 0 else width) * width
        dgrad = is_trained if i == 0 else features
        yield Product("projector", macs, trains(f"projector/linear_{i}/"), dgrad, "")


def _main_products(
    arch: WingsArch, work: Workload, trains: Callable[..., bool], stream: bool
) -> Iterable[Product]:
    """Yields the products of the decoder's layers without learners."""
    decoder, layers = arch.decoder, "decoder/layers/"
    slots = work.slots * decoder.num_layers
    heads, kv_heads = (n * decoder.head_dim for n in (decoder.num_heads, decoder.num_kv_heads))
    model = decoder.hidden_size

    shapes = {
        "attn/q": (model, heads),
        "attn/k": (model, kv_heads),
        "attn/v": (model, kv_heads),
        "attn/o": (heads, model),
        "mlp/gate": (model, decoder.ffn_size),
        "mlp/up": (model, decoder.ffn_size),
        "mlp/down": (decoder.ffn_size, model),
    }

    for path, (width_in, width_out) in shapes.items():
        # Nothing in the layer depends on what `down` returns, so no policy computes it again.
        kind = "" if path == "mlp/down" else "linears"
        kernel = trains(f"{layers}{path}/kernel")
        yield Product("main linears", slots * width_in * width_out, kernel, stream, kind)

        if path.split("/")[1] in arch.lora_targets and arch.lora_rank:
            lora = trains(f"{layers}{path}/a")
            macs = slots * arch.lora_rank
            yield Product("main linears", macs * width_in, lora, stream)
            yield Product("main linears", macs * width_out, lora, lora or stream, kind)

    # q k^T and a v; the probes are as many channels of v as there are learners.
    pairs = work.pairs["main"] * decoder.num_layers
    values = "attention" if trains(f"{layers}attn/o/") else "values"
    yield Product("main attention", pairs * heads, stream, stream, "attention")
    yield Product("main attention", pairs * heads, stream, stream, values)
    macs = 2 * slots * arch.prefix_length * heads
    yield Product("main attention", macs, stream, stream, "attention")
    if arch.router:
        macs = pairs * decoder.num_heads * len(arch.learners)
        yield Product("router", macs, trains(f"{layers}router/"), stream, "attention")


def _learner_products(
    arch: WingsArch,
    work: Workload,
    name: str,
    trains: Callable[..., bool],
    x0: bool,
    stream: bool,
) -> Iterable[Product]:
    """Yields the products of a learner, over all layers: the layers are scanned, so all have it."""
    decoder, layers = arch.decoder, f"decoder/layers/{name}/"
    width = decoder.learner_heads * decoder.head_dim
    inputs = {"q": (work.slots, stream), "k": (work.keys[name], x0), "v": (work.keys[name], x0)}
    inputs["o"] = (work.slots, stream)

    # x a b, [T, D] x [D, R] x [R, D]
    for projection, (slots, has_gradient) in inputs.items():
        macs = slots * decoder.num_layers * width * arch.rank
        is_trained = trains(f"{layers}{projection}/")
        yield Product(name, macs, is_trained, has_gradient)
        yield Product(name, macs, is_trained, has_gradient or is_trained)

    pairs = work.pairs[name] * decoder.num_layers
    yield Product(name, 2 * pairs * width, stream, stream, "attention")
