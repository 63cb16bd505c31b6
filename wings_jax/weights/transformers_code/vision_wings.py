"""The vision tower and the projector of Wings models. Shapes: n images, P patches, E, D widths."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .configuration_wings import WingsConfig


class VisionLayer(nn.Module):
    """A pre-norm encoder layer of SigLIP or CLIP, [B,P,E] -> [B,P,E]."""

    def __init__(self, vision):
        super().__init__()
        width = vision.hidden_size
        self.heads = vision.num_attention_heads
        self.layer_norm1 = nn.LayerNorm(width, eps=vision.layer_norm_eps)
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.layer_norm2 = nn.LayerNorm(width, eps=vision.layer_norm_eps)
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(width, vision.intermediate_size),
                "fc2": nn.Linear(vision.intermediate_size, width),
            }
        )
        self.activation = ACT2FN[vision.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer_norm1(x)
        q, k, v = (
            self.self_attn[name](h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.self_attn["out_proj"](out)
        return x + self.mlp["fc2"](self.activation(self.mlp["fc1"](self.layer_norm2(x))))


class VisionTower(nn.Module):
    """SigLIP or CLIP: f32[n,3,h,w] -> patch features [n,P,E], the last layer's before any norm."""

    def __init__(self, vision):
        super().__init__()
        self.has_class_token = vision.model_type == "clip_vision_model"
        strategy = getattr(vision, "vision_feature_select_strategy", None)
        self.first_feature = {"default": 1, "full": 0}.get(strategy, int(self.has_class_token))
        width, side = vision.hidden_size, vision.image_size // vision.patch_size
        self.embeddings = nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(
            vision.num_channels,
            width,
            kernel_size=vision.patch_size,
            stride=vision.patch_size,
            bias=not self.has_class_token,
        )
        self.embeddings.position_embedding = nn.Embedding(side**2 + self.has_class_token, width)
        if self.has_class_token:
            self.embeddings.class_embedding = nn.Parameter(torch.zeros(width))
            self.pre_layrnorm = nn.LayerNorm(width, eps=vision.layer_norm_eps)  # sic, as CLIP's
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            VisionLayer(vision) for _ in range(vision.num_hidden_layers)
        )
        # Part of the tower, never applied to patch features: kept so that nothing is lost.
        self.post_layernorm = nn.LayerNorm(width, eps=vision.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.embeddings.patch_embedding
        x = patches(pixel_values.to(patches.weight.dtype)).flatten(2).transpose(1, 2)
        if self.has_class_token:
            token = self.embeddings.class_embedding.expand(len(x), 1, -1)
            x = torch.cat([token, x], dim=1)
        x = x + self.embeddings.position_embedding.weight
        if self.has_class_token:
            x = self.pre_layrnorm(x)
        for layer in self.encoder.layers:
            x = layer(x)
        return x[:, self.first_feature :]


class Projector(nn.Module):
    """Image features [n,P,E] -> [n,P,D]: no, one, two or three linear layers with GELU between."""

    def __init__(self, config: WingsConfig):
        super().__init__()
        depth = {"identity": 0, "linear": 1, "mlp2x_gelu": 2, "mlp3x_gelu": 3}[config.projector]
        width = config.text_config.hidden_size
        sizes = [config.vision_config.hidden_size] + [width] * depth
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(sizes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(F.gelu(x) if number else x)
        return x
