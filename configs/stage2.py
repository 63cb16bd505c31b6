"""Stage 2, instruction tuning: LLM, projector, both learners and the router.

    python -m wings_jax.train --config=configs/stage2.py
    python -m wings_jax.train --config=configs/stage2.py:qwen1_5_7b \\
        --config.data.sources.llava.path=llava_v1_5_mix665k.json
"""

from configs import base


def get_config(preset: str = "tiny"):
    config = base.get_config(preset)
    base.name_stage(config, "stage2", preset, after="stage1")
    config.model.learners, config.model.router = ("visual", "textual"), True
    # The release: 2e-6, projector 1e-5, batch 64.
    base.groups(config, projector=1e-5, visual=2e-6, textual=2e-6, router=2e-6, llm=2e-6)
    if preset == "tiny":
        base.groups(config, projector=4e-3, visual=4e-3, textual=2e-3, router=1e-3, llm=1.5e-3)
    if preset == "smollm2_scenes":  # LLaVA's rate of the LLM, five times that for what is added
        base.groups(config, projector=1e-4, visual=1e-4, textual=1e-4, router=1e-4, llm=2e-5)
    if preset in base.ON_SCENES:
        base.scenes(config, "train_stage2", sequence_length=176)
        config.steps = 240
    return config
