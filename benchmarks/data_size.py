"""The data path at the size of real data: rates, start-up time and memory, on data made here.

    python benchmarks/data_size.py rows open prepared processes plan [--dir DIR] [--scale S]

rows       rows/s at T=2048 with a 640 x 480 JPEG per row, from JSON and files and from prepared
           shards, in turns
open       665,000 LLaVA records in one JSON file: seconds to open it, and the memory that takes
prepared   the same of 1,000,000 prepared samples
processes  check and the survey for packing, in 1 and in 2 processes, in turns
plan       the first and the second start with packing; the plan of 665,000 lengths, and counting
           the images of 665,000 records, which batches by modality need

Every number is the median of `--repeats`; CPU seconds are of all processes together, and are what
to compare on a machine that others use. `--scale=0.01` is a quick try.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import transformers
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # from a clone

from wings_jax import files
from wings_jax.data import (
    dataset_card,
    examples,
    inspection,
    mixture,
    packing,
    pipeline,
    prepare,
    samples,
    settings,
    shards,
    sources,
)
from wings_jax.model import presets
from wings_jax.weights import starting

RECORDS, PREPARED = 665_000, 1_000_000
LENGTH = 2048
WORDS = ["the", "of", "in", "on", "image", "man", "woman", "street", "red", "left", "what", "is"]


def main() -> None:
    """Measures the parts that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--dir", default="runs/data_size", help="where the data are written")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of samples")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    directory = pathlib.Path(arguments.dir)
    directory.mkdir(parents=True, exist_ok=True)
    for part in arguments.parts:
        PARTS[part](directory, arguments.scale, arguments.repeats)


def report(name: str, values: dict[str, Any]) -> None:
    """Prints a line of a table."""
    print(f"{name:<34}" + "   ".join(f"{key} {value}" for key, value in values.items()), flush=True)


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of those that it has waited for."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(kind)[:2]) for kind in kinds)


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Returns the wall and the CPU seconds of a call."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    function()
    return time.perf_counter() - wall, cpu_seconds() - cpu


def make_record(number: int, generator: np.random.Generator, image: str) -> dict[str, Any]:
    """Returns a record of the size of LLaVA's: about 1.5 KB, several turns."""
    turns = []
    for turn in range(int(generator.integers(2, 7))):
        words = " ".join(generator.choice(WORDS, int(generator.integers(8, 60))))
        marker = "<image>\n" if image and not turn else ""
        answer = " ".join(generator.choice(WORDS, int(generator.integers(8, 80))))
        turns.append({"from": "human", "value": marker + words})
        turns.append({"from": "gpt", "value": answer})
    return {"id": f"{number:09d}", "conversations": turns} | ({"image": image} if image else {})


def write_photos(directory: pathlib.Path, count: int) -> pathlib.Path:
    """Returns a JSON file of `count` records with a 640 x 480 JPEG each; written once."""
    path = directory / f"photos_{count}.json"
    if path.exists():
        return path

    generator = np.random.default_rng(0)
    records = []
    (directory / "photos").mkdir(exist_ok=True)
    for number in range(count):
        # Smooth noise, which a JPEG of quality 90 stores in about 100 KB, like a photograph.
        small = generator.integers(0, 256, (60, 80, 3), np.uint8)
        image = Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC)
        pixels = np.asarray(image, np.int16) + generator.integers(-12, 13, (480, 640, 3))
        name = f"photos/{number}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(directory / name, quality=90)
        records.append(make_record(number, generator, name))
    files.write_text(path, json.dumps(records))
    return path


def make_recipe(**changes: Any) -> tuple[settings.DataConfig, examples.Recipe]:
    """Returns settings at T=2048 and a recipe with the packaged tokenizer and SigLIP's tower."""
    data = settings.DataConfig(**{"sequence_length": LENGTH, **changes})
    tokenizer = transformers.AutoTokenizer.from_pretrained(starting.base_directory("tiny", "llm"))
    vision = presets.VISION["siglip_so400m_384"]
    return data, examples.make_recipe(data, tokenizer, vision)


def measure_rows(directory: pathlib.Path, scale: float, repeats: int) -> None:
    """Rows of T=2048 with an image of 384 x 384, from files and from prepared shards."""
    count, batch = max(32, int(1024 * scale)), 8
    path = write_photos(directory, count)
    prepared = directory / f"prepared_{count}"
    if not prepared.exists():
        prepare.write_dataset(path, prepared)

    rates: dict[str, list[tuple[float, float]]] = {"JSON and files": [], "prepared": []}
    # In turns, so that other work on the machine meets both.
    for _ in range(repeats):
        for name, source in (("JSON and files", path), ("prepared", prepared)):
            sources_by_name = {"a": settings.SourceConfig(str(source))}
            data, recipe = make_recipe(sources=sources_by_name, threads=2)
            # Timed from the first batch on: later ones are built ahead.
            batches = pipeline.Loader(data, recipe, rows=batch).iterate()
            steps = count // batch

            def read(batches: Any = batches, steps: int = steps) -> None:
                for _ in range(steps):
                    next(batches)

            wall, cpu = timed(read)
            batches.close()
            rates[name].append((steps * batch / wall, steps * batch / cpu))

    for name, measured in rates.items():
        wall, cpu = (statistics.median(values) for values in zip(*measured, strict=True))
        report(f"rows, {name}", {"rows/s": f"{wall:.0f}", "rows per CPU second": f"{cpu:.0f}"})


def measure_open(directory: pathlib.Path, scale: float, repeats: int) -> None:
    """Opening a JSON file of LLaVA's number of records."""
    path = write_llava(directory, int(RECORDS * scale))
    in_process(f"open, {int(RECORDS * scale):,} records, JSON", path, repeats)


def write_llava(directory: pathlib.Path, count: int) -> pathlib.Path:
    """Returns a JSON file of so many records, whose images do not exist; written once."""
    path = directory / f"llava_{count}.json"
    if not path.exists():
        generator = np.random.default_rng(0)
        # A few thousand texts are enough: the reader parses every record in any case.
        texts = [json.dumps(make_record(n, generator, f"{n}.jpg")) for n in range(2000)]
        with files.replacing(path) as temporary, temporary.open("w") as file:
            file.write("[" + ",\n".join(texts[n % 2000] for n in range(count)) + "]")
    return path


def measure_prepared(directory: pathlib.Path, scale: float, repeats: int) -> None:
    """Opening prepared shards of a million samples."""
    count, shard_count = int(PREPARED * scale), 64
    path = directory / f"million_{count}"
    if not path.exists():
        _write_million(path, count, shard_count)
    in_process(f"open, {count:,} samples, prepared", path, repeats)


def _write_million(path: pathlib.Path, count: int, shard_count: int) -> None:
    """Writes shards of one text that is repeated: opening them does not depend on it."""
    from array_record.python import array_record_module
    from tensorflow_datasets.core import example_serializer

    record = make_record(0, np.random.default_rng(0), "")
    example = {"id": record["id"], "images": [], "conversations": record["conversations"]}
    serializer = example_serializer.ExampleSerializer(shards.features().get_serialized_info())
    content = serializer.serialize_example(shards.features().encode_example(example))

    job = shards.ShardJob([None] * count, str(path), "conversations", "train", shard_count, False)
    tally = samples.Tally().as_dict()
    with files.new_directory(path) as temporary:
        finished = []
        for number in range(shard_count):
            name, numbers = job.file(number), job.range(number)
            writer = array_record_module.ArrayRecordWriter(str(temporary / name), "group_size:1")
            for _ in numbers:
                writer.write(content)
            writer.close()
            finished.append(shards.FinishedShard(name, len(numbers), 0, len(numbers), 1, "", tally))

        # The metadata are written beside files of the same names.
        notes = temporary / "notes"
        notes.mkdir()
        for note in dataset_card.write_metadata(notes, job, finished):
            note.rename(temporary / note.name)
        for empty in notes.iterdir():
            empty.unlink()
        notes.rmdir()


def in_process(name: str, path: pathlib.Path, repeats: int) -> None:
    """Opens a source and reads its last sample, each time in a process of its own; reports that."""
    context = multiprocessing.get_context("spawn")
    measured = []
    for _ in range(repeats):
        with context.Pool(1) as pool:
            measured.append(pool.apply(_open, (str(path),)))

    seconds, cpu, memory = (statistics.median(values) for values in zip(*measured, strict=True))
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
    report(
        name,
        {
            "s": f"{seconds:.1f}",
            "CPU s": f"{cpu:.1f}",
            "peak memory": f"{memory / 1e6:.0f} MB",
            "of the files": f"{memory / size:.2f} of {size / 1e9:.2f} GB",
        },
    )


def _open(path: str) -> tuple[float, float, float]:
    """Returns wall and CPU seconds, and how many bytes more than before are used at the peak."""
    import tensorflow_datasets  # noqa: F401 - its import is not a part of opening

    # The peak of the imports before does not count.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    opened: list[Any] = []

    def open_and_read() -> None:
        opened.append(sources.open_source(path))
        opened[0][len(opened[0]) - 1]

    wall, cpu = timed(open_and_read)
    return wall, cpu, _memory("VmHWM") - before


def _memory(field: str) -> int:
    """Returns bytes of this process: VmRSS in use, VmHWM at the peak (Linux)."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def measure_processes(directory: pathlib.Path, scale: float, repeats: int) -> None:
    """Check with images, and the survey of lengths, in one and two processes."""
    path = write_photos(directory, max(32, int(1024 * scale)))
    _, recipe = make_recipe()
    source = sources.open_source(path)

    def check(mixed: Any, workers: int) -> None:
        # A mixture has samples by number, as a source has.
        inspection.inspect_source(mixed, recipe, workers=workers)

    def survey(mixed: Any, workers: int) -> None:
        mixture.measure_mixture(mixed, recipe, workers=workers)

    # Each photograph several times, so that the start of a process (2 CPU seconds) counts little.
    for name, work, copies in (("check", check, 12), ("survey", survey, 60)):
        mixed = mixture.Mixture([source] * copies, ["photos"] * copies)
        measured: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
        for _ in range(repeats):
            for workers in (1, 2):
                measured[workers].append(timed(functools.partial(work, mixed, workers)))

        walls = {n: statistics.median(wall for wall, _ in values) for n, values in measured.items()}
        for workers, values in measured.items():
            cpu = statistics.median(cpu for _, cpu in values)
            rate = f"{len(mixed) / walls[workers]:.0f}"
            speed = f"{walls[1] / walls[workers]:.2f}"
            report(
                f"{name}, {workers} process{'es' * (workers > 1)}",
                {"samples/s": rate, "times 1 process": speed, "CPU s": f"{cpu:.1f}"},
            )


def measure_plan(directory: pathlib.Path, scale: float, repeats: int) -> None:
    """The first and the second start with packing, and the plan of LLaVA's number of samples."""
    path = write_photos(directory, max(32, int(1024 * scale)))
    sources_by_name = {str(n): settings.SourceConfig(str(path)) for n in range(16)}
    data, recipe = make_recipe(packing=True, images_per_row=2, sources=sources_by_name)
    starts: dict[str, list[float]] = {"first": [], "second": []}

    for number in range(repeats):
        cache = directory / f"cache_{time.time_ns()}_{number}"
        for name in starts:
            wall, _ = timed(lambda cache=cache: pipeline.Loader(data, recipe, rows=8, cache=cache))
            starts[name].append(wall)
    values = {f"{name} start, s": f"{statistics.median(v):.2f}" for name, v in starts.items()}
    report(f"packing, {16 * max(32, int(1024 * scale)):,} samples", values)

    # Lengths like those of LLaVA's second stage, 6 % of them without images.
    generator, count = np.random.default_rng(0), int(RECORDS * scale)
    has_image = generator.random(count) > 0.06
    text = np.clip(generator.lognormal(5.5, 0.6, count).astype(int), 20, LENGTH - 730)
    slots, members = text + 729 * has_image, np.arange(count)
    wall, cpu = timed(
        lambda: packing.first_fit(
            members, slots, has_image.astype(int), length=LENGTH, images_per_row=2
        )
    )
    report(f"plan of {count:,} sizes", {"s": f"{wall:.1f}", "CPU s": f"{cpu:.1f}"})

    # What batches by modality need of the data.
    records = mixture.Mixture([sources.open_source(write_llava(directory, count))], ["llava"])
    wall, cpu = timed(lambda: mixture.measure_mixture(records, None, workers=2))
    report(f"images of {count:,} records", {"s": f"{wall:.1f}", "CPU s": f"{cpu:.1f}"})


PARTS = {
    "rows": measure_rows,
    "open": measure_open,
    "prepared": measure_prepared,
    "processes": measure_processes,
    "plan": measure_plan,
}

if __name__ == "__main__":
    main()
