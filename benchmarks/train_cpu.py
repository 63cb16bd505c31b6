"""CPU-seconds of a training step on one thread, beside an earlier commit and a Qwen2 in torch.

    python benchmarks/train_cpu.py [--slots=512,1024,2048] [--stages=1,2] [--remat=none,full]
                                   [--against=COMMIT] [--repeat=5] [--plot=FILE.png]

A Wings of 13 M parameters (hidden 256, 8 layers, 8 heads, FFN 688, vocabulary 8192, rank 64) in
float32 with AdamW, one row with an image of 64 slots. Each model is a process of its own, and they
take turns step by step, so that all of them run under the same load of the machine:

    wings    this clone
    before   the commit of --against, from a temporary worktree
    torch    where it is installed: a Qwen2 of the same size, without learners and images

Shown are medians of the processor time of a step, which other processes disturb less than the
clock, the quotients, and the peak memory of each process, compilation included. `--plot` draws the
times as bars.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # from a clone

from wings_jax import files  # noqa: E402

WORKER = ROOT / "benchmarks" / "train_cpu_worker.py"
ONE_THREAD = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "OMP_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
}
WARM_UP = 2  # steps that are not counted
LABELS = {"wings": "Wings", "before": "before", "torch": "Qwen2 in torch, no learners"}


class Worker:
    """A process that runs one model's steps."""

    def __init__(self, model: str, root: pathlib.Path, arguments: Sequence[str]):
        environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(root)}
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), model, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def step(self) -> Mapping[str, float]:
        """Runs one step and returns its figures."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


@contextlib.contextmanager
def checked_out(commit: str | None) -> Iterator[pathlib.Path | None]:
    """A temporary worktree of a commit; None without one."""
    if not commit:
        yield None
        return
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "clone"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(path), commit], check=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True)


def measure(
    roots: Mapping[str, pathlib.Path], arguments: Sequence[str], repeat: int
) -> dict[str, tuple[float, float]]:
    """Returns, by model, the median CPU-seconds of a step and the peak memory in MiB."""
    workers = {
        name: Worker("torch" if name == "torch" else "wings", root, arguments)
        for name, root in roots.items()
    }
    answers: dict[str, list[Mapping[str, float]]] = {name: [] for name in workers}
    try:
        for turn in range(WARM_UP + repeat):
            for name, worker in workers.items():
                answer = worker.step()
                if turn >= WARM_UP:
                    answers[name].append(answer)
    finally:
        for worker in workers.values():
            worker.close()

    return {
        name: (statistics.median(a["seconds"] for a in some), some[-1]["peak"])
        for name, some in answers.items()
    }


def plot(path: str, rows: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
    """Draws CPU-seconds by case as bars, one for each model, with the peak memory above."""
    from matplotlib import figure  # takes seconds to import

    drawing = figure.Figure(figsize=(1.5 + 1.7 * len(rows), 4), layout="constrained")
    ax = drawing.subplots()
    for offset, (name, label) in enumerate(LABELS.items()):
        places = [i for i, results in enumerate(rows.values()) if name in results]
        results = [some[name] for some in rows.values() if name in some]
        if not results:
            continue
        bars = ax.bar(
            [i + 0.27 * (offset - 1) for i in places],
            [seconds for seconds, _ in results],
            width=0.25,
            label=label,
        )
        ax.bar_label(bars, [f"{s:.2f} s\n{mib / 1024:.1f} GiB" for s, mib in results], fontsize=7)

    ax.set_xticks(range(len(rows)), [case.replace(", ", "\n") for case in rows], fontsize=8)
    ax.set_xlabel("slots, stage, remat")
    ax.set_ylabel("CPU-seconds per step")
    ax.margins(y=0.12)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.02))
    with files.replacing(pathlib.Path(path)) as temporary:
        drawing.savefig(temporary, dpi=120, format="png")


def print_row(case: str, results: Mapping[str, tuple[float, float]]) -> None:
    """Prints CPU-seconds, quotients and memory of one case."""
    seconds = results["wings"][0]
    cells = [case, f"{seconds:.3f}"]
    for name in ("before", "torch"):
        other = results.get(name)
        cells += [f"{other[0]:.3f}", f"{seconds / other[0]:.2f}"] if other else ["-", "-"]
    peaks = [f"{results[name][1]:.0f}" for name in ("wings", "before", "torch") if name in results]
    print(f"| {' | '.join(cells)} | {' / '.join(peaks)} |", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--slots", default="512,1024,2048")
    parser.add_argument("--stages", default="2")
    parser.add_argument("--remat", default="none")
    parser.add_argument("--against", metavar="COMMIT", help="an earlier commit of this clone")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--plot", metavar="FILE.png", help="where the figure is written")
    flags = parser.parse_args()

    print("| slots, stage, remat | wings | before | wings / before | torch | wings / torch | MiB |")
    print("|---|---|---|---|---|---|---|")
    cases = itertools.product(
        flags.slots.split(","), flags.stages.split(","), flags.remat.split(",")
    )
    rows = {}
    with checked_out(flags.against) as before:
        for slots, stage, remat in cases:
            roots = {"wings": ROOT} | ({"before": before} if before else {})
            # The Qwen2 trains all of its parameters, as stage 2 does.
            if stage == "2" and importlib.util.find_spec("torch"):
                roots["torch"] = ROOT
            arguments = [f"--slots={slots}", f"--stage={stage}", f"--remat={remat}"]
            case = f"{slots}, {stage}, {remat}"
            rows[case] = measure(roots, arguments, flags.repeat)
            print_row(case, rows[case])
    if flags.plot:
        plot(flags.plot, rows)


if __name__ == "__main__":
    main()
