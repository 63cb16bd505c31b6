"""Stage 1, alignment: projector and visual learners; LLM and tower frozen, no router.

    python -m wings_jax.train --config=configs/stage1.py
    python -m wings_jax.train --config=configs/stage1.py:qwen1_5_7b --config.init_from=DIR \\
        --config.data.sources.llava.path=blip_laion_cc_sbu_558k.json
"""

from configs import base


def get_config(preset: str = "tiny"):
    config = base.get_config(preset)
    base.name_stage(config, "stage1", preset)
    config.model.learners = ("visual",)
    base.groups(config, projector=1e-3, visual=1e-3)  # the release: 2e-5 for both, batch 256
    if preset == "tiny":
        base.groups(config, projector=1e-2, visual=1e-2)
    if preset in base.ON_SCENES:
        base.scenes(config, "train_stage1", sequence_length=96)
        config.steps = 600
    return config
