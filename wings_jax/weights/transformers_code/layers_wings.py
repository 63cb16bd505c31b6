"""Norms, linear layers and attention of a Wings model's LLM.

Shapes: B rows, T queries, S keys, N heads, K key-value heads, H head width, R rank, C columns of
values to probe the attention weights with.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_wings import WingsConfig

COLUMNS_MULTIPLE = 8  # head widths that the fused kernels take


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return wide.to(x.dtype)


class LoraLinear(nn.Linear):
    """A linear layer with a LoRA pair beside its weight; rank 0 is a plain linear layer."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, rank: int, alpha: float):
        super().__init__(inputs, outputs, bias=bias)
        self.rank, self.scale = rank, alpha / max(rank, 1)
        if rank:
            self.lora_a = nn.Linear(inputs, rank, bias=False)
            self.lora_b = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y + self.lora_b(self.lora_a(x)) * self.scale if self.rank else y


def lora_linear(
    config: WingsConfig, name: str, inputs: int, outputs: int, *, bias: bool
) -> nn.Linear:
    """Returns a projection of the LLM, with LoRA where the configuration has it."""
    if not config.lora_rank or name not in config.lora_targets:
        return nn.Linear(inputs, outputs, bias=bias)
    return LoraLinear(inputs, outputs, bias=bias, rank=config.lora_rank, alpha=config.lora_alpha)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    columns: torch.Tensor | None = None,
    eager: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Scaled dot-product attention, with products of the weights and extra columns.

    Args:
        q: [B,N,T,H].
        k, v: [B,K,S,H].
        mask: [B,1,T,S], added to the scores; None: every query attends to every key.
        columns: f32[B,S,C], the same for all heads.
        eager: compute the weights [B,N,T,S] and return them.

    Returns:
        out [B,N,T,H]; the weights' sum over heads times the columns f32[B,T,C], or None; the
        weights f32[B,N,T,S] or None.
    """
    groups, length, scale = q.shape[1] // k.shape[1], q.shape[2], q.shape[-1] ** -0.5
    if groups > 1 and length == 1 and not eager:
        # One query: the heads that share keys are queries of one head. The mask fits both.
        q = q.reshape(q.shape[0], k.shape[1], groups, q.shape[-1])
        out, probed, _ = attend(q, k, v, mask, columns=columns)
        if probed is not None:
            probed = probed.sum(1, keepdim=True)
        return out.reshape(out.shape[0], -1, 1, out.shape[-1]), probed, None
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))

    # For a few queries the weights are smaller than padded keys and values.
    if eager or (columns is not None and q.shape[2] <= 16):
        scores = (q @ k.transpose(2, 3)).float() * scale
        weights = (scores if mask is None else scores + mask).softmax(-1)
        probed = None if columns is None else weights.sum(1) @ columns
        return weights.to(v.dtype) @ v, probed, weights if eager else None

    if columns is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return out, None, None

    # Keys get zero columns, values the probes; all three keep the same width.
    width = q.shape[-1]
    extra = -(-columns.shape[-1] // COLUMNS_MULTIPLE) * COLUMNS_MULTIPLE
    padded = F.pad(columns, (0, extra - columns.shape[-1])).to(v.dtype)
    padded = padded[:, None].expand(-1, v.shape[1], -1, -1)
    q, k = F.pad(q, (0, extra)), F.pad(k, (0, extra))
    out = F.scaled_dot_product_attention(
        q, k, torch.cat([v, padded], dim=-1), attn_mask=mask, scale=scale
    )
    probed = out[..., width : width + columns.shape[-1]].float().sum(1)
    return out[..., :width], probed, None


class LowRank(nn.Module):
    """x -> b(a(x)): a low-rank matrix."""

    def __init__(self, inputs: int, rank: int, outputs: int):
        super().__init__()
        self.a = nn.Linear(inputs, rank, bias=False)
        self.b = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        low = self.a(x)
        return self.b(low if gate is None else low * gate)
