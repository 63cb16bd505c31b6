"""The whole model: vision tower, projector, decoder with wings.

model = Wings(arch)
params = model.init(key, batch, method=Wings.initialize)["params"]
hidden = model.apply({"params": params}, batch)                        # [B,T,D]
logits = model.apply({"params": params}, hidden, method=Wings.logits)  # f32[B,T,V]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from wings_jax.model.decoder import Decoder
from wings_jax.model.layout import IMAGE, Array, Batch, Layout
from wings_jax.model.presets import WingsArch
from wings_jax.model.vision import Projector, VisionTower


class Wings(nn.Module):
    """A multimodal LLM: images and tokens in, hidden states and logits out.

    arch         what it consists of
    dtype        of the matmuls (`compute_dtype`); softmax, norms, router, rope and logits are
                 float32
    kernel       attention kernel, one of `attention.KERNELS`
    remat        what the backward pass recomputes, a key of `decoder.REMAT`
    scan_layers  whether the decoder's layers are one loop in the compiled program
    """

    arch: WingsArch
    dtype: jnp.dtype = jnp.float32
    kernel: str = "auto"
    remat: str = "none"
    scan_layers: bool = True

    def setup(self) -> None:
        self.vision = VisionTower(self.arch.vision, self.dtype, self.kernel)
        self.projector = Projector(self.arch.projector, self.arch.decoder.hidden_size)
        self.decoder = Decoder(self.arch, self.dtype, self.kernel, self.remat, self.scan_layers)

    def encode(self, images: Array) -> jax.Array:
        """Returns projected features [B,I*P,D] of images u8[B,I,h,w,3]."""
        rows, count = images.shape[:2]

        # [B, I, h, w, 3] -> [B*I, P, E] -> [B, I*P, D]
        features = self.vision(images.reshape(rows * count, *images.shape[2:]))
        return self.projector(features).reshape(rows, -1, self.arch.decoder.hidden_size)

    def embed(self, layout: Layout, images: Array) -> jax.Array:
        """Returns layer-0 features f32[B,T,D]: image features in image slots, else embeddings.

        The k-th image slot of a row takes the k-th feature of its images [B,I,h,w,3]; I may be 0.
        """
        x0 = self.decoder.embed(layout.tokens)
        if images.shape[1] == 0:
            return x0

        # [B, I*P, D] -> [B, T, D]; slots that are not images take any feature, which is masked.
        features = self.encode(images).astype(jnp.float32)
        is_image = layout.modality == IMAGE
        index = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, features.shape[1] - 1)
        placed = jnp.take_along_axis(features, index[..., None], axis=1)
        return jnp.where(is_image[..., None], placed, x0)

    def __call__(self, batch: Batch, classes: jax.Array | None = None) -> jax.Array:
        """Returns final normed states [B,T,D].

        `classes` f32[B,T,C] are probes of the main attention (`context.LayerContext`).
        """
        x0 = self.embed(batch.layout, batch.images)
        # An upper bound of the image slots: a row may have fewer images.
        images_per_row = batch.images.shape[1]
        image_slots = images_per_row * self.arch.vision.num_patches if images_per_row else 0
        return self.decoder(x0, batch.layout, classes, image_slots=image_slots)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns f32[B,T,V] of states [B,T,D]."""
        return self.decoder.logits(hidden)

    def initialize(self, batch: Batch) -> jax.Array:
        """Uses every parameter, for `init` only; `batch` must have at least one image."""
        return self.logits(self(batch))
