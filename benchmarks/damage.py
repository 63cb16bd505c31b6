"""Damages the newest checkpoint of a run in many ways; resumes from it and loads it for inference.

    python benchmarks/damage.py [--scale 1.0] [--seed 0] [--only TEXT] [--out FILE.json]

A tiny run has the steps 3 and 6. Step 6 is damaged, each time in a fresh copy of the workdir:

    truncated     each kind of file at 10 offsets, spread from 0 bytes to one byte less
    flipped bit   20 random bits in each kind of file
    deleted       each file, each directory of an item, everything (an empty directory of a step)

Files whose values are all that counts, of arrays and of JSON, get all of these, the others a fifth
of them; `--scale` multiplies both. Results for each use:

    noticed    one line that names the step (and, for a resumed run, the step before was used)
    harmless   every array, the config and the tokenizer are bitwise those that were saved: bytes
               that nothing reads, or that are there twice
    not read   inference does not read the optimizer's state
    SILENT     other values were used without a word
    CRASH      an error of another kind

Printed is a table; the exit status is 1 if anything was silent or crashed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import pathlib
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # from a clone

import jax
import numpy as np
import tqdm

from configs import stage1
from wings_jax import checkpoint
from wings_jax import config as config_lib
from wings_jax.errors import UserError
from wings_jax.scenes import dataset
from wings_jax.training import loop, start, state

STEPS = (3, 6)
TRUNCATIONS, FLIPS = 10, 20
# Kinds of files that get the whole number of damages.
VALUES = ("params/d", "opt_state/d", "meta/metadata", "tokenizer/metadata")
RESULTS = ("noticed", "harmless", "not read", "SILENT", "CRASH")


@dataclasses.dataclass(frozen=True)
class Damage:
    """One way to damage a step."""

    kind: str
    """truncated, flipped bit or deleted."""
    file: str
    """Kind of the file or directory: its path with d/HASH as d, and process directories as one."""
    path: str
    """Path below the step."""
    apply: Callable[[pathlib.Path], Any]
    """Damages the file at this path."""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=float, default=1.0, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--only", default="", metavar="TEXT", help="only files whose kind has it")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE.json")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="wings-damage-") as directory:
        rows = run(arguments, pathlib.Path(directory))

    print(format_table(rows))
    failed = [row for row in rows if {row["resume"], row["inference"]} & {"SILENT", "CRASH"}]
    for row in failed:
        print(f"\n{row['kind']} {row['path']} ({row['detail']})")
    print(f"\n{len(rows)} damages, {len(failed)} silent or crashed (seed {arguments.seed})")
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(bool(failed))


def run(arguments: argparse.Namespace, root: pathlib.Path) -> list[dict[str, str]]:
    """Returns a row per damage."""
    config = make_config(root)
    expected = train(config, root / "whole")
    step = root / "whole" / "checkpoints" / str(STEPS[-1])
    damages = list_damages(step, random.Random(arguments.seed), arguments.scale)
    damages = [damage for damage in damages if arguments.only in damage.file]

    rows = []
    for number, damage in enumerate(tqdm.tqdm(damages, desc="damages", disable=None)):
        # A new name each time: what is read of a step is remembered by its path.
        workdir = root / f"copy{number}"
        shutil.copytree(root / "whole", workdir)
        damage.apply(workdir / "checkpoints" / str(STEPS[-1]) / damage.path)

        loaded, load_detail = try_inference(workdir, damage, expected)
        resumed, resume_detail = try_resume(config, workdir, expected)
        detail = f"inference: {load_detail}; resume: {resume_detail}"
        rows.append(
            {
                "kind": damage.kind,
                "file": damage.file,
                "path": damage.path,
                "resume": resumed,
                "inference": loaded,
                "detail": detail,
            }
        )
        shutil.rmtree(workdir)
    return rows


def make_config(root: pathlib.Path) -> config_lib.Config:
    """Returns the config of a run of a few steps on a few scenes."""
    scenes = dataset.write_scenes(
        root / "scenes", dataset.SceneSettings(pictures=16, turns=1, replay=4, test_each=2)
    )
    tree = stage1.get_config()
    with tree.unlocked():
        tree.data.scenes = ""
        tree.data.sources.scenes.path = str(scenes / "train_stage1.json")
        tree.data.sources.scenes.images = str(scenes / "images")
        tree.data.threads = 1
        tree.model.rank = 4
        tree.batch_size, tree.steps, tree.checkpoint_every = 2, STEPS[-1], STEPS[0]
    return config_lib.from_config_dict(tree)


def train(config: config_lib.Config, workdir: pathlib.Path) -> dict[int, dict[str, Any]]:
    """Trains, and returns what each step has to give: the state, and what inference loads."""
    with contextlib.redirect_stdout(io.StringIO()):
        ready = start.set_up(config, workdir)
        with jax.set_mesh(ready.mesh):
            loop.train(ready)

        # Each step by itself, as a run would resume from it.
        expected = {}
        for number in STEPS:
            copy = workdir.with_name(f"expected{number}")
            shutil.copytree(workdir, copy)
            for other in STEPS:
                if other > number:
                    shutil.rmtree(copy / "checkpoints" / str(other))
            expected[number] = {"resume": read_state(config, copy), "inference": read_model(copy)}
            shutil.rmtree(copy)
    return expected


def read_state(config: config_lib.Config, workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns every array of the state that a run would resume with."""
    ready = start.set_up(config, workdir)
    params, opt_state = jax.device_get(state.to_checkpoint(ready.state))
    ready.writer.close()
    return {**params, **checkpoint.flatten_state(opt_state)}


def read_model(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns all that inference loads."""
    loaded = checkpoint.load(workdir)
    flat = {path: np.asarray(x) for path, x in checkpoint.tree.flatten(loaded.params).items()}
    # Where the copy is has no part in it.
    return {
        **flat,
        "config": loaded.config,
        "arch": loaded.arch,
        "step": loaded.step,
        "eos_ids": loaded.eos_ids,
        "tokenizer": checkpoint.read_tokenizer_files(loaded.directory),
        "hf_config": checkpoint.read_hf_config(loaded.directory),
    }


def is_same(value: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Returns whether two dicts have the same keys and bitwise the same values."""
    if value.keys() != expected.keys():
        return False
    return all(
        np.array_equal(x, expected[key]) if isinstance(x, np.ndarray) else x == expected[key]
        for key, x in value.items()
    )


def try_inference(
    workdir: pathlib.Path, damage: Damage, expected: dict[int, dict[str, Any]]
) -> tuple[str, str]:
    """Returns the result of loading the newest step, and its details."""
    try:
        value = read_model(workdir)
    except UserError as error:
        message = str(error)
        is_line = "\n" not in message and f"checkpoints/{STEPS[-1]}" in message
        is_line = is_line and f"checkpoints/{STEPS[0]}" in message  # the step before
        return "noticed" if is_line else "CRASH", message
    except Exception as error:  # counted and shown
        return "CRASH", f"{type(error).__name__}: {error}"

    if not is_same(value, expected[STEPS[-1]]["inference"]):
        return "SILENT", "other values"
    return ("not read" if damage.file.startswith("opt_state") else "harmless"), "same values"


def try_resume(
    config: config_lib.Config, workdir: pathlib.Path, expected: dict[int, dict[str, Any]]
) -> tuple[str, str]:
    """Returns the result of resuming the run, and its details."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            value = read_state(config, workdir)
    except Exception as error:  # counted and shown: here the step before has to be used
        return "CRASH", f"{type(error).__name__}: {error}"

    lines = [line for line in printed.getvalue().splitlines() if " is damaged (" in line]
    if not lines:
        is_harmless = is_same(value, expected[STEPS[-1]]["resume"])
        return ("harmless" if is_harmless else "SILENT"), printed.getvalue()[-200:]

    is_named = len(lines) == 1 and f"checkpoints/{STEPS[-1]} is damaged" in lines[0]
    is_before = is_same(value, expected[STEPS[0]]["resume"])
    return ("noticed" if is_named and is_before else "CRASH"), lines[0]


def list_damages(step: pathlib.Path, rng: random.Random, scale: float) -> Iterator[Damage]:
    """Yields the damages of a step."""
    names = sorted(str(path.relative_to(step)) for path in step.rglob("*") if path.is_file())
    by_kind = collections.defaultdict(list)
    for name in names:
        by_kind[file_kind(name)].append(name)

    for kind, members in by_kind.items():
        share = scale * (1.0 if kind in VALUES else 0.2)
        # The largest file has most of the values.
        largest = max(members, key=lambda name: (step / name).stat().st_size)
        size = (step / largest).stat().st_size
        if size:
            offsets = np.linspace(0, size - 1, max(2, round(TRUNCATIONS * share))).astype(int)
            for offset in sorted(set(offsets.tolist())):
                yield Damage("truncated", kind, largest, lambda path, n=offset: truncate(path, n))

            # Everywhere in the files of this kind.
            for _ in range(max(2, round(FLIPS * share))):
                name = rng.choices(members, [(step / name).stat().st_size for name in members])[0]
                place = rng.randrange(8 * (step / name).stat().st_size)
                yield Damage("flipped bit", kind, name, lambda path, n=place: flip(path, n))

        for name in members:
            yield Damage("deleted", kind, name, pathlib.Path.unlink)

    for item in sorted(path.name for path in step.iterdir() if path.is_dir()):
        yield Damage("deleted", item, item, shutil.rmtree)
    yield Damage("deleted", "step (empty directory)", "", empty)


def file_kind(name: str) -> str:
    """Returns what the file is, whatever its random name.

    >>> file_kind("params/ocdbt.process_0/d/0a1b"), file_kind("params/d/0a1b")
    ('params/d', 'params/d')
    """
    return re.sub(r"/d/\w+$", "/d", name.replace("ocdbt.process_0/d/", "d/"))


def truncate(path: pathlib.Path, size: int) -> None:
    """Shortens a file to so many bytes."""
    path.write_bytes(path.read_bytes()[:size])


def flip(path: pathlib.Path, bit: int) -> None:
    """Changes one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def empty(path: pathlib.Path) -> None:
    """Deletes everything in a directory."""
    shutil.rmtree(path)
    path.mkdir()


def format_table(rows: list[dict[str, str]]) -> str:
    """Returns a Markdown table: a row per kind of damage and file."""
    header = " | ".join(f"{use} {name}" for use in ("resume:", "inference:") for name in RESULTS)
    lines = [f"| damage | file | tried | {header} |", "|---|---|---:|" + "---:|" * 10]

    groups = collections.defaultdict(list)
    for row in rows:
        groups[row["kind"], row["file"]].append(row)
    for (kind, file), members in groups.items():
        counts = [
            sum(row[use] == name for row in members)
            for use in ("resume", "inference")
            for name in RESULTS
        ]
        cells = " | ".join(str(count or "") for count in counts)
        lines.append(f"| {kind} | {file} | {len(members)} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
