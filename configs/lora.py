"""Baseline: LoRA on all projections of the LLM, and the projector; no wings. Table 1, figure 6.

    python -m wings_jax.train --config=configs/lora.py                   # after llava_stage1.py

The paper gives no numbers; rank, alpha and rates are those of LLaVA v1.5's LoRA recipe.
"""

from configs import base, stage2


def get_config(preset: str = "tiny"):
    config = stage2.get_config(preset)
    base.name_stage(config, "lora", preset, after="llava_stage1")
    config.model.learners, config.model.router = (), False
    config.model.lora_rank, config.model.lora_alpha = 128, 256.0
    base.groups(config, projector=2e-5, lora=2e-4)
    if preset == "smollm2_scenes":
        base.groups(config, projector=1e-4, lora=2e-4)
    if preset == "tiny":
        config.model.lora_rank, config.model.lora_alpha = 16, 16.0
        base.groups(config, projector=4e-3, lora=1e-2)
    return config
