"""The model card of an export, generated from its checkpoint and the stages before it.

What it holds was recorded by the runs: base models and their licenses, data and digests, the
hyperparameters of every stage, and the reports of `evaluate` in the workdir.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from wings_jax import checkpoint, formatting
from wings_jax import config as config_lib
from wings_jax.weights import text_files
from wings_jax.weights.tensors import WeightsError

IMPORT_STAGE = "import"  # of the config that an import writes
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CACHE = re.compile(r"models--([^/]+)--([^/]+)")  # a directory of the hub's cache
LICENSE_KEYS = ("license", "license_name", "license_link")
PAPER = "[arXiv 2406.03496](https://arxiv.org/abs/2406.03496)"


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A model that the first stage started from."""

    part: str
    """LLM, tower, projector or Wings."""
    name: str
    """Hub id where it is known, else the name of its directory."""
    license: Mapping[str, str]
    """`license`, `license_name` and `license_link` of its own model card; {} without one."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One run, or an import."""

    config: config_lib.Config
    """Its config."""
    step: int
    """Optimizer steps done."""
    workdir: pathlib.Path
    """Directory with `data.json` and reports."""


def describe_source(part: str, directory: str | pathlib.Path) -> BaseModel:
    """Returns the name and the license of the model in a directory of weights."""
    path = pathlib.Path(directory)
    cached = CACHE.search(str(path))
    name = f"{cached[1]}/{cached[2]}" if cached else path.name
    return BaseModel(part, name, read_license(path))


def read_license(directory: pathlib.Path) -> dict[str, str]:
    """Returns the license entries of a directory's README.md, {} without them."""
    try:
        text = text_files.read_text(directory / "README.md")
    except (OSError, WeightsError):
        return {}

    # License entries are single lines of the YAML, so that no parser is needed.
    front, _ = split_card(text)
    entries = {}
    for line in front.splitlines():
        key, _, value = line.partition(":")
        if key in LICENSE_KEYS and value.strip():
            entries[key] = value.strip().strip("\"'")

    return entries


def split_card(text: str) -> tuple[str, str]:
    """Returns the metadata (YAML) and the text of a model card.

    >>> split_card("---\\nlicense: mit\\n---\\n# Name\\n")
    ('license: mit\\n', '# Name\\n')
    """
    match = re.match(r"---\n(.*?)^---\n", text, re.DOTALL | re.MULTILINE)
    return (match[1], text[match.end() :].lstrip("\n")) if match else ("", text)


def read_stages(step: pathlib.Path) -> list[Stage]:
    """Returns the stages of a checkpoint, the first one first, as far as they can be read."""
    stages: list[Stage] = []
    visited: set[pathlib.Path] = set()
    found: pathlib.Path | None = step
    # From the last stage back to the first; `visited` ends a cycle of directories.
    while found is not None and found not in visited:
        visited.add(found)
        config, _, number = checkpoint.read_meta(found)
        # A step is below its workdir, unless it was copied out of it.
        is_inside = found.parent.name == checkpoint.SUBDIRECTORY
        stages.insert(0, Stage(config, number, found.parent.parent if is_inside else found))

        # An import is where a model starts, whatever its config names.
        is_first = config.stage == IMPORT_STAGE or not config.init_from
        found = None if is_first else checkpoint.newest_step(config.init_from)
    return stages


def read_bases(stages: Sequence[Stage]) -> list[BaseModel]:
    """Returns the models that the first stage started from."""
    first = stages[0]
    recorded = checkpoint.read_sources(checkpoint.find_step(first.workdir, flag="--checkpoint"))
    if recorded:
        return [BaseModel(**entry) for entry in recorded]

    # A run that started from directories; presets are names.
    model = first.config.model
    parts = (("LLM", model.llm), ("tower", model.vision))
    return [describe_source(part, name) for part, name in parts]


def make_card(step: pathlib.Path, *, name: str, kind: str, existing: str = "") -> str:
    """Returns the README.md of an export.

    Args:
      step: the checkpoint's step directory.
      kind: format of the export: transformers, wings, llm, adapter or peft.
      existing: the card that the export has: its text stays, its metadata is added to.
    """
    stages = read_stages(step)
    bases = read_bases(stages)

    # The text and the entries of an existing card stay: only keys that it lacks are added.
    front, text = split_card(existing)
    own = {line.partition(":")[0] for line in front.splitlines() if not line.startswith((" ", "-"))}
    entries = [line for line in _metadata(bases, kind) if line.partition(":")[0] not in own]
    metadata = "\n".join([*front.splitlines(), *_with_items(entries)])

    intro = text.strip() or f"# {name}\n\n{_INTRODUCTIONS[kind]}"
    sections = [
        intro,
        _bases_section(bases),
        _stages_section(stages),
        _data_section(stages),
        _evaluation_section(stages[-1]),
    ]
    return f"---\n{metadata}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


_INTRODUCTIONS = {
    "transformers": f"A Wings model ({PAPER}) for transformers, trained with wings_jax.",
    "wings": f"A Wings model ({PAPER}) in the layout of the authors' release, trained with "
    "wings_jax.",
    "llava": "A LLaVA model for transformers, trained with wings_jax.",
    "llm": "The LLM of a model that was trained with wings_jax, for transformers.",
    "adapter": f"What training added to a frozen LLM and tower ({PAPER}): projector and learners. "
    "Put it on its base with `wings chat --checkpoint BASE --adapter FILE`; another base is "
    "refused.",
    "peft": "LoRA of a model that was trained with wings_jax, for the peft package.",
}


def _metadata(bases: Sequence[BaseModel], kind: str) -> list[str]:
    """Returns the entries of a card's YAML, each in one line; lists are joined by ' | '."""
    is_text = kind in ("llm", "peft")
    # The library that opens the export.
    library = {"adapter": "wings_jax", "wings": "wings_jax", "peft": "peft"}.get(
        kind, "transformers"
    )
    lines = [
        f"library_name: {library}",
        f"pipeline_tag: {'text-generation' if is_text else 'image-text-to-text'}",
    ]

    # An LLM without a tower is not based on the tower; only hub ids can be linked.
    used = [base for base in bases if not is_text or base.part != "tower"]
    ids = [base.name for base in used if HUB_ID.fullmatch(base.name)]
    if ids:
        lines.append("base_model: | " + " | ".join(ids))

    # One license can be declared; with several the text lists them.
    licenses = {tuple(sorted(base.license.items())) for base in used}
    if len(licenses) == 1 and (single := licenses.pop()):
        lines += [f"{key}: {value}" for key, value in single]
    return lines


def _with_items(entries: Sequence[str]) -> list[str]:
    """Returns YAML lines of entries whose lists are joined by ' | '."""
    lines = []
    for entry in entries:
        # The first item is the key, the others are those of its list.
        key, *items = entry.split(" | ")
        lines += [key, *(f"- {item}" for item in items)]
    return lines


def _bases_section(bases: Sequence[BaseModel]) -> str:
    rows = [("part", "model", "license")]
    for base in bases:
        values = [base.license[key] for key in LICENSE_KEYS if key in base.license]
        rows.append((base.part, base.name, ", ".join(values) or "not recorded"))
    return "## Base models\n\n" + formatting.markdown_table(rows)


def _stages_section(stages: Sequence[Stage]) -> str:
    """Returns a table with a column per stage that trained."""
    # An import has no hyperparameters.
    trained = [stage for stage in stages if stage.config.stage != IMPORT_STAGE]
    if not trained:
        return ""

    # A row for each setting that any stage has, in order of first appearance.
    settings = [_hyperparameters(stage) for stage in trained]
    names = list(dict.fromkeys(name for column in settings for name in column))
    rows = [["", *(stage.config.stage for stage in trained)]]
    rows += [[name, *(column.get(name, "") for column in settings)] for name in names]
    return "## Training\n\n" + formatting.markdown_table(rows)


def _hyperparameters(stage: Stage) -> dict[str, str]:
    """Returns name -> value of what a stage was trained with."""
    config, model, optimizer = stage.config, stage.config.model, stage.config.optimizer
    # Groups with a rate of 0 were frozen.
    rates = {group: rate for group, rate in optimizer.learning_rates.items() if rate > 0}
    values = {
        "steps": f"{stage.step:,}",
        "batch size": str(config.batch_size),
        "sequence length": str(config.data.sequence_length),
        "optimizer": optimizer.name,
        **{f"learning rate of {group}": f"{rate:g}" for group, rate in rates.items()},
        "warm-up": f"{optimizer.warmup_ratio:g} of the steps, then a cosine to 0",
        "weight decay": f"{optimizer.weight_decay:g}",
        "gradient norm": f"at most {optimizer.max_grad_norm:g}",
        "learners": ", ".join(model.learners) or "none",
        "semantics": model.semantics,
        "template": config.data.template,
        "seed": str(config.seed),
    }

    # Parts that not every model has.
    if model.learners:
        values["learners"] += f" (rank {model.rank}{', with a router' if model.router else ''})"
    if model.lora_rank:
        targets = ", ".join(model.lora_targets)
        values["LoRA"] = f"rank {model.lora_rank}, alpha {model.lora_alpha:g}, on {targets}"
    if model.prefix_length:
        values["prefix"] = f"{model.prefix_length} keys and values in each layer"
    return values


def _data_section(stages: Sequence[Stage]) -> str:
    """Returns the files of every stage with their digests, of `WORKDIR/data.json`."""
    rows: list[tuple[str, ...]] = [("stage", "data", "file", "digest")]
    for stage in stages:
        file = stage.workdir / "data.json"
        if not file.is_file():
            continue
        for name, entry in text_files.read_json(file).items():
            # The name alone: a published card has no use for local directories.
            file_name = pathlib.PurePath(entry.get("path", "")).name
            rows.append((stage.config.stage, name, file_name, entry.get("digest", "")))

    return "## Data\n\n" + formatting.markdown_table(rows) if len(rows) > 1 else ""


def _evaluation_section(stage: Stage) -> str:
    """Returns the scores of this step in the reports below the workdir."""
    rows: list[tuple[str, ...]] = [("task", "kind", "questions", "right, % [95 % interval]")]
    # A report may compare several models; only this checkpoint at this step counts.
    for report in sorted(stage.workdir.rglob("report.json")):
        for model in text_files.read_json(report).get("models", ()):
            is_this = pathlib.Path(str(model.get("origin", ""))).absolute() in (
                stage.workdir,
                stage.workdir / checkpoint.SUBDIRECTORY / str(stage.step),
            )
            if not is_this or model.get("step") != stage.step:
                continue
            for task, scores in model.get("tasks", {}).items():
                rows += [(task, kind, *_score_cells(score)) for kind, score in scores.items()]
    return "## Evaluation\n\n" + formatting.markdown_table(rows) if len(rows) > 1 else ""


def _score_cells(score: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the number of questions and the accuracy of a row of a report."""
    interval = score.get("interval95") or []
    bounds = f" [{', '.join(f'{100 * bound:.1f}' for bound in interval)}]" if interval else ""

    accuracy = score.get("accuracy")
    shown = "" if accuracy is None else f"{100 * accuracy:.1f}{bounds}"
    return str(score.get("total", "")), shown
