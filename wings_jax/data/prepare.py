"""Writes data and its images as array_record shards, for fast random access by sample number.

    python -m wings_jax.data.prepare FILE.json --images DIR --out DIR [--split train] [--shards N]
    python -m wings_jax.data.prepare --verify DIR

The layout is that of tensorflow-datasets, so `tfds.builder_from_directory(OUT)` reads it too;
TensorFlow is not needed. Images are the files' bytes, unchanged, so training from the directory
equals training from the JSON.

Shards are written by several processes, each read back before it counts. A run that was ended goes
on with the shards that are missing, and has the same bytes as one that was not. The directory
appears when it is complete, and never replaces another one; in a bucket (gs://) its
`dataset_info.json`, without which it is not read, is written last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from wings_jax import cli, errors, files
from wings_jax.data import dataset_card, parallel, samples, shards, sources
from wings_jax.data import images as image_files

VERSION = "1.0.0"
SHARD_BYTES = 256 << 20  # about so large is a shard, unless their number is given
_PLAN = "prepare.json"  # what is being written, in the directory of an unfinished run
_PROBES = 64  # samples from which the size of all is estimated


def write_dataset(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    images: str | os.PathLike | None = None,
    name: str = "conversations",
    split: str = "train",
    skip_bad: bool = False,
    shard_count: int | None = None,
    workers: int | None = 0,
) -> samples.Tally:
    """Writes the good samples of `path` to the directory `out`; returns the counts of both kinds.

    Args:
      path: a data file or directory of any format.
      out: the directory, local or gs://; an unfinished run of the same settings goes on.
      images: directory that the records' image paths are relative to; by default the file's.
      name: of the data set, in lower case.
      split: of its one split.
      skip_bad: whether bad samples are left out; else the first one is an error.
      shard_count: files; by default as many as are about `SHARD_BYTES` large.
      workers: processes that write shards; 0 for this one alone, None for all cores if there is
        much to write.

    Raises:
      UserError: `out` exists or cannot be written, the file is malformed, the unfinished run has
        other settings, or a sample is bad and `skip_bad` is false. Finished shards stay for the
        next run; if there is none, nothing is left.
    """
    target = files.as_path(out, "--out")
    is_bucket = files.is_url(out)
    work = target if is_bucket else target.with_name(f".{target.name}.partial")

    if (target / dataset_card.INFO if is_bucket else target).exists():
        raise errors.UserError(f"--out {out} exists; remove it or give another directory")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise errors.UserError(f"--name {name!r} must be lower-case letters, digits and _")

    source = sources.open_source(path, images=images)
    count = shard_count or _estimate_shards(source)
    if workers is None:
        workers = parallel.default_workers(len(source))
    job = shards.ShardJob(source, str(work), name, split, min(count, len(source)), skip_bad)

    try:
        _claim(work, job, out)
        finished = _write_shards(job, workers)

        tally = samples.Tally()
        for shard in finished:
            tally.merge(shard.tally)
        # A directory without samples cannot be read.
        if tally.bad == tally.seen:
            raise errors.UserError(f"{path}: nothing to write, {tally.summary()}")

        settings = {"file": str(path), "images": str(images or ""), "skip_bad": skip_bad}
        _complete(work, target, job, finished, settings, tally)
    except OSError as error:
        raise errors.UserError(f"--out {out}: {error.strerror or error}") from error
    finally:
        _remove_if_empty(work)
    return tally


def _estimate_shards(source: sources.SampleSource) -> int:
    """Returns how many shards of about SHARD_BYTES the samples fill, from some of them."""
    count, sizes = len(source), []
    for index in range(0, count, max(1, count // _PROBES)):
        # A bad sample has no size.
        with contextlib.suppress(samples.BadSample):
            sample = source[index]
            text = sum(len(str(turn)) for turn in sample.conversations)
            encoded = [image_files.image_bytes(image) for image in sample.images]
            sizes.append(text + sum(len(content) for content in encoded))

    mean = sum(sizes) / max(1, len(sizes))
    return max(1, round(mean * count / SHARD_BYTES))


def _claim(work: pathlib.Path, job: shards.ShardJob, out: str | os.PathLike) -> None:
    """Notes what is written in `work`. Raises UserError if something else was begun there."""
    plan = {
        "source": job.source.fingerprint,
        "name": job.name,
        "split": job.split,
        "shards": job.count,
        "version": VERSION,
    }

    path = work / _PLAN
    if not path.exists():
        files.write_json(str(path), plan)
        return

    begun = json.loads(path.read_text())
    changed = [
        f"{key}: {begun.get(key)} -> {plan[key]}" for key in plan if begun.get(key) != plan[key]
    ]
    if changed:
        raise errors.UserError(
            f"--out {out}: an unfinished run of other settings or data is in {work} "
            f"({'; '.join(changed)}); remove it, or run with the same"
        )


def _write_shards(job: shards.ShardJob, workers: int) -> list[shards.FinishedShard]:
    """Returns all shards, written by so many processes."""
    chunks = parallel.map_samples(
        shards.write_shard, job, job.count, workers=workers, title="writing shards", chunk=1
    )
    return [shard for _, (shard,) in chunks]


def _complete(
    work: pathlib.Path,
    target: pathlib.Path,
    job: shards.ShardJob,
    finished: Sequence[shards.FinishedShard],
    settings: Mapping[str, Any],
    tally: samples.Tally,
) -> None:
    """Writes the card and the metadata, and makes the directory readable."""
    card = dataset_card.make_card(job.name, job.split, finished, settings, tally)
    files.write_json(str(work / dataset_card.CARD), card)
    files.write_text(str(work / "README.md"), dataset_card.as_markdown(card))

    # Readers look for the last of these files.
    with tempfile.TemporaryDirectory(prefix="wings-") as directory:
        for path in dataset_card.write_metadata(pathlib.Path(directory), job, finished):
            files.write_text(str(work / path.name), path.read_text())

    # What is only of an unfinished run, and temporary files of processes that were ended.
    _remove_directory(work / shards.NOTES)
    (work / _PLAN).unlink()
    for path in work.iterdir():
        if path.name.startswith("."):
            path.unlink()

    if work != target:
        work.rename(target)


def _remove_if_empty(work: pathlib.Path) -> None:
    """Removes what an unfinished run wrote, unless a shard is finished."""
    notes = work / shards.NOTES
    is_unfinished = (work / _PLAN).exists()
    if not is_unfinished or (notes.exists() and any(notes.iterdir())):
        return

    (work / _PLAN).unlink()
    # A directory in a bucket may have had other objects before.
    if not files.is_url(work):
        shutil.rmtree(work)


def _remove_directory(path: Any) -> None:
    if files.is_url(path):
        path.rmtree()
    else:
        shutil.rmtree(path)


def verify(directory: str | os.PathLike, *, workers: int = 0) -> dict[str, Any]:
    """Reads all shards of a prepared directory and returns its card.

    Raises:
      UserError: the directory has no card, or a shard is missing or differs from its card or from
        the data set's own counts; the message names the first ones.
    """
    path = files.as_path(directory, "--verify") / dataset_card.CARD
    try:
        card = json.loads(path.read_text())
        finished = [shards.FinishedShard(**shard, bad={}) for shard in card["shards"]]
    except FileNotFoundError as error:
        raise errors.UserError(
            f"--verify {directory} has no {dataset_card.CARD}: it is not a complete directory of "
            "wings prepare"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise errors.UserError(f"--verify: {path} cannot be read: {error}") from error

    chunks = parallel.map_samples(
        _find_damage,
        (str(directory), finished),
        len(finished),
        workers=workers,
        title="verifying shards",
        chunk=1,
    )
    damage = [f"{finished[number].file} {found}" for number, (found,) in chunks if found]

    # The counts that readers use.
    info = json.loads((path.parent / dataset_card.INFO).read_text())
    lengths = [int(length) for length in info["splits"][0]["shardLengths"]]
    if lengths != [shard.samples for shard in finished]:
        damage.append(f"{dataset_card.INFO} has other numbers of samples")

    if damage:
        listed = "; ".join(damage[:3])
        raise errors.UserError(
            f"--verify {directory}: {len(damage)} of {len(finished)} shards are damaged: {listed}"
        )
    return card


def _find_damage(shared: tuple[str, Sequence[shards.FinishedShard]], number: int) -> str:
    directory, finished = shared
    return shards.find_damage(directory, finished[number])


def main() -> None:
    """Writes or verifies the directory from the command line."""
    arguments = _parse_args()
    if arguments.verify:
        workers = arguments.workers or 0
        card = verify(arguments.verify, workers=workers)
        print(
            f"{arguments.verify}: {card['samples']:,} samples in {len(card['shards'])} shards are "
            "as they were written"
        )
        return

    tally = write_dataset(
        arguments.file,
        arguments.out,
        images=arguments.images,
        name=arguments.name,
        split=arguments.split,
        skip_bad=arguments.skip_bad,
        shard_count=arguments.shards,
        workers=arguments.workers,
    )

    if tally.bad:
        print(tally.summary(causes=len(samples.CAUSES)), file=sys.stderr)
    print(f"{tally.seen - tally.bad:,} samples written to {arguments.out}")


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=cli.program_name("wings_jax.data.prepare"), description=__doc__.splitlines()[0]
    )
    add_argument = parser.add_argument
    add_argument("file", nargs="?", help="a data file, of any format that training reads")
    add_argument("--images", help="directory of the image paths (default: the file's)")
    add_argument(
        "--out",
        help="directory to write, local or gs://; must not exist. An unfinished run goes on",
    )
    add_argument("--verify", metavar="DIR", help="read a directory and compare it with its card")
    add_argument("--name", default="conversations", help="name of the data set")
    add_argument("--split", default="train", help="name of its one split")
    add_argument(
        "--shards", type=cli.at_least(1), help="files (default: as many as are about 256 MB large)"
    )
    add_argument("--skip-bad", action="store_true", help="leave bad samples out")
    add_argument(
        "--workers",
        type=cli.at_least(0),
        help="processes that share the shards, 0 for none (default: all cores, for 5,000 samples "
        "or more)",
    )
    add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args()

    # Writing and verifying are two commands.
    if arguments.verify and (arguments.file or arguments.out):
        parser.error("--verify takes neither a file nor --out")
    if not arguments.verify and not (arguments.file and arguments.out):
        parser.error("a data file and --out are required, or --verify")
    return arguments


if __name__ == "__main__":
    cli.run_main("python -m wings_jax.data.prepare", main)
