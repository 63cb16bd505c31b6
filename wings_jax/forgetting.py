"""Does it gain sight without forgetting text? The paper's claim, on the tiny base and a laptop.

    python -m wings_jax.forgetting [--out runs/forgetting] [--seeds 0,1,2]
                                   [--methods llava,wings] [--regimes images,replay]
                                   [--steps N] [--stage1-steps N] [--config.key=value ...]
    python -m wings_jax.forgetting --fast

Trains every method on the same data for as many steps, and asks each about pictures, about text and
in interleaved conversations. forgetting.md, forgetting.json and plots in --out are written anew
after every run and show all runs that --out holds, so methods, regimes and seeds can join later.
A stopped experiment goes on by the same command, and runs that failed are tried again. Run it from
the root of the repository.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Mapping

from wings_jax import errors
from wings_jax.data import scenes
from wings_jax.errors import UserError
from wings_jax.experiment import plan, plots, results, runner, table
from wings_jax.experiment.methods import METHODS, REGIMES, chosen

FULL = {
    "out": "runs/forgetting",
    "methods": ",".join(METHODS),
    "regimes": ",".join(REGIMES),
    "seeds": "0,1,2",
    "steps": None,
    "stage1_steps": None,
    "limit": None,
}
FAST = {
    "out": "runs/forgetting_fast",
    "methods": "base,llava,lora,wings,frozen_llm",
    "regimes": "images",
    "seeds": "0",
    "steps": 120,
    "stage1_steps": 400,
    "limit": 300,
}

# Keys of a training's config that no override may set.
OWN = ("seed", "steps", "workdir", "init_from", "data.sources", "data.scenes")


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags, and what is handed on to every training."""
    parser = argparse.ArgumentParser(
        prog="wings_jax.forgetting", description="Repeats the paper's claim on the tiny base."
    )
    add = parser.add_argument
    add("--fast", action="store_true", help="one seed, few methods, steps and questions")
    add("--out", help=f"default: {FULL['out']}, or {FAST['out']}")
    add("--methods", help=f"of {FULL['methods']}; default: all, or {FAST['methods']}")
    add("--regimes", help=f"of {FULL['regimes']}; default: both, or {FAST['regimes']}")
    add("--seeds", help=f"default: {FULL['seeds']}, or {FAST['seeds']}")
    add("--steps", type=int, help=f"of the last stage; default: its config's, or {FAST['steps']}")
    add("--stage1-steps", type=int, help=f"likewise, or {FAST['stage1_steps']}")
    add("--limit", type=int, help=f"questions of a task; default: all, or {FAST['limit']}")
    add(
        "--data-root", type=pathlib.Path, help=f"scenes; default: {plan.SCENES}, written if missing"
    )
    add("--debug", action="store_true", help="show a mistake's traceback")
    flags, rest = parser.parse_known_args()
    for word in rest:
        key = word.removeprefix("--config.").partition("=")[0]
        if key == word.partition("=")[0] or "=" not in word:
            raise UserError(f"{word!r} is neither a flag nor --config.key=value")
        if key.startswith(OWN):
            raise UserError(f"{word}: {key} is set by the experiment itself, run by run")
    for name, default in (FAST if flags.fast else FULL).items():
        given = getattr(flags, name)
        setattr(flags, name, default if given is None else given)
    for name in ("steps", "stage1_steps", "limit"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: {value} is less than 1")
    return flags, rest


def find_seeds(text: str) -> list[int]:
    """Returns the seeds of a comma-separated list. Raises UserError unless they are numbers."""
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise UserError(f"--seeds: {text!r} is no list of whole numbers") from error


def find_data(root: pathlib.Path | None) -> str:
    """Returns the folder of the embedded data set, which is written where none is named."""
    if root is None:
        return str(scenes.write(plan.SCENES))
    if not (root / "scenes.json").is_file():
        raise UserError(f"--data-root: {root} holds no scenes; python -m wings_jax.data.scenes")
    return str(root)


def main() -> None:
    """Runs the experiment that the flags describe."""
    flags, overrides = parse()
    methods = chosen(flags.methods, METHODS, "--methods")
    regimes = chosen(flags.regimes, REGIMES, "--regimes")
    seeds, out = find_seeds(flags.seeds), pathlib.Path(flags.out)
    if not pathlib.Path("configs/stage1.py").is_file():
        raise UserError("configs/stage1.py is not here: run from the root of the repository")
    settings = plan.Settings(
        is_fast=flags.fast,
        steps=flags.steps,
        stage1_steps=flags.stage1_steps,
        limit=flags.limit,
        data=find_data(flags.data_root),
        overrides=tuple(overrides),
    )
    plan.claim(out, settings)
    runs = plan.runs(out, methods, regimes, seeds, settings)

    def show(failed: Mapping[str, str]) -> list[pathlib.Path]:
        scored = results.read(out)
        missing = {run.name: failed.get(run.name, "") for run in runs if not run.file.exists()}
        note = f"fast form: {settings.steps} steps" if settings.is_fast else ""
        return table.write(out, scored, settings, missing) + plots.write(out, scored, note)

    print(runner.progress(runs), flush=True)
    failed = runner.go(runs, show)
    made, scored = show(failed), results.read(out)
    for regime in table.regimes(scored):
        print(f"\n{table.as_text(scored, regime)}")
    print("\nwritten: " + ", ".join(map(str, made)))
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed ({'; '.join(failed)}); the same command "
            "tries them again"
        )


if __name__ == "__main__":
    errors.entry("wings_jax.forgetting", main)
