"""Made-up scores of the forgetting experiment, for the tests of its estimates and tables."""

from __future__ import annotations

import pathlib

from wings_jax.evaluation import iit
from wings_jax.forgetting.methods import BASES, IMAGES, NOT_REPLAYED
from wings_jax.forgetting.results import RunScores
from wings_jax.forgetting.settings import ExperimentSettings

SETTINGS = ExperimentSettings("tiny", "", False, None, None, None, "runs/scenes")
TINY = BASES["tiny"]
OUT = pathlib.Path("out")


def scored(method: str, seed: int, images: float, text: float, regime: str = "images") -> RunScores:
    def share(value: float) -> dict:
        return {"mean": value, "interval95": [value - 0.1, value + 0.1]}

    scores = {
        "scenes_images": {IMAGES.row: share(images)},
        "scenes_text": {NOT_REPLAYED.row: share(text), "plus": share(text)},
        "iit": {row: share(text) for row in iit.ROWS},
        "laws": {
            "shift": {"mean": 1 - text, "interval95": [0.9 - text, 1.1 - text]},
            "shift_after": {"mean": 1.0, "interval95": [None, None]},
        },
    }
    regime = "" if method == "base" else regime
    return RunScores(method, regime, seed, 1000, 10.0, scores)


RUNS = [
    scored("base", 0, 0.1, 1.0),
    scored("llava", 0, 0.5, 0.4),
    scored("llava", 1, 0.6, 0.5),
    scored("llava", 2, 0.7, 0.9),
    scored("wings", 0, 0.6, 0.8),
    scored("wings", 2, 0.8, 0.9),
    scored("lora", 0, 0.3, 0.6, "replay"),
]
