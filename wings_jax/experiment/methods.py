"""What is compared: methods, what their second stage sees, and which scores are told of them.

All of it is data. A method's training is a config of `configs/`, unchanged but for seed and steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from wings_jax.errors import UserError
from wings_jax.evaluation import iit, tasks


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table.

    title   how tables and plots call it
    config  of its last stage, a file's name in configs/
    begins  config of the stage before, "" where it starts from the LLM and the tower themselves
    trains  the parameter groups of its last stage
    colour  in plots
    steps   where they are not the config's or the user's
    """

    title: str
    config: str
    begins: str
    trains: tuple[str, ...]
    colour: str
    steps: int | None = None


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
SHIFT = Measure("attention shift", "laws", "shift", scale=1.0)
MEASURES = (PICTURES, SUMS, NEVER, REPLAYED, *INTERLEAVED, SHIFT)


def chosen(names: str, known: Mapping[str, object], flag: str) -> tuple[str, ...]:
    """Returns the names of a comma-separated list, in the order of `known`.

    Raises:
      UserError: one of them is not known, or there is none.
    """
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    unknown = sorted(wanted - set(known))
    if unknown or not wanted:
        wrong = f"there is no {unknown[0]!r}" if unknown else "names nothing"
        raise UserError(f"{flag}: {wrong}; there are {', '.join(known)}")
    return tuple(name for name in known if name in wanted)
