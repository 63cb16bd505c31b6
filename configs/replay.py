"""Any stage-2 config of the tiny preset, with text among the images: interleaved and replayed.

    python -m wings_jax.train --config=configs/replay.py                 # stage2.py's, after stage1
    python -m wings_jax.train --config=configs/replay.py:llava           # llava.py's, and so on

Some text skills are replayed and some never are (`scenes/skills.py`): the latter show forgetting.
"""

import importlib
import pathlib

from configs import base

CONFIGS = pathlib.Path(__file__).parent.glob("*.py")
PRESETS = sorted({path.stem for path in CONFIGS} - {"base", "replay"})


def get_config(name: str = "stage2"):
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
    config = importlib.import_module(f"configs.{name}").get_config()
    config.stage, config.workdir = f"{config.stage}_replay", f"{config.workdir}_replay"
    # 4 turns of text, some with a description each, need more slots than those with images.
    config.data.sequence_length = max(208, config.data.sequence_length)
    with config.unlocked():
        for file in ("interleaved", "replay"):
            config.data.sources[file] = base.source(
                f"{base.SCENES}/train_{file}.json", f"{base.SCENES}/images"
            )
    return config
