"""The examples run: the notebook cell by cell, and fine-tuning on a handful of records."""

from __future__ import annotations

import base64
import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tiny_data
from PIL import Image

from wings_jax.scenes import dataset

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "ask_and_analyze.ipynb"
# Runs the code cells of a notebook in one namespace, as Jupyter does.
RUN_CELLS = """
import json, sys
namespace = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), sys.argv[1], "exec"), namespace)
"""

pytestmark = pytest.mark.slow


def run_python(*arguments: object, cwd: pathlib.Path, **environment: str) -> str:
    """Returns what `python ARGUMENTS` prints; fails with its error output."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_notebook_runs_without_a_checkpoint(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    few = dataset.SceneSettings(pictures=64, turns=2, replay=8, test_each=4)
    dataset.write_scenes(tmp_path / "runs" / "scenes", few)
    printed = run_python("-c", RUN_CELLS, NOTEBOOK, cwd=tmp_path, WINGS_EXAMPLE_STEPS="1")
    assert printed.count("right answer:") >= 12  # 7 kinds of image questions, and text
    assert "Attention shift over layers (rows: all" in printed
    assert (tmp_path / "runs" / "stage2" / "checkpoints" / "1").is_dir()


def test_notebook_has_stored_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]

    (plot,) = code[-1]["outputs"]
    image = Image.open(io.BytesIO(base64.b64decode(plot["data"]["image/png"])))
    assert image.width > 600
    assert NOTEBOOK.stat().st_size < 200_000


def test_fine_tuning_on_own_records(tmp_path):
    (tmp_path / "images").mkdir()
    random = np.random.default_rng(0)
    records = []
    for number in range(6):
        pixels = random.integers(0, 256, (24, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        turns = tiny_data.turns("<image>\nWhich number?", f"Number {number}.")
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    records.append({**records[0], "id": "lost", "image": "lost.png"})
    data = tiny_data.write_json(tmp_path / "mine.json", records)

    script = ROOT / "examples" / "finetune_llava_json.py"
    arguments = [script, data, "--images", "images", "--out", "out", "--steps", 2]
    small = ["--batch-size", 2, "--sequence-length", 64, "--skip-bad"]
    printed = run_python(*arguments, *small, cwd=tmp_path)
    assert "7 samples, 1 bad" in printed
    assert "question: Which number?\nanswer:" in printed
    for stage in ("stage1", "stage2"):
        config = json.loads((tmp_path / "out" / stage / "config.json").read_text())
        assert config["data"]["sources"]["mine"]["path"] == str(data)


def test_fine_tuning_stops_at_bad_records(tmp_path):
    data = tiny_data.write_json(tmp_path / "bad.json", [{"id": "1", "conversations": "text"}])
    script = ROOT / "examples" / "finetune_llava_json.py"
    finished = subprocess.run(
        [sys.executable, script, data], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 1
    assert "1 samples, 1 bad" in finished.stdout
    assert not (tmp_path / "runs").exists()
