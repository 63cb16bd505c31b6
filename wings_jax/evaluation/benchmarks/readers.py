"""Reads a benchmark from the files that a user has, in whichever of its forms they are.

`FilePattern.reader` is a name of `READERS`; `rewrites` lists the changes of rows that
`FilePattern.options["rewrite"]` may name, `row_items` the other options. Options used here:

rewrite   name of a rewrite of rows
exclude   glob of files that the pattern matches but another form or split owns
labels    where the answers are, if they are in another file:
          {"file": "valid-labels.lst"}: line n is of row n, as column "label"
          {"file": "x.json", "on": "id", "key": "id"}: joined by a column, as column "label"
          ("rows" and "rewrite" are as for the file itself)
          {"file": "coco_{category}.json", "by": "category"}: row n of a category is of line n
index     column that other rows may name in place of their image
"""

from __future__ import annotations

import collections
import fnmatch
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from wings_jax.errors import UserError
from wings_jax.evaluation.benchmarks import image_rewrites, places, rewrites, row_files, row_items
from wings_jax.evaluation.benchmarks.record import Benchmark, DataSet, FilePattern, Item
from wings_jax.evaluation.benchmarks.rewrites import with_values
from wings_jax.evaluation.benchmarks.row_files import Row
from wings_jax.weights import text_files

REWRITES = {**rewrites.REWRITES, **image_rewrites.REWRITES}
MAX_NAMES = 8  # of files or columns in a message


class MissingDataError(UserError):
    """The files of a benchmark are not below --data-root; the message names what was expected."""


class WrongLayoutError(UserError):
    """A benchmark's files exist, but their rows are not in any of its forms."""


def read_data_set(benchmark: Benchmark, data_root: pathlib.Path) -> DataSet:
    """Returns the items of the scored split, and of the split that shots come from.

    Raises:
      MissingDataError: there are no files of a split.
      WrongLayoutError: there are, but with other columns.
      UserError: a file cannot be read, or an answer is none of the options.
    """
    pattern, files = find_files(benchmark, benchmark.split, data_root)
    try:
        items, skipped, label_files = _read_files(pattern, files)
    except MissingDataError as error:  # answers in files of their own
        raise MissingDataError(f"{benchmark.name}: {error}. {_origin(benchmark)}") from error
    if not items:
        raise UserError(f"{benchmark.name}: no questions in {files[0]} ({pattern.form} form)")

    # Solved examples may come from another split, in files of its own.
    shots: Sequence[Item] = ()
    if benchmark.shots.count and benchmark.shots.split:
        shot_pattern, shot_files = find_files(benchmark, benchmark.shots.split, data_root)
        shots, _, shot_labels = _read_files(shot_pattern, shot_files)
        label_files = [*label_files, *shot_files, *shot_labels]

    # Every file that was read counts once in the hash of the data.
    all_files = list(dict.fromkeys([*files, *label_files]))
    return DataSet(items, shots, all_files, pattern.form, skipped, _remarks(benchmark, items))


def _remarks(benchmark: Benchmark, items: Sequence[Item]) -> tuple[str, ...]:
    """Returns what a score of the items does not mean."""
    if benchmark.metric != "circular":
        return ()

    # A question with n options has n rows, a rotation each.
    rows = collections.Counter(item.cluster for item in items)
    short = {item.cluster for item in items if rows[item.cluster] < len(item.options)}
    if not short:
        return ()
    return (
        f"{len(short)} of {len(rows)} questions have fewer rotations than options: the circular "
        "score is too high",
    )


def find_files(
    benchmark: Benchmark, split: str, data_root: pathlib.Path
) -> tuple[FilePattern, list[pathlib.Path]]:
    """Returns the first form of a split whose files exist and have its columns, and the files.

    Raises:
      MissingDataError: no form has files; the message lists the forms and what is there.
      WrongLayoutError: files were found, but in none of the forms.
    """
    if not data_root.is_dir():
        raise MissingDataError(f"--data-root: {data_root} is not a directory")

    forms = [pattern for pattern in benchmark.files if pattern.split == split]
    refused = []

    # In a directory, the first declared form that fits is taken.
    for place in places.find_places(benchmark, data_root):
        for pattern in forms:
            # A wide pattern would also find files of other data sets with the same columns.
            if pattern.pattern.startswith("*") and not place.is_own:
                continue
            files = _matches(place.directory, pattern)
            problem = _layout_problem(pattern, files[0]) if files else ""
            if files and not problem:
                return pattern, files
            if problem and place.is_named:
                refused.append(problem)

    if refused:
        raise WrongLayoutError(f"{benchmark.name}: {refused[0]}")
    raise MissingDataError(_missing_message(benchmark, split, forms, data_root))


def _matches(directory: pathlib.Path, pattern: FilePattern) -> list[pathlib.Path]:
    exclude = pattern.options.get("exclude", "")
    return sorted(
        path
        for path in directory.glob(pattern.pattern)
        if path.is_file() and not (exclude and fnmatch.fnmatch(path.name, exclude))
    )


def _layout_problem(pattern: FilePattern, file: pathlib.Path) -> str:
    """Returns what the first row of a file lacks of a form, "" if it has all columns."""
    raw = next(READERS[pattern.reader](file, pattern.options), None)
    if raw is None:
        return f"{file} has no rows"

    # The message lists the columns of the file, not those that a rewrite adds.
    columns = ", ".join(list(raw.values)[:MAX_NAMES])
    try:
        row = next(iter(_rewritten([raw], pattern)), raw)
    except UserError as error:
        return str(error)

    # Answers from another file are read later: a placeholder has their column.
    row = with_values(row, label=None) if "labels" in pattern.options else row
    missing = row_items.missing_columns(row, pattern)
    missing = [name for name in missing if not name.startswith("label.")]
    if missing:
        return (
            f"{file}: the {pattern.form} form needs column {missing[0]}; its columns are {columns}"
        )
    return ""


def _missing_message(
    benchmark: Benchmark, split: str, forms: Sequence[FilePattern], data_root: pathlib.Path
) -> str:
    place = benchmark.directories[0] if benchmark.directories else "."
    expected = " or ".join(f"{place}/{pattern.pattern} ({pattern.form})" for pattern in forms)

    # What is there instead: a folder may have an unexpected name.
    present = sorted(path.name for path in data_root.iterdir() if not path.name.startswith("."))
    for named in places.find_places(benchmark, data_root):
        if named.is_named and named.directory != data_root:
            inside = sorted(named.directory.iterdir())
            present = [str(path.relative_to(data_root)) for path in inside]
            break

    shown = ", ".join(present[:MAX_NAMES]) or "nothing"
    return (
        f"{benchmark.name}: no files of its {split} split below {data_root}: expected {expected}; "
        f"there is {shown}{', ...' if len(present) > MAX_NAMES else ''}. {_origin(benchmark)}"
    )


def _origin(benchmark: Benchmark) -> str:
    return f"It comes from {benchmark.source}"


def _read_files(
    pattern: FilePattern, files: Sequence[pathlib.Path]
) -> tuple[list[Item], dict[str, int], list[pathlib.Path]]:
    """Returns the items of files, the causes of left-out rows, and the files of the answers."""
    reader = READERS[pattern.reader]
    rows: Iterable[Row] = itertools.chain.from_iterable(
        reader(file, pattern.options) for file in files
    )

    # Answers may be in files of their own, which fit the rows after the rewrite.
    label_files: list[pathlib.Path] = []
    rows = _rewritten(rows, pattern)
    if "labels" in pattern.options:
        rows, label_files = _add_labels(list(rows), pattern.options["labels"])

    # A row may name another row, by its index, whose image it shares.
    index: dict[str, Any] = {}
    index_column = pattern.options.get("index")
    if index_column:
        rows = list(rows)
        index = {str(row.values[index_column]): row.values.get("image") for row in rows}

    items, skipped = row_items.make_items(rows, pattern, index)
    return items, skipped, label_files


def _rewritten(rows: Iterable[Row], pattern: FilePattern) -> Iterator[Row]:
    """Yields the rows as the form's rewrite makes them. Raises UserError naming the row."""
    name = pattern.options.get("rewrite")
    for row in rows:
        try:
            yield from REWRITES[name](row) if name else (row,)
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            # A rewrite does not check its columns: such an error means another layout.
            columns = ", ".join(list(row.values)[:MAX_NAMES])
            raise WrongLayoutError(
                f"{row.place} is not in the {pattern.form} form: {type(error).__name__} {error}; "
                f"its columns are {columns}"
            ) from error


def _add_labels(rows: list[Row], labels: Mapping[str, Any]) -> tuple[list[Row], list[pathlib.Path]]:
    """Returns the rows with the column "label" from other files, and these files.

    Raises:
      UserError: a file of answers is missing, or does not fit the rows.
    """
    if not rows:
        return rows, []

    # The column that "by" names has a file of answers for each of its values.
    if "by" in labels:
        groups: dict[str, list[Row]] = {}
        for row in rows:
            groups.setdefault(str(row.values[labels["by"]]), []).append(row)

        labeled, files = [], []
        for name, group in groups.items():
            file = {**labels, "file": labels["file"].replace("{by}", name)}
            group_rows, group_files = _label_by_position(group, file)
            labeled += group_rows
            files += group_files

        return labeled, files

    # A key is safer than the order, which is used where the answers have no key.
    if "on" in labels:
        return _label_by_key(rows, labels)
    return _label_by_position(rows, labels)


def _label_rows(rows: list[Row], labels: Mapping[str, Any]) -> tuple[list[Row], list[pathlib.Path]]:
    directory = rows[0].path.parent
    files = sorted(directory.glob(labels["file"]))
    if not files:
        raise MissingDataError(
            f"{rows[0].path}: its answers are missing: expected {directory / labels['file']}"
        )

    reader = READERS[labels.get("reader", "json")]
    found = itertools.chain.from_iterable(reader(file, labels) for file in files)
    name = labels.get("rewrite")
    if name:
        found = itertools.chain.from_iterable(map(REWRITES[name], found))
    return list(found), files


def _label_by_position(
    rows: list[Row], labels: Mapping[str, Any]
) -> tuple[list[Row], list[pathlib.Path]]:
    answers, files = _label_rows(rows, labels)
    if len(answers) < len(rows) or (len(answers) > len(rows) and not labels.get("longer")):
        raise UserError(
            f"{files[0]} has {len(answers)} answers for {len(rows)} questions of {rows[0].path}"
        )

    # Columns of both files must agree, or the answers belong to other questions.
    check = labels.get("same", ())
    labeled = []
    for row, answer in zip(rows, answers, strict=False):
        for column in check:
            if row.values[column] != answer.values.get(column):
                raise UserError(
                    f"{answer.place}: {column} is {answer.values.get(column)!r}, but "
                    f"{row.values[column]!r} in {row.place}: the files do not belong together"
                )

        # A line of a text file is the answer; other rows are passed on whole.
        value = answer.values.get("line", answer.values)
        labeled.append(with_values(row, label=value))
    return labeled, files


def _label_by_key(
    rows: list[Row], labels: Mapping[str, Any]
) -> tuple[list[Row], list[pathlib.Path]]:
    answers, files = _label_rows(rows, labels)
    by_key = {str(answer.values.get(labels["key"])): answer.values for answer in answers}

    missing = [row for row in rows if str(row.values[labels["on"]]) not in by_key]
    if missing:
        raise UserError(
            f"{missing[0].place}: {files[0].name} has no answer for "
            f"{str(missing[0].values[labels['on']])[:100]!r}"
        )

    labeled = [with_values(row, label=by_key[str(row.values[labels["on"]])]) for row in rows]
    return labeled, files


def read_science_qa(path: pathlib.Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Yields ScienceQA's problems of one split (`options["subset"]`), with their image's path.

    Raises:
      UserError: pid_splits.json is missing, or names a problem that is not there.
    """
    splits_file = path.parent / "pid_splits.json"
    if not splits_file.is_file():
        raise MissingDataError(f"{path}: pid_splits.json is missing beside it")
    try:
        problems, splits = (json.loads(text_files.read_text(file)) for file in (path, splits_file))
    except ValueError as error:
        raise UserError(f"{path} or pid_splits.json is not JSON: {error}") from error

    # The problems of one split, in the order of pid_splits.json.
    subset = options["subset"]
    for number, key in enumerate(splits.get(subset, ()), start=1):
        if key not in problems:
            raise UserError(f"{splits_file}: {subset} names problem {key}, which {path.name} lacks")

        values = problems[key]
        # The release has a folder per split, and in it a folder per problem.
        image = f"{subset}/{key}/{values['image']}" if values.get("image") else ""
        yield Row(path, number, {**values, "pid": key, "image": image})


READERS: Mapping[str, Callable[[pathlib.Path, Mapping[str, Any]], Iterator[Row]]] = {
    **row_files.ROW_READERS,
    "science_qa": read_science_qa,
}
