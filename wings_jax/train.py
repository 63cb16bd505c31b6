"""Trains a stage.

    python -m wings_jax.train --config=configs/stage1.py[:preset] [--config.key=value ...]
                              [--data NAME=FILE[:IMAGES][@WEIGHT] ...] [--workdir=DIR]
                              [--distributed] [--print_config] [--debug] [--help]

`--distributed` joins the other hosts of a TPU slice or of a job of Slurm, Open MPI or Kubernetes;
without any of these, set JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID,
or give --coordinator_address, --num_processes and --process_id.
A run that was stopped is resumed by the same command. Its workdir holds `config.json`,
`metrics.jsonl`, `tensorboard/`, `checkpoints/` and, at the end, `summary.json`.
"""

from __future__ import annotations

import json
import sys

import jax

from wings_jax import (
    cli,
    config_checks,
    config_files,
    distributed,
    errors,
    files,
    formatting,
    process,
    serialization,
)
from wings_jax import config as config_lib
from wings_jax.training import arguments, config_help, loop, start, wandb_log

PROGRAM = cli.program_name("wings_jax.train")


def main() -> None:
    """Trains what the command line asks for, and prints where everything is."""
    options = arguments.parse(config_files.resolve_flags(sys.argv[1:]))
    if options.help:
        print(config_help.format_help(cli.program_name("wings_jax.train"), options))
        return

    config = config_lib.from_config_dict(options.config)
    if options.print_config:
        print(json.dumps(serialization.to_dict(config), indent=2))
        return

    # Mistakes in paths come before the minutes of setting up.
    workdir = options.workdir or config.workdir
    config_checks.check_text("--workdir", workdir)
    files.check_bucket(workdir, "--workdir")
    files.check_bucket(config.init_from, "config.init_from")
    if config.wandb:
        wandb_log.check_installed()

    process.import_without_torch("transformers", "tensorboardX")
    cli.use_compilation_cache()
    process.run_in_caller_thread()

    # Before any code requests the devices of JAX.
    if options.distributed:
        distributed.join_job(options.job, config.host_timeout)

    if config.eval.every:
        from wings_jax.evaluation import training_metric  # slow to import, and rarely used

        training_metric.check_config(config)

    lost_hosts = distributed.lost_hosts(config.host_timeout, "config.host_timeout")
    with errors.full_memory(memory_advice(config)), lost_hosts:
        run = start.set_up(config, files.as_path(workdir, "--workdir"))

        process.keep_freed_memory()
        measurements = make_measurements(run)

        with jax.set_mesh(run.mesh):
            summary = loop.train(run, measurements)

    # A run that was complete already has no step to report.
    if "last_loss" in summary:
        print(
            f"{summary['steps']} steps in {formatting.format_duration(summary['seconds'])}, "
            f"loss {summary['last_loss']:.4f}, accuracy {summary['last_accuracy']:.3f}, "
            f"{summary['last_tokens_per_s']:,.0f} tokens/s"
        )
    print(f"checkpoint, metrics and summary: {run.workdir}")


def make_measurements(run: start.TrainingRun) -> list[loop.TrainingMetric]:
    """Returns what the config logs beside the numbers of the training steps. Raises UserError."""
    config, measurements = run.config, []
    parts = (config, run.arch, run.tokenizer, run.mesh)

    # At the first and the last step too, so that a short run has a curve.
    if config.laws_every:
        from wings_jax.analysis import shift_metric  # slow to import, and rarely used

        start_laws, laws_every = shift_metric.make_metric(*parts), config.laws_every
        measurements.append(
            loop.TrainingMetric(
                "attention shift",
                lambda step: step in (1, run.steps) or step % laws_every == 0,
                start_laws,
            )
        )

    if config.eval.every:
        from wings_jax.evaluation import training_metric  # the same

        measure, every = training_metric.make_metric(*parts), config.eval.every
        measurements.append(
            loop.TrainingMetric(
                "evaluation",
                lambda step: step == run.steps or step % every == 0,
                measure,
                is_blocking=True,
            )
        )
    return measurements


def memory_advice(config: config_lib.Config) -> str:
    """Returns what lowers the memory that a run needs, with the current values."""
    # Rows that are on the devices at the same time.
    rows = config.batch_size // config.optimizer.accumulation
    return (
        f"raise config.optimizer.accumulation ({config.optimizer.accumulation}, so {rows} rows at "
        f"a time), lower config.data.sequence_length ({config.data.sequence_length}) or "
        f"config.loss_chunk ({config.loss_chunk}), set config.remat=full ({config.remat}), share "
        "the parameters over more devices with config.mesh.fsdp, or train fewer of them "
        "(configs/frozen_llm.py, configs/lora.py)"
    )


if __name__ == "__main__":
    cli.run_main(PROGRAM, main)
