"""Any stage-2 config of the tiny preset, with text among the pictures: interleaved and replayed.

    python -m wings_jax.train --config=configs/replay.py                 # stage2.py's, after stage1
    python -m wings_jax.train --config=configs/replay.py:llava           # llava.py's, and so on

Of the text skills some are replayed and some never are (`data/skills.py`); their forgetting is to
be read from those that are not.
"""

import importlib
import pathlib

from configs import base


def get_config(name: str = "stage2"):
    if name in ("base", "replay") or not pathlib.Path(__file__).with_name(f"{name}.py").is_file():
        raise ValueError(f"{name!r} is no stage among the configs")
    config = importlib.import_module(f"configs.{name}").get_config()
    config.stage, config.workdir = f"{config.stage}_replay", f"{config.workdir}_replay"
    # 4 turns of text, now and then with a description each, need a bit more than the pictures do.
    config.data.sequence_length = max(208, config.data.sequence_length)
    with config.unlocked():
        for file in ("interleaved", "replay"):
            config.data.sources[file] = base.source(
                f"{base.SCENES}/train_{file}.json", f"{base.SCENES}/images"
            )
    return config
