"""Ablation: the routed sum counts twice, so that stage 2 starts with stage 1's visual weight.

    python -m wings_jax.train --config=configs/gain2.py                  # after stage1.py

Gain 1, equation 5 as written, is stage2.py. The authors' release in effect computes gain 2.
"""

from configs import base, stage2


def get_config(preset: str = "tiny"):
    config = stage2.get_config(preset)
    base.name_stage(config, "gain2", preset, after="stage1")
    config.model.gain = 2.0
    return config
