"""Stage 1 of LLaVA and of what follows from it (LoRA, prefix, textual only): the projector alone.

    python -m wings_jax.train --config=configs/llava_stage1.py
    python -m wings_jax.train --config=configs/llava_stage1.py:qwen1_5_7b --config.init_from=DIR \\
        --config.data.sources.llava.path=blip_laion_cc_sbu_558k.json
"""

from configs import base, stage1


def get_config(preset: str = "tiny"):
    config = stage1.get_config(preset)
    config.stage, config.workdir = "llava_stage1", "runs/llava_stage1"
    config.model.learners = ()
    base.groups(config, projector=config.optimizer.learning_rates.projector)
    return config
