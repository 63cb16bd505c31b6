"""Ablation: Wings with visual learners only, so without a router. Figure 5c.

    python -m wings_jax.train --config=configs/visual_only.py            # after stage1.py

They have weight 1, as in stage 1; unlike in frozen_llm.py the LLM trains too.
"""

from configs import base, stage2


def get_config(preset: str = "tiny"):
    config = stage2.get_config(preset)
    base.name_stage(config, "visual_only", preset, after="stage1")
    config.model.learners, config.model.router = ("visual",), False
    rates = config.optimizer.learning_rates
    base.groups(config, projector=rates.projector, visual=rates.visual, llm=rates.llm)
    return config
