"""Baseline: LLaVA, full fine-tuning of LLM and projector; no wings. Table 1 of the paper.

    python -m wings_jax.train --config=configs/llava.py[:vicuna_7b]      # after llava_stage1.py

Data, steps and rates are those of stage2.py, so that the wings are the only difference. The paper
names no rates for its baselines. LLaVA's own recipe trains the LLM of the real presets at ten times
the rate, --config.optimizer.learning_rates.llm=2e-5, which should forget more.
"""

from configs import base, stage2


def get_config(preset: str = "tiny"):
    config = stage2.get_config(preset)
    base.name_stage(config, "llava", preset, after="llava_stage1")
    config.model.learners, config.model.router = (), False
    rates = config.optimizer.learning_rates
    base.groups(config, projector=rates.projector, llm=rates.llm)
    return config
