"""Baseline: prefix-tuning, trained keys and values in every layer, and the projector. Figure 6.

    python -m wings_jax.train --config=configs/prefix.py                 # after llava_stage1.py

The prefix has its own softmax and a gate that starts at 0 (`model/layers.py`). Its size and rates
are not in the paper.
"""

from configs import base, stage2


def get_config(preset: str = "tiny"):
    config = stage2.get_config(preset)
    base.name_stage(config, "prefix", preset, after="llava_stage1")
    config.model.learners, config.model.router = (), False
    config.model.prefix_length = 32
    base.groups(config, projector=2e-5, prefix=5e-3)
    if preset == "smollm2_scenes":
        base.groups(config, projector=1e-4, prefix=5e-3)
    if preset == "tiny":
        base.groups(config, projector=4e-3, prefix=5e-2)
    return config
