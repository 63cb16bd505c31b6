"""Writes the table of docs/performance.md: what a step of 1.8B and 7B needs on usual machines.

    python tools/plan_table.py             prints it
    python tools/plan_table.py --write     replaces it in the page; tests compare both

From shapes alone (`wings_jax.planning.estimate`), in seconds.
"""

from __future__ import annotations

import importlib
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # from a clone

from wings_jax import config as config_lib  # noqa: E402
from wings_jax.planning import estimate  # noqa: E402
from wings_jax.planning.memory import USABLE  # noqa: E402
from wings_jax.training.chips import CHIPS, GIB  # noqa: E402
from wings_jax.weights import starting  # noqa: E402

PAGE = ROOT / "docs/performance.md"
BEGIN, END = "<!-- tools/plan_table.py -->\n", "<!-- end -->\n"
MODELS = {"1.8B": "qwen1_5_1_8b", "7B": "qwen1_5_7b"}
# Chips and how many: the smallest usual machines.
MACHINES = (("v5p", 8), ("v5e", 16), ("v6e", 8), ("h100", 8), ("a100-80", 8), ("a100-80", 4))
HEADING = """\
| model, stage | devices | mesh | state | step needs | largest batch | rows | step, s | MFU |
|---|---|---|---:|---:|---:|---:|---|---|
"""


def make_config(stage: str, preset: str) -> config_lib.Config:
    """Returns the config of a stage as accelerators run it: bfloat16."""
    tree = importlib.import_module(f"configs.{stage}").get_config(preset)
    tree.compute_dtype = tree.frozen_dtype = "bfloat16"
    return config_lib.from_config_dict(tree)


def format_row(
    model: str, stage: str, chip_name: str, devices: int, step: estimate.StepEstimate
) -> str:
    """Returns one line of the table."""
    chip, state, times = CHIPS[chip_name], step.state, step.times
    mesh = " x ".join(f"{axis} {size}" for axis, size in step.mesh.items() if size > 1)
    held = state.trained + state.frozen + state.optimizer
    does_fit = step.needed <= chip.memory * USABLE
    cells = [
        f"{model}, {stage[-1]}",
        f"{devices} {chip.name}",
        mesh,
        f"{held / GIB:.1f}",
        f"{step.needed / GIB:.1f}" if does_fit else f"**{step.needed / GIB:.1f}: does not fit**",
        f"{step.largest}" if does_fit else "-",
        f"{step.rows}",
        f"{times.overlapped:.3g}-{times.serial:.3g}",
        f"{times.mfu:.0%}-{times.mfu_serial:.0%}".replace("%-", "-").replace("%", " %"),
    ]
    return f"| {' | '.join(cells)} |\n"


def make_table() -> str:
    """Returns the table as Markdown."""
    lines = []
    for model, preset in MODELS.items():
        for stage in ("stage2", "stage1"):
            config = make_config(stage, preset)
            arch = starting.resolve_arch(config.model)
            state = estimate.abstract_state(config, arch)
            for name, devices in MACHINES:
                step = estimate.estimate_step(config, arch, state, CHIPS[name], devices)
                lines.append(format_row(model, stage, name, devices, step))
    return HEADING + "".join(lines)


def main() -> None:
    """Prints the table, or writes it into the page."""
    table = make_table()
    if "--write" not in sys.argv:
        print(table, end="")
        return

    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    PAGE.write_text(before + BEGIN + table + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
