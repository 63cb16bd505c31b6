"""Wings on a frozen LLM: projector and visual learners train further on the data of stage 2.

    python -m wings_jax.train --config=configs/frozen_llm.py             # after stage1.py

The visual learners add exactly 0 to a row without an image, so text-only answers are those of the
base LLM, token for token. One learner needs no router: its softmax would always be 1.
"""

from configs import base, stage2


def get_config(preset: str = "tiny"):
    config = stage2.get_config(preset)
    base.name_stage(config, "frozen_llm", preset, after="stage1")
    config.model.learners, config.model.router = ("visual",), False
    base.groups(config, projector=2e-5, visual=2e-4)
    if preset == "tiny":
        base.groups(config, projector=1e-2, visual=1e-2)
    if preset == "smollm2_scenes":
        base.groups(config, projector=1e-3, visual=1e-3)
    return config
