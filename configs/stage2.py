"""Stage 2, instruction tuning: LLM, projector, both learners and the router.

    python -m wings_jax.train --config=configs/stage2.py
    python -m wings_jax.train --config=configs/stage2.py:qwen1_5_7b \
        --config.data.sources.llava.path=llava_v1_5_mix665k.json
"""

from configs import base


def get_config(preset: str = "tiny"):
    config = base.get_config(preset)
    config.stage, config.workdir, config.init_from = "stage2", "runs/stage2", "runs/stage1"
    config.model.learners, config.model.router = ("visual", "textual"), True
    rate = 1e-3 if preset == "tiny" else 2e-6  # the release: 2e-6, projector 1e-5, batch 64
    base.groups(
        config,
        projector=1e-3 if preset == "tiny" else 1e-5,
        visual=rate,
        textual=rate,
        router=rate,
        llm=rate,
    )
    if preset == "tiny":
        with config.unlocked():
            config.data.sources = {"scenes": base.scenes("train_stage2")}
        config.steps = 800
    return config
