"""Ablation: both learners, added as they are; no router.

    python -m wings_jax.train --config=configs/no_router.py              # after stage1.py

Both have weight 1 wherever they have visible keys, as the visual learner does in stage 1.
"""

from configs import base, stage2


def get_config(preset: str = "tiny"):
    config = stage2.get_config(preset)
    base.name_stage(config, "no_router", preset, after="stage1")
    config.model.router = False
    rates = dict(config.optimizer.learning_rates)
    rates.pop("router")
    base.groups(config, **rates)
    return config
