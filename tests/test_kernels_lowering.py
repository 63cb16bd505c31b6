"""The training step at full size, lowered for accelerators that are not here."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from configs import stage2
from wings_jax import axes
from wings_jax import config as config_lib
from wings_jax.model.kernels import choice
from wings_jax.training import meshes, program
from wings_jax.weights import starting


class Hopper:
    """An H100, with the attributes that tokamax reads."""

    platform, compute_capability, core_count = "gpu", "9.0", 132
    device_kind = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def hopper(monkeypatch):
    """Lets tokamax and cuDNN's checks find an H100."""
    pytest.importorskip("tokamax")
    from jax._src.cudnn import fused_attention_stablehlo as fused
    from jax.extend import backend
    from tokamax._src import config as tokamax_config

    monkeypatch.setattr(backend, "get_default_device", Hopper)
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91700)
    monkeypatch.setattr(fused, "check_compute_capability", lambda least: float(least) <= 9.0)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda x: float(x) == 9.0)
    with choice.compiling_for(Hopper()), tokamax_config.cross_compile(True):
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "calls"),
    [
        ("tokamax", {"mosaic_gpu_v2"}),
        ("cudnn", {"__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"}),
    ],
)
def test_stage_2_of_7b_lowers_for_8_gpus(kernel, calls, hopper):
    tree = stage2.get_config("qwen1_5_7b")
    tree.attention, tree.remat, tree.batch_size = kernel, "save_attn", 8
    tree.compute_dtype = tree.frozen_dtype = "bfloat16"
    config = config_lib.from_config_dict(tree)
    arch = starting.resolve_arch(config.model)

    mesh = axes.make_mesh(meshes.mesh_shape(config.mesh, arch, 8), jax.devices()[:8])
    state, optimizer = program.abstract_state(config, arch, mesh, steps=10)
    batch = program.abstract_batch(config, arch, mesh)
    with jax.set_mesh(mesh):
        update = program.jit_update(config, arch, optimizer, state)
        text = update.trace(state, batch).lower(lowering_platforms=("cuda",)).as_text()
    assert calls <= set(re.findall(r"custom_call @([\w$]+)", text))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "kernel", "call"),
    [
        ("h100", "tokamax", "mosaic_gpu_v2"),
        ("a100-80", "cudnn", "__cudnn$fmhaScaleBiasSoftmaxBackward"),
    ],
)
def test_stage_2_compiles_for_8_gpus(chip, kernel, call):
    """By the GPU's compiler, where its plugin is installed; no GPU is needed."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("needs jax-cuda13-plugin and jax-cuda13-pjrt")
    script = pathlib.Path(__file__).parent.parent / "benchmarks/gpu_compile.py"
    small = ["--preset=qwen1_5_0_5b", "--layers=1", "--seq=1024"]
    completed = subprocess.run(
        [sys.executable, script, f"--chip={chip}", f"--attention={kernel}", *small],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr
    assert f"| 8 {chip} | stage2 | qwen1_5_0_5b | {kernel} |" in completed.stdout
    assert f" x {call}" in completed.stdout


COMPILE = """
import functools, jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from wings_jax.model import attention, layout

device = topologies.get_topology_desc("v5p:2x2x1", "tpu").devices[0]
spec = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))

def scalar(q, k, v, probes, slots):
    visibility = layout.Visibility(slots, slots)
    out, probed = attention.attend(
        q, k, v, probes=probes, query=visibility, key=visibility, kernel="splash"
    )
    return out.astype(jnp.float32).sum() + probed.sum()

q, k = (spec((1, 1024, heads, 128), jnp.bfloat16) for heads in (8, 2))
arguments = (q, k, k, spec((1, 1024, 2), jnp.float32), spec((1, 1024), jnp.int32))
compiled = jax.jit(jax.grad(scalar, argnums=(0, 1, 2, 3))).lower(*arguments).compile()
print("temporary", compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
def test_splash_compiles_for_a_tpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install 'jax[tpu]'")
    target = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    completed = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**os.environ, **target, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr
    # Without a matrix of [T,S]: 8 heads of float32 would take 32 MiB.
    assert int(completed.stdout.split()[-1]) < 16 * 2**20
