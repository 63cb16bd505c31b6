"""`evaluate iit build` writes a manifest, `evaluate iit --manifest` runs its conversations."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Mapping, Sequence

from wings_jax import distributed, files, formatting
from wings_jax.errors import UserError
from wings_jax.evaluation import models, tasks
from wings_jax.evaluation.benchmarks import command, model_runs, runner, suitability, tables
from wings_jax.evaluation.benchmarks.journals import MemoryStore
from wings_jax.evaluation.benchmarks.options import BenchmarkOptions
from wings_jax.evaluation.benchmarks.record import LETTERS, Benchmark, DataSet, Item, Prompt
from wings_jax.evaluation.benchmarks.results import BenchmarkResult
from wings_jax.evaluation.benchmarks.runner import BenchmarkTask
from wings_jax.evaluation.interleaved import (
    conversation,
    embedding,
    manifest,
    pool,
    report,
    selection,
)
from wings_jax.evaluation.interleaved.conversation import HISTORIES, Turn
from wings_jax.evaluation.interleaved.manifest import Manifest
from wings_jax.inference.generator import Generator

ANCHORS = {"en": 500, "zh": 100}  # of each modality
PROTOCOLS = ("letter", "generate")


def build_manifest(
    out: pathlib.Path,
    data_root: pathlib.Path,
    *,
    sources: Sequence[str] | None = None,
    seed: int = 0,
    anchors: Mapping[str, int] | None = None,
    embedder: str = "auto",
) -> Manifest:
    """Writes and returns a manifest of conversations made of the data sets below a directory.

    Args:
      sources: names of benchmarks, None for those of the paper that are there.
      anchors: language -> how many text and how many image questions are scored.

    Raises:
      UserError: there are no data sets, or a file is wrong or cannot be written.
    """
    files.check_writable(out.parent, "--out")
    name = embedding.choose_embedder(embedder)

    # Without --sources, benchmarks whose files are missing are left out and printed.
    items, missing = pool.read_pool(sources or pool.SOURCES, data_root, is_default=sources is None)
    for line in missing:
        print(f"left out: {line}")

    # A language with too few text questions has no selections.
    counts = ANCHORS if anchors is None else anchors
    selections = [
        found
        for language, count in counts.items()
        for found in selection.select_language(items, language, count, embedder=name, seed=seed)
    ]
    if not selections:
        raise UserError(
            f"--data-root: {data_root} has too few text questions of {', '.join(pool.SOURCES)}"
        )

    made = manifest.make_manifest(
        selections,
        seed=seed,
        embedder=name,
        version=embedding.embedder_version(name),
        sources=sorted({item.source for item in items}),
    )

    manifest.write_manifest(out, made)
    print(describe(made))
    print(f"written: {out}")
    return made


def describe(made: Manifest) -> str:
    """Returns a table of how many questions a manifest has of each source."""
    counts = collections.Counter(
        (entry.language, entry.modality, report.source_of(entry.anchor.uid))
        for entry in made.entries
    )

    cells: list[Sequence[str]] = [("language", "modality", "source", "scored questions")]
    cells += [(*key, str(count)) for key, count in sorted(counts.items())]
    return f"{made.embedder} ({made.embedder_version})\n{formatting.text_table(cells)}"


def iit_benchmark(history: str) -> Benchmark:
    """Returns IIT with one kind of earlier answers as a benchmark. Raises UserError."""
    if history not in HISTORIES:
        raise UserError(f"--history: no history {history!r}; there are {', '.join(HISTORIES)}")

    # There are no files to search: the items are made of a manifest.
    return Benchmark(
        name=f"iit_{history}",
        title=f"Interleaved conversations (T: text, V: image), earlier answers: {history}",
        kind="choice",
        modality="image",
        language="en",
        files=(),
        prompts={
            "ll": Prompt("{question}", "{letter}", chat=True),
            "generate": Prompt("{question}", chat=True, extraction="option"),
        },
        split="test",
        headline="letter",
        grouping="setting",
        average="macro",
        source="the data sets that the manifest names",
        license="those of the data sets",
        notes="The last question of each conversation is scored; the mean of the six settings is "
        "the headline.",
        in_paper=False,
    )


def read_turns(
    path: pathlib.Path, data_root: pathlib.Path, *, is_shuffled: bool
) -> dict[str, list[Turn]]:
    """Returns anchor -> its companions and itself as turns.

    Raises:
      UserError: the manifest is damaged, or the files have not what it was built from.
    """
    made = manifest.read_manifest(path)
    items, _ = pool.read_pool(made.sources, data_root)

    # By hash, as another form of a data set may have other identifiers.
    finder = manifest.ItemFinder(items)

    turns = {}
    for number, entry in enumerate(made.entries):
        # The control has random questions in place of the related ones.
        before = entry.shuffled if is_shuffled else entry.companions
        turns[conversation.anchor_name(number, entry)] = [
            conversation.make_turn(finder.find(wanted), wanted)
            for wanted in (*before, entry.anchor)
        ]
    return turns


def make_items(
    turns: Mapping[str, Sequence[Turn]], answers: Mapping[tuple[str, str], Sequence[str]]
) -> list[Item]:
    """Returns every anchor in each of its settings.

    Args:
      answers: (anchor, setting) -> what was answered before; the true answers where it is missing.
    """
    items = []
    for anchor, of_anchor in turns.items():
        for setting in conversation.settings_of(of_anchor[-1].item.modality):
            # An anchor with few companions lacks the longer settings.
            if len(setting) > len(of_anchor):
                continue

            # The turns next to the anchor, whose questions are closest to its own.
            used = of_anchor[len(of_anchor) - len(setting) :]
            true_answers = [turn.letter for turn in used[:-1]]
            earlier = answers.get((anchor, setting), true_answers)
            items.append(conversation.make_conversation(anchor, setting, used, earlier))
    return items


def make_conversations(
    benchmark: Benchmark,
    turns: Mapping[str, Sequence[Turn]],
    answers: Mapping[tuple[str, str], Sequence[str]],
    path: pathlib.Path,
    options: BenchmarkOptions,
) -> BenchmarkTask:
    """Returns the conversations of a manifest as a task, with the answers of `make_items`."""
    data = DataSet(make_items(turns, answers), (), (path,), manifest.FORMAT)
    protocols = tuple(options.protocols or PROTOCOLS)
    return command.make_task(benchmark, data, BenchmarkOptions(None, protocols=protocols))


def evaluate_manifest(
    lazy_models: Sequence[models.LazyModel],
    path: pathlib.Path,
    options: BenchmarkOptions,
    *,
    history: str = "gold",
) -> None:
    """Prints and writes the scores of every model on the conversations of a manifest.

    Raises:
      UserError: the manifest or its data are missing or differ, do not fit a model, or a result
        cannot be written.
    """
    benchmark = iit_benchmark(history)
    if options.data_root is None:
        raise UserError("--data-root is missing: the directory with the data sets of --manifest")
    with distributed.together():
        if options.out:
            files.check_writable(options.out, "--out")
        turns = read_turns(path, options.data_root, is_shuffled=history == "shuffled")

    # The limit counts anchors: each one that is used stays in all of its settings.
    if options.limit:
        names = list(turns)
        kept = [names[index] for index in tasks.spread_indices(len(names), options.limit)]
        turns = {name: turns[name] for name in kept}

    # Models are loaded one after the other, as several may not fit in memory.
    found: list[BenchmarkResult] = []
    for model in lazy_models:
        generator, model_hash = model_runs.open_generator(model, options.rows)

        # Conversations with the true answers are as long as those with the model's own, which are
        # asked for only if all fits.
        task = make_conversations(benchmark, turns, {}, path, options)
        suitability.check_task(model.name, task, generator)
        if history == "model":
            answers = ask_companions(generator, turns, benchmark, model.name)
            task = make_conversations(benchmark, turns, answers, path, options)
        result = model_runs.run_task(model, generator, model_hash, task, options)
        del generator
        if result is not None:
            found.append(result)

    if found:
        print_report(found, options.out)


def print_report(found: Sequence[BenchmarkResult], out: pathlib.Path | None) -> None:
    """Prints the scores by setting, by source, and the differences between settings."""
    name = found[0].benchmark.name
    by_model = {result.model: result.lines for result in found}
    text = report.text_report(by_model)

    print(tables.text_report({name: found}))
    protocol = found[0].headline_protocol
    print(formatting.text_table(tables.group_cells(found, protocol)))
    print(f"\n{text}")

    if out:
        paths = tables.write_report(out, {name: found})
        paths.append(files.write_text(out / f"{name}.txt", text + "\n"))
        print("\nwritten: " + ", ".join(map(str, paths)))


def ask_companions(
    generator: Generator,
    turns: Mapping[str, Sequence[Turn]],
    benchmark: Benchmark,
    title: str,
) -> dict[tuple[str, str], list[str]]:
    """Returns (anchor, setting) -> the letters that the model itself gives before the last turn.

    First every companion that begins a conversation is asked, then those that follow it.
    """
    # Any companion can begin a conversation: each is asked alone.
    first: list[Item] = []
    for anchor, of_anchor in turns.items():
        first += [
            conversation.make_conversation(f"{anchor}/{position}", "T", [turn], [])
            for position, turn in enumerate(of_anchor[:-1])
        ]
    letters = _ask_letters(generator, benchmark, first, f"{title}: first turns")

    # The second companion is asked after the model's own answer to the first.
    second = []
    for anchor, of_anchor in turns.items():
        if len(of_anchor) > 2:
            first_answer = letters[f"{anchor}/0/T"]
            companions = list(of_anchor[:-1])
            second.append(conversation.make_conversation(anchor, "TT", companions, [first_answer]))
    letters |= _ask_letters(generator, benchmark, second, f"{title}: second turns")

    # In a setting of two turns, only the companion next to the anchor precedes it.
    answers: dict[tuple[str, str], list[str]] = {}
    for anchor, of_anchor in turns.items():
        last = len(of_anchor) - 2  # the companion next to the anchor
        for setting in conversation.settings_of(of_anchor[-1].item.modality):
            if len(setting) == 2 <= len(of_anchor):
                answers[anchor, setting] = [letters[f"{anchor}/{last}/T"]]
            if len(setting) == 3 <= len(of_anchor):
                answers[anchor, setting] = [letters[f"{anchor}/0/T"], letters[f"{anchor}/TT"]]
    return answers


def _ask_letters(
    generator: Generator, benchmark: Benchmark, items: Sequence[Item], title: str
) -> dict[str, str]:
    """Returns item -> the letter that the model finds most likely."""
    if not items:
        return {}

    task = BenchmarkTask(benchmark, DataSet(items, (), (), manifest.FORMAT), ("letter",), 0)
    # These answers stay in memory: a resumed run computes them again.
    store = MemoryStore()
    runner.run_task(generator, task, store, title)
    return {
        line["id"]: LETTERS[line["ll"]["chosen"]["letter"]]
        for line in runner.collect_lines(task, store.answers)
    }
