"""Runs of benchmarks on small files of MMLU and AI2D."""

from __future__ import annotations

import base64
import io
import pathlib

import numpy as np
from PIL import Image

from wings_jax import evaluate

SUBJECTS = ("up_down", "colors")
OPTIONS = ["top left", "red", "a star", "seven"]


def write_data(root: pathlib.Path, questions: int = 6) -> pathlib.Path:
    """Writes MMLU with two subjects, and AI2D as a TSV whose last image cannot be decoded."""
    for split, count in (("dev", 5), ("test", questions)):
        (root / "mmlu" / split).mkdir(parents=True, exist_ok=True)
        for subject in SUBJECTS:
            rows = ["question,choice0,choice1,choice2,choice3,answer"]
            rows += [f"What is {n} {subject}?,{','.join(OPTIONS)},{n % 4}" for n in range(count)]
            file = root / "mmlu" / split / f"{subject}_{split}.csv"
            file.write_text("\n".join(rows) + "\n", encoding="utf-8")

    stream = io.BytesIO()
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(stream, "PNG")
    image = base64.b64encode(stream.getvalue()).decode()
    rows = ["index\timage\tquestion\tA\tB\tanswer\tcategory"]
    rows += [f"{n}\t{image}\tIs it red {n}?\tyes\tno\tA\tc{n % 2}" for n in range(3)]
    cut = base64.b64encode(stream.getvalue()[:-30] + bytes(200)).decode()
    rows.append(f"3\t{cut}\tUp?\tyes\tno\tB\tc1")
    (root / "AI2D").mkdir(exist_ok=True)
    (root / "AI2D" / "AI2D_TEST.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return root


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["wings evaluate", *map(str, arguments)])
    evaluate.main()


def contents(out: pathlib.Path) -> dict[str, bytes]:
    """Returns the files of a run that do not depend on its time."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "timing.json"]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}
