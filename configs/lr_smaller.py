"""Ablation of figure 5b: one smaller learning rate for all, stage 2's of the LLM.

    python -m wings_jax.train --config=configs/lr_smaller.py             # after stage1.py

The partitioned rates, projector higher and the rest lower, are stage2.py.
"""

from configs import base, stage2


def get_config(preset: str = "tiny"):
    config = stage2.get_config(preset)
    base.name_stage(config, "lr_smaller", preset, after="stage1")
    rates = config.optimizer.learning_rates
    base.groups(config, **{name: rates.llm for name, rate in rates.items() if rate})
    return config
