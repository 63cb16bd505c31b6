"""Stage 1 of LLaVA and of what starts from it (LoRA, prefix, textual only): the projector alone.

    python -m wings_jax.train --config=configs/llava_stage1.py
    python -m wings_jax.train --config=configs/llava_stage1.py:qwen1_5_7b --config.init_from=DIR \\
        --config.data.sources.llava.path=blip_laion_cc_sbu_558k.json
"""

from configs import base, stage1


def get_config(preset: str = "tiny"):
    config = stage1.get_config(preset)
    base.name_stage(config, "llava_stage1", preset)
    config.model.learners = ()
    base.groups(config, projector=config.optimizer.learning_rates.projector)
    return config
