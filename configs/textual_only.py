"""Ablation: Wings with textual learners only, so without a router. Figure 5c.

    python -m wings_jax.train --config=configs/textual_only.py           # after llava_stage1.py

Nothing visual but the projector is aligned before it, so that no visual learner helped that one.
"""

from configs import base, stage2


def get_config(preset: str = "tiny"):
    config = stage2.get_config(preset)
    base.name_stage(config, "textual_only", preset, after="llava_stage1")
    config.model.learners, config.model.router = ("textual",), False
    rates = config.optimizer.learning_rates
    base.groups(config, projector=rates.projector, textual=rates.textual, llm=rates.llm)
    return config
