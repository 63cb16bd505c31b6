"""Step time, tokens/s, MFU and peak memory of training steps with random weights.

    python benchmarks/train.py --preset=qwen1_5_1_8b --stage=stage2 --variants=none:4,full:16 \\
        [--seq=2048] [--layers=N] [--steps=8] [--minutes=10] [--compare=llava] [--json=FILE]
    python benchmarks/train.py --preset=tiny --batch=8 --remat=full --attention=chunked

Runs the program of `wings_jax.train` on all devices: the config's groups, optimizer, mesh and
dtypes. Weights are random and created on the devices; a batch has full rows with one image (tiny:
two) and random tokens, of which those after the image are targets. Every entry of --variants,
REMAT:BATCH[:ATTENTION[:unrolled]], is compiled and timed until --minutes are over (`unrolled`:
config.scan_layers=False); one that does not fit into the memory is a row of the table.
`--compare=llava` then times configs/llava.py in the fastest variant: the ratio is what the wings
cost. Stage 1 is compared with LLaVA's stage 1.

    step       median seconds from the end of a step to the end of the next
    model TF   operations that the model needs per step and device (`wings_jax/model/flops.py`:
               visible pairs only, nothing that is computed again)
    MFU        of the data sheet's peak, and of the matrix products measured here
    memory     arguments and temporaries of the step on one device, as the compiler reports them
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import pathlib
import signal
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # from a clone
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import ceilings

from wings_jax import cli
from wings_jax import config as config_lib
from wings_jax.errors import UserError
from wings_jax.formatting import markdown_table
from wings_jax.model import flops, layout, parameters, presets
from wings_jax.training import chips, meshes, program, state
from wings_jax.training.step import TrainState
from wings_jax.weights import starting

BASELINES = {"stage1": "llava_stage1", "stage2": "llava"}
PROMPT = 14  # slots before the image
WARM_UP = 2  # steps


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is timed: the config's name, and the leaves that differ."""

    stage: str
    remat: str
    batch: int
    attention: str
    scan_layers: bool = True


@dataclasses.dataclass
class Row:
    """The result of a variant; `problem` is the reason if there is none."""

    variant: Variant
    step_s: float = 0.0
    p95_s: float = 0.0
    tokens: int = 0
    model_tflops: float = 0.0
    mfu: float | None = None
    mfu_measured: float = 0.0
    memory_gib: float = 0.0
    compile_s: float = 0.0
    loss: float = 0.0
    problem: str = ""


def log(text: str) -> None:
    """Prints a line of progress with the seconds since the start."""
    print(f"[{time.perf_counter() - START:6.1f} s] {text}", flush=True)


def make_config(variant: Variant, flags: argparse.Namespace) -> config_lib.Config:
    """Returns the validated config of a variant."""
    tree = importlib.import_module(f"configs.{variant.stage}").get_config(flags.preset)
    tree.remat, tree.batch_size, tree.attention = variant.remat, variant.batch, variant.attention
    tree.scan_layers = variant.scan_layers
    tree.data.sequence_length = flags.seq or tree.data.sequence_length
    tree.loss_chunk = flags.loss_chunk or tree.loss_chunk
    for leaf in ("compute_dtype", "frozen_dtype"):
        tree[leaf] = flags.dtype or parameters.default_dtype()
    return config_lib.from_config_dict(tree)


def make_arch(config: config_lib.Config, layers: int) -> presets.WingsArch:
    """Returns the architecture; with `layers` the LLM has so many layers only."""
    arch = starting.resolve_arch(config.model)
    if not layers:
        return arch
    decoder = dataclasses.replace(arch.decoder, num_layers=layers)
    return dataclasses.replace(arch, decoder=decoder)


def random_state(
    config: config_lib.Config, arch: presets.WingsArch, mesh: jax.sharding.Mesh
) -> tuple[TrainState, Any]:
    """Returns a training state with random weights, created on the devices, and its optimizer."""
    shapes, optimizer = program.abstract_state(config, arch, mesh, 1000)

    def draw(key: jax.Array) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        def leaf(number: int, path: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
            values = 0.02 * jax.random.normal(
                jax.random.fold_in(key, number), shape.shape, shape.dtype
            )
            return values + path.endswith("/scale")

        leaves = [
            {path: leaf(n, path, shape) for n, (path, shape) in enumerate(group.items())}
            for group in (shapes.trained, shapes.frozen)
        ]
        return leaves[0], leaves[1]

    shardings = jax.tree.map(lambda x: x.sharding, (shapes.trained, shapes.frozen))
    key = jax.random.key(0, impl="rbg")
    trained, frozen = jax.jit(draw, out_shardings=shardings)(key)
    return state.make_state(trained, frozen, optimizer, mesh), optimizer


def random_batch(config: config_lib.Config, arch: presets.WingsArch) -> layout.Batch:
    """Returns full rows: a prompt, images, then text, whose slots are the targets."""
    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.data.sequence_length)
    patches, images = arch.vision.num_patches, config.data.images_per_row
    images = min(images, (shape[1] - PROMPT) // patches)
    start, stop = PROMPT, PROMPT + images * patches

    modality = np.full(shape, layout.TEXT)
    modality[:, start:stop] = layout.IMAGE
    tokens = rng.integers(0, arch.decoder.vocab_size, shape)
    targets = np.where(np.arange(shape[1]) >= stop, tokens, layout.IGNORE).astype(np.int32)
    side = arch.vision.image_size
    pixels = rng.integers(0, 256, (shape[0], images, side, side, 3), np.uint8)
    prompt = arch.semantics.prompt_length
    return layout.Batch(layout.make_layout(tokens, modality, prompt_length=prompt), targets, pixels)


def measure(variant: Variant, flags: argparse.Namespace, peak: float) -> Row:
    """Returns the times of a variant; `peak` is the measured rate of matrix products."""
    row = Row(variant)
    config = make_config(variant, flags)
    arch = make_arch(config, flags.layers)
    mesh = meshes.make_run_mesh(config, arch)
    batch = random_batch(config, arch)

    with jax.set_mesh(mesh):
        placed = meshes.place_batch(
            batch, mesh, batch_size=config.batch_size, accumulation=config.optimizer.accumulation
        )
        shapes, optimizer = program.abstract_state(config, arch, mesh, 1000)
        started = time.perf_counter()
        update = program.jit_update(config, arch, optimizer, shapes)
        compiled = update.lower(shapes, placed).compile()
        row.compile_s = time.perf_counter() - started

        # Known before anything is allocated: whether it fits.
        memory = compiled.memory_analysis()
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        row.memory_gib = needed / 2**30
        log(f"{variant}: compiled in {row.compile_s:.1f} s, needs {row.memory_gib:.1f} GiB")
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        if limit and needed > limit:
            row.problem = f"needs {row.memory_gib:.1f} GiB, the device has {limit / 2**30:.1f}"
            return row

        current, _ = random_state(config, arch, mesh)
        log("weights created")
        times, row.loss = time_steps(compiled, current, placed, flags.steps)

    # Per device: rows are shared by all.
    work = flops.count_workload(batch, arch)
    count = jax.device_count()
    operations = flops.model_flops(arch, work, current.trained.keys()) / count
    chip = chips.find_chip(jax.devices()[0].device_kind)
    row.step_s, row.p95_s = statistics.median(times), float(np.percentile(times, 95))
    row.tokens, row.model_tflops = work.slots // count, operations / 1e12
    row.mfu = operations / row.step_s / chip.flops if chip else None
    row.mfu_measured = operations / row.step_s / peak
    return row


def time_steps(
    compiled: Any, current: TrainState, batch: layout.Batch, steps: int
) -> tuple[list[float], float]:
    """Returns seconds per step, and the last loss; as in training, one step is always queued."""
    times, last, pending = [], time.perf_counter(), None
    metrics: Any = None
    for number in range(WARM_UP + steps + 1):
        current, metrics = compiled(current, batch)
        if pending is not None:
            jax.block_until_ready(pending)
            now = time.perf_counter()
            if number > WARM_UP:
                times.append(now - last)
            last = now
        pending = metrics["loss"]
    return times, float(metrics["loss"])


def parse_variants(flags: argparse.Namespace) -> list[Variant]:
    """Returns what --variants lists, or the one that the other flags and the config describe."""
    config = importlib.import_module(f"configs.{flags.stage}").get_config(flags.preset)
    default = [flags.remat or config.remat, str(flags.batch or config.batch_size), flags.attention]
    variants = []
    for entry in flags.variants.split(",") if flags.variants else [":".join(default)]:
        parts = entry.split(":")
        remat, batch, attention, *loop = parts + default[len(parts) :]
        if loop not in ([], ["unrolled"]):
            raise SystemExit(f"--variants: {entry!r} is not REMAT:BATCH[:ATTENTION[:unrolled]]")
        variants.append(Variant(flags.stage, remat, int(batch), attention, not loop))
    return variants


def try_variant(variant: Variant, flags: argparse.Namespace, peak: float) -> Row:
    """Returns the row of a variant; running out of memory is a result."""
    try:
        return measure(variant, flags, peak)
    except jax.errors.JaxRuntimeError as error:
        first_line = str(error).splitlines()[0]
        log(f"{variant}: {first_line[:200]}")
        return Row(variant, problem=first_line[:80])
    except (UserError, ValueError) as error:
        log(f"{variant}: {error}")
        return Row(variant, problem=str(error)[:80])
    finally:
        jax.clear_caches()


def print_table(rows: list[Row], kind: str) -> None:
    """Prints the results as Markdown."""
    heading = (kind, "remat", "batch", "attention", "step s", "p95", "tokens/s per device")
    cells = [(*heading, "model TF", "MFU (sheet)", "MFU (measured)", "memory GiB", "compile s")]
    for row in rows:
        variant = row.variant
        remat = variant.remat if variant.scan_layers else f"{variant.remat}, unrolled"
        name = (variant.stage, remat, str(variant.batch), variant.attention)
        if row.problem:
            cells.append((*name, row.problem, *["-"] * 6, f"{row.compile_s:.0f}"))
            continue
        cells.append(
            (
                *name,
                f"{row.step_s:.3f}",
                f"{row.p95_s:.3f}",
                f"{row.tokens / row.step_s:,.0f}",
                f"{row.model_tflops:.2f}",
                f"{row.mfu:.1%}" if row.mfu is not None else "-",
                f"{row.mfu_measured:.1%}",
                f"{row.memory_gib:.1f}",
                f"{row.compile_s:.0f}",
            )
        )
    print(markdown_table(cells), flush=True)


def parse_flags() -> argparse.Namespace:
    """Returns the command line's flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="tiny", help="of configs/base.py")
    parser.add_argument("--stage", default="stage2", help="a config in configs/")
    parser.add_argument("--layers", type=int, default=0, help="of the LLM; 0 for the preset's")
    parser.add_argument("--variants", default="", help="REMAT:BATCH[:ATTENTION[:unrolled]], a list")
    parser.add_argument("--batch", type=int, default=0, help="rows; 0 for the config's")
    parser.add_argument("--remat", default="", help="policy; '' for the config's")
    parser.add_argument("--attention", default="auto", help="kernel")
    parser.add_argument("--seq", type=int, default=0, help="slots of a row; 0 for the config's")
    parser.add_argument("--loss-chunk", type=int, default=0, help="0 for the config's")
    parser.add_argument("--dtype", default="", choices=("", "float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--minutes", type=float, default=10.0, help="no variant starts later")
    parser.add_argument("--compare", default="", choices=("", "llava"))
    parser.add_argument("--json", default="", help="file for the results")
    return parser.parse_args()


def compare(rows: list[Row], flags: argparse.Namespace, peak: float) -> Row | None:
    """Returns the baseline's row in the fastest variant of the stage, and prints the ratio."""
    timed = [row for row in rows if not row.problem]
    if not timed:
        return None
    best = min(timed, key=lambda row: row.step_s / row.tokens)
    baseline = dataclasses.replace(best.variant, stage=BASELINES.get(flags.stage, "llava"))
    row = try_variant(baseline, flags, peak)
    if not row.problem:
        times = f"{best.step_s:.3f} s / {row.step_s:.3f} s"
        print(f"\nWings over LLaVA step time: {best.step_s / row.step_s:.3f} ({times})", flush=True)
        needed = best.model_tflops / row.model_tflops
        print(f"Wings over LLaVA operations: {needed:.3f}\n", flush=True)
    return row


def main() -> None:
    """Times all variants and prints the table."""
    flags = parse_flags()
    cli.use_compilation_cache()
    kind = jax.devices()[0].device_kind
    size, gib = (1024, 0.25) if jax.default_backend() == "cpu" else (8192, 2.0)
    peak, bandwidth = ceilings.matmul_rate(size), ceilings.copy_rate(gib)
    log(
        f"{jax.device_count()} x {kind}, jax {jax.__version__}: bf16 matrix products of {size} "
        f"{peak / 1e12:.1f} TFLOP/s, copy {bandwidth / 1e9:.0f} GB/s"
    )

    # What was measured is printed also where `timeout` ends the run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows: list[Row] = []
    try:
        for variant in parse_variants(flags):
            if time.perf_counter() - START > 60 * flags.minutes:
                rows.append(Row(variant, problem="not run: --minutes are over"))
                continue
            rows.append(try_variant(variant, flags, peak))
            log(f"{rows[-1]}")

        baseline = compare(rows, flags, peak) if flags.compare else None
        rows += [baseline] if baseline else []
    finally:
        print_table(rows, kind)
        if flags.json:
            content = {
                "device": kind,
                "devices": jax.device_count(),
                "jax": jax.__version__,
                "matmul_flops_per_s": peak,
                "copy_bytes_per_s": bandwidth,
                "flags": vars(flags),
                "rows": [dataclasses.asdict(row) for row in rows],
            }
            pathlib.Path(flags.json).write_text(json.dumps(content, indent=2) + "\n")


START = time.perf_counter()

if __name__ == "__main__":
    main()
