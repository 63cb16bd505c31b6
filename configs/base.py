"""What all stages share, and the presets: which LLM, vision tower, data and mesh.

tiny             ships with the package and runs anywhere, with nothing downloaded
smollm2_scenes   SmolLM2-135M-Instruct with the tiny tower and its images
the others       real models; `python -m wings_jax.convert import` writes the start of all but tiny
"""

from ml_collections import config_dict

from wings_jax import config as config_lib

SCENES = "runs/scenes"

# Parameter groups, first match wins. A config names the learning rates; 0 freezes.
GROUPS = {
    "vision": "vision/.*",
    "projector": "projector/.*",
    "visual": "decoder/layers/visual/.*",
    "textual": "decoder/layers/textual/.*",
    "router": "decoder/layers/router/.*",
    "prefix": "decoder/layers/prefix/.*",
    "lora": "decoder/layers/(attn|mlp)/.*/[ab]",
    "llm": "decoder/.*",
}

ON_SCENES = ("tiny", "smollm2_scenes")  # presets that train on the embedded data set

# preset -> (LLM, vision tower, template)
REAL = {
    "qwen1_5_0_5b": ("qwen1_5_0_5b", "siglip_so400m_384", "chatml"),
    "qwen1_5_1_8b": ("qwen1_5_1_8b", "siglip_so400m_384", "chatml"),
    "qwen1_5_7b": ("qwen1_5_7b", "siglip_so400m_384", "chatml"),
    "qwen1_5_7b_clip": ("qwen1_5_7b", "clip_large_336", "chatml"),
    "qwen2_5_0_5b": ("qwen2_5_0_5b", "siglip_so400m_384", "tokenizer"),
    "qwen2_5_1_5b": ("qwen2_5_1_5b", "siglip_so400m_384", "tokenizer"),
    "qwen2_5_7b": ("qwen2_5_7b", "siglip_so400m_384", "tokenizer"),
    "qwen3_0_6b": ("qwen3_0_6b", "siglip_so400m_384", "qwen3_no_think"),
    "qwen3_1_7b": ("qwen3_1_7b", "siglip_so400m_384", "qwen3_no_think"),
    "qwen3_4b": ("qwen3_4b", "siglip_so400m_384", "qwen3_no_think"),
    "qwen3_8b": ("qwen3_8b", "siglip_so400m_384", "qwen3_no_think"),
    "vicuna_7b": ("vicuna_7b", "clip_large_336", "vicuna"),
    "vicuna_7b_siglip": ("vicuna_7b", "siglip_so400m_384", "vicuna"),
    "vicuna_13b": ("vicuna_13b", "clip_large_336", "vicuna"),
    "llama3_1_8b": ("llama3_1_8b", "siglip_so400m_384", "llama3"),
    "llama3_2_1b": ("llama3_2_1b", "siglip_so400m_384", "llama3"),
    "llama3_2_3b": ("llama3_2_3b", "siglip_so400m_384", "llama3"),
    "mistral_7b": ("mistral_7b", "siglip_so400m_384", "mistral"),
    "smollm2_135m": ("smollm2_135m", "siglip_base_224", "chatml"),
}
PRESETS = (*ON_SCENES, *REAL)


def get_config(preset: str = "tiny") -> config_dict.ConfigDict:
    """Returns everything but what a stage adds. Raises ValueError for an unknown preset."""
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is not one of {', '.join(PRESETS)}")
    config = config_lib.default()
    with config.unlocked():
        if preset in REAL:
            _real(config, preset)
        else:
            _on_scenes(config)
            _tiny(config) if preset == "tiny" else _smollm2(config)
    return config


def name_stage(config: config_dict.ConfigDict, stage: str, preset: str, *, after: str = "") -> None:
    """Sets the stage's name, its workdir and, as its start, the workdir of the stage before.

    Workdirs are runs/STAGE for the tiny preset and runs/STAGE-PRESET for the others.
    """
    suffix = "" if preset == "tiny" else f"-{preset}"
    config.stage, config.workdir = stage, f"runs/{stage}{suffix}"
    config.init_from = f"runs/{after}{suffix}" if after else ""


def groups(config: config_dict.ConfigDict, **learning_rates: float) -> None:
    """Sets the groups: these learning rates, everything else frozen."""
    frozen = dict.fromkeys(("vision", "projector", "llm"), 0.0)
    rates = {**frozen, **learning_rates}
    named = {name: (GROUPS[name], rates[name]) for name in GROUPS if name in rates}
    with config.unlocked():
        config.optimizer.groups = _ordered({name: row[0] for name, row in named.items()})
        config.optimizer.learning_rates = _ordered({name: row[1] for name, row in named.items()})


def _ordered(entries: dict) -> config_dict.ConfigDict:
    return config_dict.ConfigDict(entries, sort_keys=False)


def source(path: str = "", images: str = "") -> dict:
    """Returns one entry of `config.data.sources`."""
    return {"path": path, "images": images, "weight": 0.0, "split": "train"}


def scenes(config: config_dict.ConfigDict, name: str, *, sequence_length: int) -> None:
    """Sets the data to one file of the embedded data set."""
    config.data.sequence_length = sequence_length
    with config.unlocked():
        config.data.sources = {"scenes": source(f"{SCENES}/{name}.json", f"{SCENES}/images")}


def _on_scenes(config: config_dict.ConfigDict) -> None:
    config.model.rank = 32
    config.model.router_positions = 1024
    config.data.scenes = SCENES
    config.data.images_per_row = 2
    config.remat = "none"
    config.checkpoint_every = 200


def _tiny(config: config_dict.ConfigDict) -> None:
    config.batch_size = 32
    # Few steps must suffice.
    config.optimizer.name, config.optimizer.b2 = "muon", 0.95
    config.loss_chunk = 256


def _smollm2(config: config_dict.ConfigDict) -> None:
    config.model.llm = "smollm2_135m"
    config.batch_size = 8
    config.loss_chunk = 64


def _real(config: config_dict.ConfigDict, preset: str) -> None:
    llm, vision, template = REAL[preset]
    config.model.llm, config.model.vision = llm, vision
    config.data.template = template
    config.data.sources = {"llava": source()}
    config.batch_size = 32
    # All devices share the parameters; the rest of a large job goes to `data` by hand.
    config.mesh.data, config.mesh.fsdp = 1, -1
