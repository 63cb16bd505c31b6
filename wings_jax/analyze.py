"""Looks into a model's attention.

    python -m wings_jax.analyze laws --checkpoint runs/stage2 --out runs/laws
    python -m wings_jax.analyze laws --base --checkpoint stage1=runs/stage1 stage2=runs/stage2 \\
        --scores runs/evaluation/report.json --out runs/laws
    python -m wings_jax.analyze laws --checkpoint DIR --data FILE.json --images DIR --out DIR

`laws` measures layer-level attention weights and attention shift, on --data (LLaVA records with
text before and after the image) or on an embedded probe set, and writes

    laws.jsonl, laws_summary.json   curves and shift by sample, and their means by model
    laws_heads-NAME.npz             masses of every head, f32[sample,layer,head,class], and router
                                    weights and norms by kind, f32[sample,layer,kind,learner]
    laws_curves.png, laws_shares-NAME.png, laws_router.png, laws_norms.png
    laws_scatter.png                shift against a score on text, with --scores
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib import figure

from wings_jax import cli, files
from wings_jax.analysis import laws, plots, probes, results
from wings_jax.analysis.probes import Variant
from wings_jax.data import samples, sources
from wings_jax.errors import UserError
from wings_jax.evaluation import models
from wings_jax.model import parameters
from wings_jax.model.wings import Wings

SCORE = "scenes_text/all text"


def parse() -> argparse.Namespace:
    """Returns the flags."""
    parser = argparse.ArgumentParser(prog="wings_jax.analyze", description=__doc__.split("\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    add = kinds.add_parser("laws", help="attention shift over layers").add_argument
    add(
        "--checkpoint",
        nargs="+",
        action="extend",
        required=True,
        metavar="[NAME=]DIR",
        help="workdir or checkpoint; several are compared",
    )
    add("--base", action="store_true", help="also the models before any stage")
    add("--data", type=pathlib.Path, metavar="FILE", help="default: an embedded probe set")
    add("--images", type=pathlib.Path, metavar="DIR", help="default: the folder of --data")
    add("--out", type=pathlib.Path, required=True, metavar="DIR")
    add("--rows", choices=probes.ROWS, default=probes.ROWS[0], help="queries; %(default)s")
    add("--exclude-prefix", type=int, default=0, metavar="K", help="first slots left out of before")
    add("--prompt-only", action="store_true", help="queries end before the last answer")
    add("--scores", nargs="+", metavar="[NAME=]FILE", help="reports of wings_jax.evaluate")
    add("--score", default=SCORE, metavar="TASK/ROW", help="which of them; %(default)s")
    add("--limit", type=int, default=128, help="samples, spread over the data; %(default)s")
    add("--longest", type=int, default=2048, help="slots of a sample; %(default)s")
    add("--batch-size", type=int, default=8, help="default: %(default)s")
    add("--debug", action="store_true", help="show a mistake's traceback")
    flags = parser.parse_args()
    for name, least in (("limit", 1), ("longest", 1), ("batch_size", 1), ("exclude_prefix", 0)):
        if getattr(flags, name) < least:
            given = getattr(flags, name)
            raise UserError(f"--{name.replace('_', '-')}: {given} is less than {least}")
    return flags


def find_samples(flags: argparse.Namespace) -> list[samples.Sample | samples.BadSample]:
    """Returns what is to be measured on."""
    if flags.data is None:
        if flags.images is not None:
            raise UserError("--images: goes with --data")
        return probes.embedded(flags.limit)
    return list(probes.sample(sources.open_source(flags.data, images=flags.images), flags.limit))


def measure(
    named: models.LazyModel,
    found: Sequence[samples.Sample | samples.BadSample],
    flags: argparse.Namespace,
) -> results.ShiftResult:
    """Returns what one model's attention does on the samples."""
    where = str(flags.data or "embedded probes")
    variant = Variant(flags.rows, flags.exclude_prefix, flags.prompt_only)
    restored = named.open()
    arch = restored.arch
    laws.check_layers(arch.decoder.num_layers, f"--checkpoint {named.name}")
    recipe = probes.make_recipe(restored.config, arch, restored.tokenizer, flags.longest)
    read, tally = probes.read_probes(found, recipe, variant)
    probes.check_any(len(read), tally, where)
    compute_dtype = restored.config.compute_dtype or parameters.default_dtype()
    model = Wings(arch, jnp.dtype(compute_dtype))
    batches = probes.in_batches(read, recipe, flags.batch_size)
    reading = laws.measure_batches(model, restored.params, batches)
    ids = [probe.example.id for probe in read]
    result = results.ShiftResult(
        named.name, named.origin, named.step, variant, arch.learners, ids, reading, tally
    )
    probes.check_any(int(result.used.sum()), result.skipped, where)
    return result


def find_scores(flags: argparse.Namespace) -> dict[str, tuple[float, float, float]]:
    """Returns model -> score in % and the ends of its interval, from all reports.

    Raises:
      UserError: a report cannot be read, or lacks the model or the score.
    """
    found = {}
    for text in flags.scores or ():
        name, _, file = text.rpartition("=")
        reported = _reported(file)
        if name and len(reported) > 1:
            reported = {name: reported[name]} if name in reported else {}
        if not reported:
            raise UserError(f"--scores: {file} has no model called {name!r}")
        for model, scores in reported.items():
            if flags.score not in scores:
                raise UserError(f"--scores: {file}: {model} has no score {flags.score!r}")
            found[name or model] = scores[flags.score]
    return found


def _reported(file: str) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Returns model -> "task/row" -> score in % and the ends of its interval, of a report."""
    try:
        models_of = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))["models"]
        return {
            str(model["name"]): {
                f"{task}/{row}": tuple(100 * x for x in (score["accuracy"], *score["interval95"]))
                for task, rows in model["tasks"].items()
                for row, score in rows.items()
            }
            for model in models_of
        }
    except OSError as error:
        raise UserError(f"--scores: {file}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"--scores: {file} is no report of wings_jax.evaluate") from error


def draw(
    found: Sequence[results.ShiftResult], points: Sequence[plots.ShiftPoint], score: str
) -> dict[str, figure.Figure]:
    """Returns the plots by file name; what no model has is left out."""
    pages = {"laws_curves.png": plots.curves(found)}
    for result in found:
        pages[f"laws_shares-{result.name}.png"] = plots.shares(result)
    pages["laws_router.png"] = plots.router(found)
    pages["laws_norms.png"] = plots.norms(found)
    if points:
        pages["laws_scatter.png"] = plots.scatter(points, score, found[0].variant)
    return {name: page for name, page in pages.items() if page is not None}


def save(
    folder: pathlib.Path, found: Sequence[results.ShiftResult], pages: Mapping[str, figure.Figure]
) -> list[pathlib.Path]:
    """Writes everything and returns the paths."""
    summary = json.dumps(results.as_json(found), indent=1, ensure_ascii=False) + "\n"
    writes: dict[str, Callable[[pathlib.Path], Any]] = {
        "laws.jsonl": lambda path: path.write_text(results.as_lines(found), encoding="utf-8"),
        "laws_summary.json": lambda path: path.write_text(summary, encoding="utf-8"),
    }
    for result in found:
        writes[f"laws_heads-{result.name}.npz"] = lambda path, result=result: np.savez_compressed(
            path, **results.heads(result)
        )
    for name, page in pages.items():
        writes[name] = lambda path, page=page: page.savefig(path, dpi=120, format="png")
    for name, write in writes.items():
        with files.replacing(folder / name) as temporary:
            write(temporary)
    return [folder / name for name in writes]


def main() -> None:
    """Analyses what the flags say."""
    flags = parse()
    cli.use_compilation_cache()
    chosen = models.find_models(flags.checkpoint, with_base=flags.base)
    files.check_writable(flags.out, "--out")
    scores = find_scores(flags)
    asked = find_samples(flags)
    found = [measure(named, asked, flags) for named in chosen]
    shown = [result for result in found if result.name in scores]
    if scores and not shown:
        raise UserError(f"--scores: none is of {', '.join(result.name for result in found)}")
    points = [plots.ShiftPoint(result.name, result.shift, scores[result.name]) for result in shown]
    print(results.as_text(found))
    for result in found:
        if result.skipped.bad:
            of = f"{result.skipped.bad} of {result.skipped.seen} samples are skipped"
            print(f"{result.name}: {of}: {probes.reasons(result.skipped)}")
    paths = save(flags.out, found, draw(found, points, flags.score))
    print("written: " + ", ".join(str(path) for path in paths))


if __name__ == "__main__":
    cli.run_main("wings_jax.analyze", main)
