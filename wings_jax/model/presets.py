"""Architectures as data: dataclasses, named presets, and readers of Hugging Face configs.

Nothing below this file branches on a model's name: Qwen, Llama, Mistral, SmolLM, SigLIP and CLIP
are values of `DecoderArch` and `VisionArch`. `families` has what a `model_type` decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are scaled for longer contexts (HF `rope_scaling`).

    rope_type               'linear' or 'llama3'
    factor                  divides the frequencies; the context becomes so many times longer
    low_freq_factor         llama3: wavelengths above original_max_positions / low_freq_factor are
                            scaled fully
    high_freq_factor        llama3: wavelengths below original_max_positions / high_freq_factor are
                            not scaled
    original_max_positions  llama3: the context length, in tokens, of the pretraining
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderArch:
    """A decoder of a Llama-like family; the names are HF's config names, shortened.

    vocab_size      V, rows of the embedding table (may be more than the tokenizer has)
    hidden_size     D
    num_layers      L
    num_heads       N, query heads
    num_kv_heads    K, a divisor of N
    head_dim        H; N x H may differ from D (Qwen3)
    ffn_size        F, the width inside of the gated feed-forward network
    norm_eps        epsilon of every RMSNorm
    rope_theta      base of the rotary frequencies
    rope_scaling    None for unscaled frequencies
    max_positions   the longest context, in tokens, that the LLM was trained for
    qkv_bias        whether q, k and v have biases (Qwen2)
    tie_embeddings  whether the embedding table is the output head too
    qk_norm         whether each head of q and k has an RMSNorm before rope (Qwen3)
    no_rope_layers  indices of the layers whose main attention has no rope (SmolLM3)
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_positions: int
    qkv_bias: bool
    tie_embeddings: bool
    qk_norm: bool = False
    no_rope_layers: tuple[int, ...] = ()

    @property
    def learner_heads(self) -> int:
        """Heads of a learner: D / H of width H, which is N for most models."""
        return self.hidden_size // self.head_dim


@dataclasses.dataclass(frozen=True)
class VisionArch:
    """A ViT of the SigLIP or CLIP family.

    hidden_size    E
    num_layers     layers of the full tower, also those behind `feature_layer`
    num_heads      N
    ffn_size       F
    image_size     height and width of an image, in pixels
    patch_size     height and width of a patch, in pixels
    activation     of the feed-forward network, a key of `layers.ACTIVATIONS`
    norm_eps       epsilon of every LayerNorm
    class_token    whether a trained token stands before the patches (CLIP)
    pre_norm       whether the embeddings are normalized (CLIP)
    post_norm      whether the tower has a last norm; features are read before it
    patch_bias     whether the patch embedding has a bias (SigLIP)
    mean, std      normalization of the pixels, per RGB channel, in 0..1
    feature_layer  which hidden state is read, as an index of HF's `output_hidden_states`
                   (0 = embeddings): with -2 all layers but the last are built
    dropped_tokens  how many tokens before the features are dropped; None for the class token,
                    where there is one (llava-hf: "default" drops 1, "full" drops 0)
    resample       how images are resized, 'bicubic' or (SigLIP2) 'bilinear'
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_size: int
    image_size: int
    patch_size: int
    activation: str
    norm_eps: float
    class_token: bool
    pre_norm: bool
    post_norm: bool
    patch_bias: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    feature_layer: int = -2
    dropped_tokens: int | None = None
    resample: str = "bicubic"

    @property
    def first_feature(self) -> int:
        """The index of the first token that is a feature."""
        return int(self.class_token) if self.dropped_tokens is None else self.dropped_tokens

    @property
    def num_patches(self) -> int:
        """P, the slots that one image takes: one per patch, unless tokens are kept or dropped."""
        return (self.image_size // self.patch_size) ** 2 + self.class_token - self.first_feature

    @property
    def built_layers(self) -> int:
        """The number of layers up to the hidden state that is read."""
        return self.feature_layer % (self.num_layers + 1)


@dataclasses.dataclass(frozen=True)
class Semantics:
    """How the learners are computed, where the paper and its authors' release differ.

    query               input of the learners' queries: 'normed', the main attention's input
                        (eq. 5), or 'residual', the stream after the main attention
    scaled_rope         whether the learners' rope is scaled as the LLM's is
    ungated_when_alone  whether gate x gain is 1 where only one learner has visible keys
    prompt_length       None for the paper's visibility; else the number of tokens of the system
                        prompt in the release's (`layout.release_visible_from`)
    """

    query: str = "normed"
    scaled_rope: bool = True
    ungated_when_alone: bool = False
    prompt_length: int | None = None


PAPER = Semantics()


def release_semantics(prompt_length: int = 14) -> Semantics:
    """Returns the semantics of the authors' release; its models also have a gain of 2."""
    return Semantics(
        "residual", scaled_rope=False, ungated_when_alone=True, prompt_length=prompt_length
    )


@dataclasses.dataclass(frozen=True)
class WingsArch:
    """A decoder with wings, and its vision tower.

    `learners=()` is LLaVA, `('visual',)` stage 1, both learners with a router stage 2.

    decoder           the LLM
    vision            the vision tower
    projector         from E to D, one of `vision.PROJECTORS`
    learners          subset of ('visual', 'textual')
    router            whether the main attention's rows weigh the two learners; else both count 1
    rank              R of the learners' low-rank matrices
    learner_layers    indices of the layers that carry learners; None is all
    gain              multiplies the gated sum (1 is equation 5; 2 continues stage 1's weight)
    router_positions  the longest conversation, in slots, that the router has weights for
    semantics         the paper's, or the release's for checkpoints that were trained with them
    lora_rank         R of LoRA on the decoder's projections; 0 is none
    lora_alpha        LoRA's update is scaled by lora_alpha / lora_rank
    lora_targets      names of the projections with LoRA
    prefix_length     trained keys and values per layer, beside the main attention; 0 is none
    """

    decoder: DecoderArch
    vision: VisionArch
    projector: str = "mlp2x_gelu"
    learners: tuple[str, ...] = ()
    router: bool = False
    rank: int = 64
    learner_layers: tuple[int, ...] | None = None
    gain: float = 1.0
    router_positions: int = 4096
    semantics: Semantics = PAPER
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    prefix_length: int = 0


def _qwen2(
    width: int,
    layers: int,
    heads: tuple[int, int],
    ffn: int,
    vocab: int = 151936,
    *,
    tie: bool = False,
) -> DecoderArch:
    """Returns a Qwen1.5 or Qwen2.5 model; `heads` are the query heads and the kv heads."""
    return DecoderArch(
        vocab_size=vocab,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=width // heads[0],
        ffn_size=ffn,
        norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=None,
        max_positions=32768,
        # The only biases of a Qwen2 layer: o and the feed-forward network have none.
        qkv_bias=True,
        tie_embeddings=tie,
    )


def _qwen3(
    width: int, layers: int, heads: int, ffn: int, vocab: int = 151936, *, tie: bool = False
) -> DecoderArch:
    """Returns a dense Qwen3 model: heads of width 128, 8 kv heads, norms of q and k."""
    return DecoderArch(
        vocab_size=vocab,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        ffn_size=ffn,
        norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=None,
        max_positions=40960,
        qkv_bias=False,
        tie_embeddings=tie,
        qk_norm=True,
    )


def _llama(
    width: int,
    layers: int,
    heads: tuple[int, int],
    ffn: int,
    vocab: int,
    *,
    theta: float = 1e4,
    scaling: RopeScaling | None = None,
    positions: int = 4096,
    tie: bool = False,
) -> DecoderArch:
    """Returns a Llama or Mistral model; `heads` are the query heads and the kv heads."""
    return DecoderArch(
        vocab_size=vocab,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=width // heads[0],
        ffn_size=ffn,
        norm_eps=1e-5,
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=positions,
        qkv_bias=False,
        tie_embeddings=tie,
    )


def _llama3(
    width: int, layers: int, heads: tuple[int, int], ffn: int, *, factor: float, tie: bool = False
) -> DecoderArch:
    """Returns a Llama 3.1 or 3.2 model, with the factor of its rope scaling."""
    # Trained on 8192 positions; the scaling extends them to 131072.
    scaling = RopeScaling("llama3", factor, 1.0, 4.0, 8192)
    return _llama(
        width, layers, heads, ffn, 128256, theta=5e5, scaling=scaling, positions=131072, tie=tie
    )


# Sources: the models' `config.json`.
DECODERS: Mapping[str, DecoderArch] = {
    "qwen1_5_0_5b": _qwen2(1024, 24, (16, 16), 2816, tie=True),
    "qwen1_5_1_8b": _qwen2(2048, 24, (16, 16), 5504),
    "qwen1_5_7b": _qwen2(4096, 32, (32, 32), 11008),
    "qwen2_5_0_5b": _qwen2(896, 24, (14, 2), 4864, tie=True),
    "qwen2_5_1_5b": _qwen2(1536, 28, (12, 2), 8960, tie=True),
    "qwen2_5_7b": _qwen2(3584, 28, (28, 4), 18944, 152064),
    "qwen3_0_6b": _qwen3(1024, 28, 16, 3072, tie=True),
    "qwen3_1_7b": _qwen3(2048, 28, 16, 6144, tie=True),
    "qwen3_4b": _qwen3(2560, 36, 32, 9728, tie=True),
    "qwen3_8b": _qwen3(4096, 36, 32, 12288),
    "vicuna_7b": _llama(4096, 32, (32, 32), 11008, 32000),
    "vicuna_13b": _llama(5120, 40, (40, 40), 13824, 32000),
    "llama3_1_8b": _llama3(4096, 32, (32, 8), 14336, factor=8.0),
    "llama3_2_1b": _llama3(2048, 16, (32, 8), 8192, factor=32.0, tie=True),
    "llama3_2_3b": _llama3(3072, 28, (24, 8), 8192, factor=32.0, tie=True),
    "mistral_7b": _llama(4096, 32, (32, 8), 14336, 32768, theta=1e6, positions=32768),  # v0.3
    "tinyllama_1_1b": _llama(2048, 22, (32, 4), 5632, 32000, positions=2048),
    "smollm2_135m": _llama(576, 30, (9, 3), 1536, 49152, theta=1e5, positions=8192, tie=True),
    "smollm3_3b": dataclasses.replace(
        _llama(2048, 36, (16, 4), 11008, 128256, theta=5e6, positions=65536, tie=True),
        norm_eps=1e-6,
        no_rope_layers=tuple(range(3, 36, 4)),
    ),
}

HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _siglip(
    width: int,
    layers: int,
    heads: int,
    ffn: int,
    image_size: int,
    patch_size: int,
    *,
    resample: str = "bicubic",
) -> VisionArch:
    """Returns a SigLIP tower, or with bilinear resizing a SigLIP2 tower of fixed resolution."""
    return VisionArch(
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        ffn_size=ffn,
        image_size=image_size,
        patch_size=patch_size,
        activation="gelu_pytorch_tanh",
        norm_eps=1e-6,
        class_token=False,
        pre_norm=False,
        post_norm=True,
        patch_bias=True,
        # Pixels from 0 to 1 are mapped to -1 to 1.
        mean=HALF,
        std=HALF,
        resample=resample,
    )


VISION: Mapping[str, VisionArch] = {
    "siglip_so400m_384": _siglip(1152, 27, 16, 4304, 384, 14),
    "siglip_base_224": _siglip(768, 12, 12, 3072, 224, 16),
    "siglip2_so400m_384": _siglip(1152, 27, 16, 4304, 384, 14, resample="bilinear"),
    "siglip2_so400m_512": _siglip(1152, 27, 16, 4304, 512, 16, resample="bilinear"),
    "siglip2_base_224": _siglip(768, 12, 12, 3072, 224, 16, resample="bilinear"),
    "clip_large_336": VisionArch(
        hidden_size=1024,
        num_layers=24,
        num_heads=16,
        ffn_size=4096,
        image_size=336,
        patch_size=14,
        activation="quick_gelu",
        norm_eps=1e-5,
        class_token=True,
        pre_norm=True,
        post_norm=True,
        patch_bias=False,
        mean=CLIP_MEAN,
        std=CLIP_STD,
    ),
}
