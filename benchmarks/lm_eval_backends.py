"""lm-eval with a wings_jax checkpoint beside lm-eval's own `hf` model (torch), on the same items.

    python benchmarks/lm_eval_backends.py --checkpoint DIR --hf DIR --data-root DATA \\
        [--tasks piqa,openbookqa,mmlu_anatomy,gsm8k,mbpp] [--limit 100] [--rounds 2]

Needs lm-eval, torch and transformers. The tasks are lm-eval's, with its prompts and metrics, and
read local files: DATA has `piqa/`, `openbookqa/Main/`, `mmlu/`, `gsm8k/` and `mbpp/` as
docs/evaluation.md names them. Only MBPP's code runs in the sandbox of wings_jax for both, as
lm-eval's own metric is fetched from a hub.

Every run is a process of its own on one core, the two models alternate, and nothing is compiled
before: wings_jax starts with an empty cache of programs, which it fills again in every round.
The table has scores, items per second (of CPU time, which other programs on the machine disturb
less than the clock; with compilation), peak memory of the process, and how many items differ.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # from a clone
sys.path.insert(0, str(ROOT / "benchmarks"))

BACKENDS = ("wings", "hf")


def evaluate_tasks(flags: argparse.Namespace) -> dict[str, Any]:
    """Returns what one backend answers to every task, its CPU seconds and its peak memory."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0)) + flags.core})

    import lm_eval
    import lm_eval_tasks
    from lm_eval.tasks import TaskManager

    model = open_model(flags)
    loaded, results = peak_gib(), {}
    with tempfile.TemporaryDirectory() as directory:
        names = lm_eval_tasks.write_tasks(pathlib.Path(directory), flags.data_root, flags.tasks)
        manager = TaskManager(include_path=directory, include_defaults=False)
        for name, local_name in names.items():
            limit = flags.limit if flags.limit and name in flags.limited else None
            started, clock = time.process_time(), time.perf_counter()
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=[local_name],
                task_manager=manager,
                limit=limit,
                log_samples=True,
                bootstrap_iters=0,
                confirm_run_unsafe_code=True,
            )
            results[name] = {
                "cpu": time.process_time() - started,
                "clock": time.perf_counter() - clock,
                "items": sample_records(found["samples"][local_name]),
            }
    return {"tasks": results, "peak_gib": peak_gib(), "loaded_gib": loaded}


def open_model(flags: argparse.Namespace) -> Any:
    """Returns the model of lm-eval for a backend."""
    if flags.worker == "wings":
        from wings_jax import cli
        from wings_jax.evaluation.lm_eval_model import WingsLM

        cli.use_compilation_cache()
        return WingsLM(str(flags.checkpoint), batch_size=flags.batch_size)

    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(1)
    return HFLM(
        pretrained=str(flags.hf), device="cpu", dtype="float32", batch_size=flags.batch_size
    )


def peak_gib() -> float:
    """Returns the highest resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def sample_records(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns answers and metrics of each item, in the order of the file.

    lm-eval has a sample of each filter of the answers ("strict-match"); their metrics are joined.
    """
    filters = {sample.get("filter", "none") for sample in samples}
    records: dict[int, dict[str, Any]] = {}
    for sample in sorted(samples, key=lambda one: one["doc_id"]):
        answers = [
            float(answer[0]) if isinstance(answer, (list, tuple)) else str(answer)
            for answer in sample["filtered_resps"]
        ]
        record = records.setdefault(sample["doc_id"], {"answers": [], "scores": {}})
        record["answers"] += answers
        suffix = f", {sample['filter']}" if len(filters) > 1 else ""
        for name in sample["metrics"]:
            record["scores"][name + suffix] = float(sample[name])
    return list(records.values())


def run_backend(flags: argparse.Namespace, backend: str, directory: pathlib.Path) -> dict[str, Any]:
    """Returns what a process of its own computes."""
    output = directory / f"{backend}.json"
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", backend, "--out", str(output)]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(directory / "datasets"),
        "OMP_NUM_THREADS": "1",
        "JAX_COMPILATION_CACHE_DIR": tempfile.mkdtemp(dir=directory),
    }
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    return json.loads(output.read_text())


def print_tables(rounds: list[dict[str, dict[str, Any]]]) -> None:
    """Prints scores and agreement, then speed and memory of each round."""
    first = rounds[0]
    print("| task | items | metric | wings | hf | items that differ | answers differ |")
    print("|---|---:|---|---:|---:|---:|---|")
    for name, ours in first["wings"]["tasks"].items():
        pairs = list(zip(ours["items"], first["hf"]["tasks"][name]["items"], strict=True))
        for metric in pairs[0][0]["scores"]:
            scores = [tuple(one["scores"][metric] for one in pair) for pair in pairs]
            wings, hf = (sum(column) for column in zip(*scores, strict=True))
            changed = sum(a != b for a, b in scores)
            print(
                f"| {name} | {len(pairs)} | {metric} | {wings:g} | {hf:g} | {changed} "
                f"| {answer_difference(pairs)} |"
            )

    print("\n| round | task | wings items/s | hf items/s | ratio | on the clock |")
    print("|---:|---|---:|---:|---:|---:|")
    for number, one in enumerate(rounds, start=1):
        for name in one["wings"]["tasks"]:
            runs = [one[backend]["tasks"][name] for backend in BACKENDS]
            rates = [len(run["items"]) / run["cpu"] for run in runs]
            clock = runs[1]["clock"] / runs[0]["clock"]
            ratio = rates[0] / rates[1]
            print(
                f"| {number} | {name} | {rates[0]:.2f} | {rates[1]:.2f} | {ratio:.2f} "
                f"| {clock:.2f} |"
            )

    print("\n| round | wings peak GiB (loaded) | hf peak GiB (loaded) |\n|---:|---:|---:|")
    for number, one in enumerate(rounds, start=1):
        cells = [
            f"{one[name]['peak_gib']:.2f} ({one[name]['loaded_gib']:.2f})" for name in BACKENDS
        ]
        print(f"| {number} | {cells[0]} | {cells[1]} |")


def answer_difference(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """Returns the largest difference of log-likelihoods, or the number of texts that differ."""
    answers = [(a["answers"], b["answers"]) for a, b in pairs]
    if isinstance(answers[0][0][0], str):
        return f"{sum(a != b for a, b in answers)} texts"
    largest = [max(abs(x - y) for x, y in zip(a, b, strict=True)) for a, b in answers]
    over = sum(value > 1e-2 for value in largest)
    return (
        f"{sorted(largest)[len(largest) // 2]:.1e} median, {max(largest):.1e} most, {over} > 0.01"
    )


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description="lm-eval: wings beside hf")
    add = parser.add_argument
    add("--checkpoint", type=pathlib.Path, required=True, help="wings_jax checkpoint")
    add("--hf", type=pathlib.Path, required=True, help="the same model for transformers")
    add("--data-root", type=pathlib.Path, required=True, help="data sets")
    add("--tasks", default="piqa,openbookqa", help="default: %(default)s")
    add("--limit", type=int, help="use only the first items of the tasks in --limited")
    add("--limited", default="gsm8k,mbpp", help="tasks that --limit is for; default: %(default)s")
    add("--batch-size", type=int, default=16, help="default: %(default)s")
    add("--rounds", type=int, default=1, help="default: %(default)s")
    add("--only", choices=BACKENDS, help="run one model, for --out; no tables")
    add("--core", type=int, default=0, help="core that runs use, of those of this process")
    add("--worker", choices=BACKENDS, help=argparse.SUPPRESS)
    add("--out", type=pathlib.Path, help="also write every answer to this JSON file")
    return parser


def main() -> None:
    """Runs both backends in turn and prints the tables."""
    flags = make_parser().parse_args()
    flags.tasks, flags.limited = flags.tasks.split(","), flags.limited.split(",")
    if flags.worker:
        flags.out.write_text(json.dumps(evaluate_tasks(flags)))
        return

    rounds = []
    with tempfile.TemporaryDirectory() as directory:
        for number in range(flags.rounds):
            # The second is not always the same, as the first may find an idle machine.
            order = BACKENDS if number % 2 == 0 else BACKENDS[::-1]
            names = (flags.only,) if flags.only else order
            rounds.append(
                {name: run_backend(flags, name, pathlib.Path(directory)) for name in names}
            )
    if flags.out:
        flags.out.write_text(json.dumps(rounds))
    if not flags.only:
        print_tables(rounds)


if __name__ == "__main__":
    main()
