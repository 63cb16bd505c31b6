"""The one projection: a product that is named by its einsum, with LoRA or as a low-rank pair.

Shapes, sharding axes and initializer follow from the dimensions in the einsum. LoRA is a rank of
the same module; the learners' low-rank residual matrices (LoRRA) are `LowRank`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn

INIT = nn.initializers.normal(stddev=0.02)


def partitioned(
    init: nn.initializers.Initializer, dims: Sequence[str | None]
) -> nn.initializers.Initializer:
    """Returns `init` with these logical axes, for `self.param`, which returns the bare array."""
    return cast("nn.initializers.Initializer", nn.with_logical_partitioning(init, tuple(dims)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project(eqn: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns einsum(eqn, x, kernel) in x's dtype; the kernel has the gradient x^T g.

    JAX derives (g^T x)^T, for which XLA's CPU compiler transposes g, the larger one of the two.
    The kernel is cast to x's dtype where it is used, in the forward and in the backward pass.
    """
    return jnp.einsum(eqn, x, _cast_layer(kernel, x.dtype))


def _cast_layer(kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the kernel in this dtype, cast inside of the scan over layers.

    XLA moves a cast to a smaller dtype in front of the loop, and so keeps a second copy of all
    layers' parameters: 1.5 GiB per chip for 7B on 8. It does not move one of rounded values (and
    does move one behind an optimization barrier). The result is the same: `reduce_precision`
    rounds to the values that `dtype` has.
    """
    if kernel.dtype == dtype:
        return kernel
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(kernel, kind.nexp, kind.nmant).astype(dtype)


def _project_forward(
    eqn: str, x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns the product, and what the backward pass reads."""
    return jnp.einsum(eqn, x, _cast_layer(kernel, x.dtype)), (x, kernel)


def _project_backward(
    eqn: str, residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of x and kernel: 'BTD,DF->BTF' gives 'BTF,DF->BTD', 'BTD,BTF->DF'."""
    x, kernel = residuals
    left, out = eqn.split("->")
    inputs, weight = left.split(",")
    dx = jnp.einsum(f"{out},{weight}->{inputs}", gradient, _cast_layer(kernel, x.dtype))
    d_kernel = jnp.einsum(f"{inputs},{out}->{weight}", x, gradient)
    return dx, d_kernel.astype(kernel.dtype)


project.defvjp(_project_forward, _project_backward)


def project_together(eqn: str, x: jax.Array, kernels: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns einsum(eqn, x, kernel) of each kernel, by one product; they differ in the last axis.

    A thin product takes as long as one that is several times as wide.
    """
    if len(kernels) == 1:
        return [project(eqn, x, kernels[0])]

    joined = project(eqn, x, jnp.concatenate(kernels, axis=-1))
    widths = [kernel.shape[-1] for kernel in kernels]
    return jnp.split(joined, list(itertools.accumulate(widths))[:-1], axis=-1)


class Projection(nn.Module):
    """Returns einsum(eqn, x, kernel) in x's dtype, plus bias and LoRA.

    eqn    e.g. 'BTD,DNH->BTNH': the kernel [D,N,H] maps D to (N, H)
    sizes  sizes of the dimensions that x does not have
    bias   whether a bias is added
    rank   R > 0 adds scale * x a b with a [in...,R] (Gaussian), b [R,out...] (zero)
    scale  of the low-rank update

    Parameters: kernel, bias, a, b.
    """

    eqn: str
    sizes: Mapping[str, int]
    bias: bool = False
    rank: int = 0
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, product: jax.Array | None = None) -> jax.Array:
        """Returns the projection of x; `product` is einsum(eqn, x, kernel) where it is known."""
        # 'BTD,DNH->BTNH': inputs 'BTD', kernel 'DNH', of which 'D' is contracted, 'NH' created
        left, out = self.eqn.split("->")
        inputs, kernel = left.split(",")
        contracted = "".join(d for d in kernel if d not in out)
        created = "".join(d for d in kernel if d in out)
        sizes = {**self.sizes, **dict(zip(inputs, x.shape, strict=True))}

        y = product
        if y is None:
            y = project(self.eqn, x, _param(self, "kernel", INIT, kernel, sizes))

        # Low-rank update, e.g. [B, T, D] -> [B, T, R] -> [B, T, N, H]
        if self.rank:
            batch = "".join(d for d in inputs if d not in contracted)
            a, b = _low_rank_pair(self, contracted, created, {**sizes, "R": self.rank})
            low = project(f"{inputs},{contracted}R->{batch}R", x, a)
            y = y + project(f"{batch}R,R{created}->{out}", low, b) * self.scale

        if self.bias:
            y = y + _param(self, "bias", nn.initializers.zeros, created, sizes).astype(x.dtype)
        return y


class LowRank(nn.Module):
    """The matrices a [in...,R] (Gaussian) and b [R,out...] (zero) of a product x a b.

    inputs   dimensions that are contracted, e.g. 'D'
    outputs  dimensions that are created, e.g. 'NH'
    sizes    of these dimensions, and of R
    """

    inputs: str
    outputs: str
    sizes: Mapping[str, int]

    def setup(self) -> None:
        self.a, self.b = _low_rank_pair(self, self.inputs, self.outputs, self.sizes)


def _low_rank_pair(
    module: nn.Module, inputs: str, outputs: str, sizes: Mapping[str, int]
) -> tuple[jax.Array, jax.Array]:
    """Returns parameters a [in...,R] and b [R,out...], whose product is 0 at initialization."""
    a = _param(module, "a", INIT, inputs + "R", sizes)
    return a, _param(module, "b", nn.initializers.zeros, "R" + outputs, sizes)


def _param(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    dims: str,
    sizes: Mapping[str, int],
) -> jax.Array:
    """Returns a module's float32 parameter of these dimensions, which are its logical axes."""
    shape = tuple(sizes[d] for d in dims)
    return module.param(name, partitioned(init, dims), shape, jnp.float32)
