"""Attention kernels for accelerators, behind the one `attention.attend`.

Each kernel is one file with one function `attend` of the same arguments, and a function
`requirement` that returns in one line what is missing on this device, if anything:

    splash    TPU (jax.experimental.pallas.ops.tpu.splash_attention)
    tokamax   NVIDIA Hopper and later (tokamax, Mosaic GPU), bfloat16
    cudnn     NVIDIA Ampere and later (cuDNN, in jax), bfloat16

The einsum in `attention.py` is the reference whose results they equal. `choice.py` chooses the
kernel of 'auto'; `intervals.py`, `columns.py` and `sharding.py` are what they share.
"""
