"""The learners' low-rank matrices in few tensors, for steps of one token.

A step of one token is bound by the number of operations. Its learners have 12 small matrices per
layer and token; joined along their outputs they are 4 per layer and 2 for the keys and values of
all layers. The joined copies live as long as a cache (and the cached keys and values, which belong
to the same weights): training and adapters change the matrices themselves and are not affected.

Shapes: B rows, M learners, L layers, D width, N heads, H head width, R rank.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def stacked(matrices: list[nn.Module]) -> torch.Tensor:
    """Returns [n,I,O], the transposed weights of n linear layers [O,I]."""
    return torch.stack([matrix.weight for matrix in matrices]).transpose(1, 2)


def can_pack(learners: list[nn.Module]) -> bool:
    """Returns whether all matrices are plain: neither quantized, adapted nor observed by hooks."""
    matrices = [m for learner in learners for m in learner.modules() if not list(m.children())]
    return all(
        type(matrix) is nn.Linear
        and matrix.weight.is_floating_point()
        and matrix.weight.device.type != "meta"
        and not matrix._forward_hooks
        and not matrix._forward_pre_hooks
        for matrix in matrices
    )


class PackedLearners:
    """The query and output matrices of the M learners of one layer."""

    def __init__(self, learners: list[nn.Module]):
        self.q_a = torch.cat([learner.q.a.weight for learner in learners])  # [M*R,D]
        self.q_b = stacked([learner.q.b for learner in learners])  # [M,R,D]
        self.o_a = stacked([learner.o.a for learner in learners])  # [M,D,R]
        self.o_b = stacked([learner.o.b for learner in learners])  # [M,R,D]

    def queries(self, query: torch.Tensor) -> torch.Tensor:
        """Returns query (1 + a b) of every learner [M,B,1,D] for [B,1,D]."""
        rows, _, width = query.shape
        low = F.linear(query, self.q_a).view(rows, len(self.q_b), -1).transpose(0, 1)
        base = query.view(1, rows, width).expand(len(self.q_b), -1, -1)
        return torch.baddbmm(base, low, self.q_b).unsqueeze(2)

    def outputs(self, heads: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Returns the gated sum of outputs [B,1,D] of heads [M,B,D] and gates [M,B,1]."""
        low = torch.bmm(heads, self.o_a) * gates
        return torch.bmm(low, self.o_b).sum(0).unsqueeze(1)


class PackedKeys:
    """The key and value matrices of one learner in L layers."""

    def __init__(self, learners: list[nn.Module]):
        matrices = [learner.k for learner in learners] + [learner.v for learner in learners]
        self.a = torch.cat([matrix.a.weight for matrix in matrices])  # [2L*R,D]
        self.b = stacked([matrix.b for matrix in matrices])  # [2L,R,D]

    def keys_values(self, x0: torch.Tensor, head_width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys before rope and values [B,L*N,1,H] of layer-0 features [B,1,D]."""
        rows, _, width = x0.shape
        low = F.linear(x0, self.a).view(rows, len(self.b), -1).transpose(0, 1)
        base = x0.view(1, rows, width).expand(len(self.b), -1, -1)
        both = torch.baddbmm(base, low, self.b).transpose(0, 1)  # [B,2L,D]
        k, v = both.reshape(rows, -1, 1, head_width).chunk(2, dim=1)
        return k, v


class PackedRouters:
    """The weights of the routers of L layers."""

    def __init__(self, layers: list[nn.Module]):
        self.weight = torch.stack([layer.router.weight for layer in layers]).float()  # [L,M,S']

    def values(self, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns L x f32[B,S,M], the weights at the keys' positions i64[B,S]."""
        return self.weight[:, :, positions].permute(0, 2, 3, 1).unbind()


class PackedWeights:
    """What steps of one token use of the active layers' learners; each part is made when asked for.

    layers: the decoder layers with learners.
    """

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers
        self.is_usable = can_pack([x for layer in layers for x in layer.learners.values()])
        self._by_layer: dict[tuple, PackedLearners] = {}
        self._keys: dict[str, PackedKeys] = {}
        self._routers: PackedRouters | None = None

    def router_values(self, positions: torch.Tensor) -> dict[nn.Module, torch.Tensor]:
        """Returns layer -> its router's weights f32[B,S,M] at the keys' positions i64[B,S]."""
        if self._routers is None:
            self._routers = PackedRouters(self.layers)
        return dict(zip(self.layers, self._routers.values(positions), strict=True))

    def learners(self, layer: nn.Module, names: tuple[str, ...]) -> PackedLearners:
        """Returns the query and output matrices of the named learners of a layer."""
        key = (id(layer), names)
        if key not in self._by_layer:
            self._by_layer[key] = PackedLearners([layer.learners[name] for name in names])
        return self._by_layer[key]

    def keys(self, name: str) -> PackedKeys:
        """Returns the key and value matrices of a learner in all layers."""
        if name not in self._keys:
            self._keys[name] = PackedKeys([layer.learners[name] for layer in self.layers])
        return self._keys[name]
