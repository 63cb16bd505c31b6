"""Measures a model's attention.

    python -m wings_jax.analyze laws --checkpoint runs/stage2 --out runs/laws
    python -m wings_jax.analyze laws --base --checkpoint stage1=runs/stage1 stage2=runs/stage2 \\
        --scores runs/evaluation/report.json --out runs/laws
    python -m wings_jax.analyze laws --checkpoint DIR --data FILE.json --images DIR --out DIR

`laws` measures layer-level attention weights and attention shift, on --data (LLaVA records with
text before and after the image) or on an embedded probe set, and writes

    laws.jsonl, laws_summary.json   curves and shift by sample, and their means by model
    laws_heads-NAME.npz             masses of every head, f32[sample,layer,head,class], and router
                                    weights and norms by kind, f32[sample,layer,kind,learner]
    laws_curves.png                 attention before, on and after the image by layer
    laws_shares-NAME.png            attention by position of the query
    laws_router.png, laws_norms.png router weights, and norms of the learners, by layer
    laws_scatter.png                shift against a score on text, with --scores
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from wings_jax import cli, files
from wings_jax.errors import UserError

if TYPE_CHECKING:
    from wings_jax.analysis.results import ShiftResult
    from wings_jax.data import samples

PROGRAM = cli.program_name("wings_jax.analyze")
ROWS = ("all", "after")  # those of `analysis.slot_classes`, which --help should not have to import
MEMORY_ADVICE = (
    "lower --batch-size or --longest, use --dtype bfloat16, or share the model with --mesh"
)
SCORE = "scenes_text/all text"


def parse_flags() -> argparse.Namespace:
    """Returns the flags. Raises UserError for a number out of range or a text that is not UTF-8."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("laws", help="attention shift over layers").add_argument

    # What is measured.
    add(
        "--checkpoint",
        nargs="+",
        action="extend",
        required=True,
        metavar="[NAME=]DIR",
        help="workdir or checkpoint; several are compared",
    )
    cli.add_adapter_flag(add)
    add(
        "--base",
        nargs="?",
        const="",
        metavar="[NAME=]DIR",
        help="also this checkpoint or, without a DIR, the model before any training",
    )
    add("--data", type=pathlib.Path, metavar="FILE", help="default: an embedded probe set")
    add("--images", type=pathlib.Path, metavar="DIR", help="default: the directory of --data")
    add("--limit", type=int, default=128, help="samples, spread over the data; %(default)s")
    add("--out", type=pathlib.Path, required=True, metavar="DIR")

    # How attention is averaged.
    add("--rows", choices=ROWS, default=ROWS[0], help="queries; %(default)s")
    add("--exclude-prefix", type=int, default=0, metavar="K", help="first slots left out of before")
    add("--prompt-only", action="store_true", help="queries end before the last answer")
    add("--longest", type=int, default=2048, help="slots of a sample; %(default)s")

    # On which devices.
    add("--batch-size", type=int, default=8, help="samples at once; %(default)s")
    add("--mesh", help="devices that share each model, e.g. data=2,tensor=4")
    add("--dtype", choices=("float32", "bfloat16"), help="of the matmuls; default: the config's")

    # What it is plotted against.
    add("--scores", nargs="+", metavar="[NAME=]FILE", help="reports of wings_jax.evaluate")
    add("--score", default=SCORE, metavar="TASK/ROW", help="which of them; %(default)s")
    add("--debug", action="store_true", help="show the traceback of an error")

    flags = parser.parse_args()
    cli.check_text(flags)

    for flag, minimum in (("limit", 1), ("longest", 1), ("batch_size", 1), ("exclude_prefix", 0)):
        value = getattr(flags, flag)
        if value < minimum:
            raise UserError(f"--{flag.replace('_', '-')}: {value} is less than {minimum}")
    return flags


def read_samples(flags: argparse.Namespace) -> Sequence[samples.Sample | samples.BadSample]:
    """Returns the samples of --data, or the embedded ones. Raises UserError for a wrong file."""
    from wings_jax.analysis import probes
    from wings_jax.data import sources

    if flags.data is None:
        if flags.images is not None:
            raise UserError("--images: goes with --data")
        return probes.embedded_samples(flags.limit)

    source = sources.open_source(flags.data, images=flags.images)
    return list(probes.spread_samples(source, flags.limit))


def measure_models(flags: argparse.Namespace) -> list[ShiftResult]:
    """Returns the attention of every model of the flags. Raises UserError for a wrong model."""
    from wings_jax import axes, errors
    from wings_jax.analysis import measurement, probes
    from wings_jax.evaluation import models

    mesh = axes.make_mesh(axes.parse_mesh(flags.mesh)) if flags.mesh else None
    selected = models.find_models(
        flags.checkpoint,
        with_base=flags.base is not None,
        base=flags.base or None,
        adapters=flags.adapter,
        loading=models.LoadOptions(flags.dtype, mesh),
    )

    # The same samples for all models, before the first model is loaded.
    sample_list = read_samples(flags)
    variant = probes.Variant(flags.rows, flags.exclude_prefix, flags.prompt_only)
    settings = measurement.MeasurementSettings(
        variant, flags.longest, flags.batch_size, flags.dtype, mesh
    )

    measured = []
    for model in selected:
        # One model in memory at a time: nothing else refers to what `open` loads.
        with errors.full_memory(MEMORY_ADVICE):
            result = measurement.measure_checkpoint(
                model.open(),
                sample_list,
                settings,
                name=model.name,
                origin=model.origin,
                step=model.step,
                source=str(flags.data or "embedded probes"),
            )
        measured.append(result)
    return measured


def main() -> None:
    """Measures, prints the table, and writes the files."""
    flags = parse_flags()

    # Imported here, so that --help answers at once.
    from wings_jax.analysis import output, probes, results
    from wings_jax.analysis import scores as scores_lib

    # Mistakes in the flags are reported before anything is loaded.
    cli.use_compilation_cache()
    files.check_writable(flags.out, "--out")
    scores = scores_lib.read_scores(flags.scores or (), flags.score)

    measured = measure_models(flags)
    names = [result.name for result in measured]
    if scores and not any(name in scores for name in names):
        raise UserError(f"--scores: {', '.join(scores)}: not one of the models {', '.join(names)}")

    print(results.text_table(measured))
    for result in measured:
        skipped = result.skipped
        if skipped.bad:
            causes = probes.format_causes(skipped)
            print(f"{result.name}: {skipped.bad} of {skipped.seen} samples are skipped: {causes}")

    # Written only when everything has been computed.
    figures = output.make_figures(measured, flags.score, scores)
    paths = output.write_results(flags.out, measured, figures)
    print("written: " + ", ".join(str(path) for path in paths))


if __name__ == "__main__":
    cli.run_main(PROGRAM, main)
