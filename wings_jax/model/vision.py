"""The vision tower (SigLIP, CLIP) and the projector from its width E to the decoder's width D."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from wings_jax import axes
from wings_jax.model import attention
from wings_jax.model.layers import ACTIVATIONS, LayerNorm
from wings_jax.model.layout import Array
from wings_jax.model.presets import VisionArch
from wings_jax.model.projection import INIT, Projection, partitioned

# Name of a projector -> its number of linear layers.
PROJECTORS = {"identity": 0, "linear": 1, "mlp2x_gelu": 2, "mlp3x_gelu": 3}


def normalize(pixels: Array, arch: VisionArch) -> jax.Array:
    """Returns f32 (pixels / 255 - mean) / std from u8[...,h,w,3] (HF image processors)."""
    mean, std = jnp.asarray(arch.mean), jnp.asarray(arch.std)
    return (jnp.asarray(pixels, jnp.float32) * (1 / 255) - mean) / std


def patches(pixels: jax.Array, patch: int) -> jax.Array:
    """Returns [B,P,p,p,3] from square images [B,h,h,3], row by row, with p = `patch`.

    What is left at the right and below, where p does not divide h, is cut off.
    """
    count, side = pixels.shape[0], pixels.shape[1] // patch
    pixels = pixels[:, : side * patch, : side * patch]

    # [B, rows*p, columns*p, 3] -> [B, rows, p, columns, p, 3] -> [B, rows*columns, p, p, 3]
    pixels = pixels.reshape(count, side, patch, side, patch, 3)
    return pixels.transpose(0, 1, 3, 2, 4, 5).reshape(count, side * side, patch, patch, 3)


class VisionAttention(nn.Module):
    """Full multi-head attention with biases, [B,P,E] -> [B,P,E] (HF SiglipAttention).

    arch    sizes of the tower
    kernel  one of `attention.KERNELS`
    """

    arch: VisionArch
    kernel: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # [B, P, E] -> [B, P, N, H]
        heads = {"N": self.arch.num_heads, "H": self.arch.hidden_size // self.arch.num_heads}
        q, k, v = (
            Projection("BPE,ENH->BPNH", heads, bias=True, name=name)(x) for name in ("q", "k", "v")
        )
        out, _ = attention.attend(q, k, v, kernel=self.kernel)

        # [B, P, N, H] -> [B, P, E]
        width = {"E": self.arch.hidden_size}
        return Projection("BPNH,NHE->BPE", width, bias=True, name="o")(out)


class VisionMlp(nn.Module):
    """down(activation(up(x))), [B,P,E] -> [B,P,E] (HF SiglipMLP).

    arch  sizes of the tower, and the activation
    """

    arch: VisionArch

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # [B, P, E] -> [B, P, F] -> [B, P, E]
        h = Projection("BPE,EF->BPF", {"F": self.arch.ffn_size}, bias=True, name="up")(x)
        h = ACTIVATIONS[self.arch.activation](h)
        return Projection("BPF,FE->BPE", {"E": x.shape[-1]}, bias=True, name="down")(h)


class VisionLayer(nn.Module):
    """One pre-norm encoder layer, [B,P,E] -> [B,P,E] (HF SiglipEncoderLayer, CLIPEncoderLayer).

    arch    sizes of the tower
    kernel  one of `attention.KERNELS`
    """

    arch: VisionArch
    kernel: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        eps = self.arch.norm_eps
        h = LayerNorm(eps, name="norm_attn")(x)
        x = x + VisionAttention(self.arch, self.kernel, name="attn")(h)

        h = LayerNorm(eps, name="norm_mlp")(x)
        x = axes.constrain(x + VisionMlp(self.arch, name="mlp")(h), "BPE")
        self.sow("intermediates", "hidden", x)
        return x, None


class VisionTower(nn.Module):
    """Returns patch features [B,P,E] of u8[B,h,w,3] in `dtype`, read at `arch.feature_layer`.

    The class token (CLIP) takes part in the layers and is dropped from the result, unless
    `arch.dropped_tokens` keeps it. Layers after the one that is read are not built. HF:
    `hidden_states[feature_layer]`.

    arch    sizes and the family's options
    dtype   of the activations and the matmuls
    kernel  one of `attention.KERNELS`
    """

    arch: VisionArch
    dtype: jnp.dtype = jnp.float32
    kernel: str = "auto"

    @nn.compact
    def __call__(self, pixels: Array) -> jax.Array:
        arch = self.arch

        # Pixels to patch embeddings: [B, h, w, 3] -> [B, P, p, p, 3] -> [B, P, E]
        x = patches(normalize(pixels, arch).astype(self.dtype), arch.patch_size)
        width = {"E": arch.hidden_size}
        x = Projection("BPhwc,hwcE->BPE", width, bias=arch.patch_bias, name="patch")(x)

        # [B, P, E] -> [B, 1 + P, E]
        if arch.class_token:
            token = self._param("class_token", ("E",), (arch.hidden_size,)).astype(x.dtype)
            token = jnp.broadcast_to(token, (x.shape[0], 1, arch.hidden_size))
            x = jnp.concatenate([token, x], axis=1)

        x = x + self._param("position", (None, "E"), x.shape[1:]).astype(x.dtype)

        if arch.pre_norm:
            x = LayerNorm(arch.norm_eps, name="pre_norm")(x)

        layers = nn.scan(
            VisionLayer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=arch.built_layers,
            metadata_params={nn.PARTITION_NAME: "L"},
        )
        x, _ = layers(arch, self.kernel, name="layers")(x, None)

        if arch.post_norm:
            # Not applied to the features; its parameters exist so that checkpoints have them.
            LayerNorm(arch.norm_eps, name="post_norm")(x[:, :1])
        return x[:, arch.first_feature :]

    def _param(self, name: str, dims: tuple[str | None, ...], shape: tuple[int, ...]) -> jax.Array:
        """Returns a Gaussian float32 parameter with these logical axes."""
        return self.param(name, partitioned(INIT, dims), shape, jnp.float32)


class Projector(nn.Module):
    """Returns image features [B,P,D] from [B,P,E]: linear layers with GELU (erf) between them.

    projector  one of PROJECTORS, LLaVA's names (`mlp2x_gelu`: two linear layers)
    width      D
    """

    projector: str
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(PROJECTORS[self.projector]):
            if i > 0:
                x = ACTIVATIONS["gelu"](x)
            # [B, P, E] -> [B, P, D], then [B, P, D] -> [B, P, D]
            eqn = "BPE,ED->BPD" if i == 0 else "BPD,DO->BPO"
            sizes = {"D": self.width, "O": self.width}
            x = Projection(eqn, sizes, bias=True, name=f"linear_{i}")(x)
        return x
