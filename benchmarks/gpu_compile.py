"""Memory, its traffic and collectives of a step on GPUs, compiled ahead of time without any.

    python benchmarks/gpu_compile.py [--chip=h100] [--devices=8] [--preset=qwen1_5_7b] \\
        [--stage=stage2] [--seq=2048] [--batch=N] [--layers=N] [--remat=full] \\
        [--attention=auto] [--unrolled] [--loss-chunk=512] [--json=FILE]

Needs the CUDA plugin of jax (`pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt`, 400 MB) and
`ptxas` of CUDA 13 (in /usr/local/cuda or the PATH), but no GPU and none of CUDA's other libraries.
The step is the program of `wings_jax.train`, in bfloat16 with all GPUs in `fsdp`, by default with
one row per GPU. XLA's own kernels are assembled for the chip. Products are calls of cuBLAS: which
of them Triton computes is chosen on a GPU, by time. Attention kernels are in the program as calls:
cuDNN plans its kernels, and Mosaic assembles tokamax's, when a program starts.

A second table has how often kernels start and what they read and write, by kind (`gpu_traffic`).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # from a clone
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import gpu_traffic
import tpu_compile

# What XLA's compiler asks of a GPU: compute capability, multiprocessors, shared memory of one and
# of a block, L2 cache and memory in bytes, bandwidth in bytes per second, clock in GHz.
CHIPS = {
    "h100": ("NVIDIA H100 80GB HBM3", (9, 0), 132, 233472, 232448, 50 * 2**20, 3.35e12, 1.98),
    "a100-80": ("NVIDIA A100-SXM4-80GB", (8, 0), 108, 167936, 166912, 40 * 2**20, 2.04e12, 1.41),
}
MEMORY = 80 * 2**30
CUDNN = 91700  # the version to compile for


def target_config(chip: str) -> str:
    """Returns XLA's description of a GPU, a text protocol buffer."""
    name, (major, minor), cores, shared, optin, cache, bandwidth, clock = CHIPS[chip]
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          shared_memory_per_block: 49152 shared_memory_per_core: {shared}
          shared_memory_per_block_optin: {optin}
          core_count: {cores} fpus_per_core: {128 if major == 9 else 64} clock_rate_ghz: {clock}
          l2_cache_size: {cache} device_memory_size: {MEMORY} memory_bandwidth: {bandwidth:.0f}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: {CUDNN // 10000} minor: {CUDNN // 100 % 100} patch: 0 }}
        device_description_str: "{name}"
    """


@contextlib.contextmanager
def compiling_for(device: Any) -> Iterator[None]:
    """Lets the kernels' checks of the machine find a GPU that is not here."""
    from jax._src.cudnn import fused_attention_stablehlo as fused
    from jax.extend import backend

    from wings_jax.model.kernels import choice

    capability = float(device.compute_capability)
    replaced = {
        (backend, "get_default_device"): lambda: device,
        (fused, "check_cudnn_version"): lambda: CUDNN,
        (fused, "check_compute_capability"): lambda least: float(least) <= capability,
        (fused, "is_cuda_compute_capability_equal"): lambda other: float(other) == capability,
    }
    before = {(module, name): getattr(module, name) for module, name in replaced}
    with contextlib.ExitStack() as stack:
        stack.enter_context(choice.compiling_for(device))
        if importlib.util.find_spec("tokamax"):
            from tokamax._src import config as tokamax_config

            stack.enter_context(tokamax_config.cross_compile(True))
        for (module, name), value in replaced.items():
            setattr(module, name, value)
        try:
            yield
        finally:
            for (module, name), value in before.items():
                setattr(module, name, value)


def compile_step(flags: argparse.Namespace) -> dict[str, Any]:
    """Returns memory and collectives per GPU in GiB, calls of library kernels, and traffic."""
    import jax
    from jax.experimental import topologies

    from wings_jax.planning import hlo

    devices = topologies.get_topology_desc(
        flags.chip, "cuda", topology=f"1x1x{flags.devices}", target_config=target_config(flags.chip)
    ).devices
    mesh, update, shapes = tpu_compile.make_step(flags, devices)
    started = time.perf_counter()
    with jax.set_mesh(mesh), compiling_for(devices[0]):
        lowered = update.trace(*shapes).lower(lowering_platforms=("cuda",))
        compiled = lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})

    memory, text = compiled.memory_analysis(), compiled.as_text()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "sent": sum(traffic.bytes for traffic in hlo.list_collectives(text, len(devices))),
    }
    calls = collections.Counter(re.findall(r'custom_call_target="([^"]+)"', text))
    return {
        **vars(flags),
        "rows": shapes[1].targets.shape[0],
        **{f"{name}_gib": size / 2**30 for name, size in sizes.items()},
        "calls": dict(calls),
        "traffic": [dataclasses.asdict(x) for x in gpu_traffic.count_traffic(text)],
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    """Prints a table of one row, the library calls of the program, and a table of its kernels."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/gpu_compile.py", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--chip", default="h100", choices=CHIPS)
    parser.add_argument("--devices", type=int, default=8)
    tpu_compile.add_flags(parser)
    flags = parser.parse_args()

    if not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))):
        parser.error(
            "needs the CUDA plugin: pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt"
        )

    os.environ["JAX_PLATFORMS"] = "cpu"  # arrays, if there were any
    row = compile_step(flags)
    columns = ["arguments_gib", "temporaries_gib", "peak_gib", "sent_gib", "seconds"]
    tpu_compile.print_row(flags, f"{flags.devices} {flags.chip}", row, columns)
    print("calls:", ", ".join(f"{count} x {name}" for name, count in row["calls"].items()))

    print()
    gpu_traffic.print_table([gpu_traffic.KernelTraffic(**kind) for kind in row["traffic"]])


if __name__ == "__main__":
    main()
