"""Ablation of figure 5b: one larger learning rate for all, stage 2's of the projector.

    python -m wings_jax.train --config=configs/lr_larger.py              # after stage1.py

The partitioned rates, projector higher and the rest lower, are stage2.py.
"""

from configs import base, stage2


def get_config(preset: str = "tiny"):
    config = stage2.get_config(preset)
    base.name_stage(config, "lr_larger", preset, after="stage1")
    rates = config.optimizer.learning_rates
    base.groups(config, **{name: rates.projector for name, rate in rates.items() if rate})
    return config
