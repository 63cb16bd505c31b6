"""Configuration of Wings models for `transformers` (Wings, arXiv 2406.03496).

The files `*_wings.py` travel with an exported model; they need only torch and transformers 5.
"""

from __future__ import annotations

from transformers import AutoConfig, PretrainedConfig


class WingsConfig(PretrainedConfig):
    """Configuration of `WingsForConditionalGeneration`.

    Args:
        text_config: configuration (or its dictionary) of the LLM: Qwen2, Qwen3, Llama, Mistral
            or SmolLM3.
        vision_config: configuration of the vision tower, `siglip_vision_model` or
            `clip_vision_model`. `num_hidden_layers` counts the layers that are read: the image
            features are the last layer's output, without a final norm.
        image_token_id: id that stands for one slot of an image.
        image_seq_length: slots that one image takes.
        projector: `identity`, `linear`, `mlp2x_gelu` or `mlp3x_gelu`.
        qk_norm: whether the heads of q and k are normalized before rope (Qwen3).
        learners: subset of `visual`, `textual`; empty for a LLaVA model.
        learner_rank: rank of the learners' low-rank matrices.
        learner_layers: layers that carry learners; None is all.
        router: whether the learners are weighted per token; else each counts 1.
        router_positions: the longest conversation that the router can read.
        gain: factor of the gated sum of learner outputs.
        learner_query: `normed`, the input of the main attention (the paper's equation 5), or
            `residual`, the stream behind the main attention (the authors' release).
        learner_scaled_rope: whether the learners' rope is scaled as the LLM's is.
        ungated_when_alone: whether gate x gain is 1 where only one learner has visible keys.
        prompt_length: None for the paper's causal attention mask; else the release's, which is
            not causal around images, with the length of its system prompt.
        lora_rank: rank of LoRA in the LLM's projections; 0 is none.
        lora_alpha: LoRA's scale is `lora_alpha / lora_rank`.
        lora_targets: names among q, k, v, o, gate, up, down.
        prefix_length: trained keys and values per layer, beside the main attention; 0 is none.
        use_cache: whether keys and values are cached when generating.
    """

    model_type = "wings"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    def __init__(
        self,
        text_config=None,
        vision_config=None,
        image_token_id=None,
        image_seq_length=729,
        projector="mlp2x_gelu",
        qk_norm=False,
        learners=(),
        learner_rank=64,
        learner_layers=None,
        router=False,
        router_positions=4096,
        gain=1.0,
        learner_query="normed",
        learner_scaled_rope=True,
        ungated_when_alone=False,
        prompt_length=None,
        lora_rank=0,
        lora_alpha=16.0,
        lora_targets=(),
        prefix_length=0,
        use_cache=True,
        **kwargs,
    ):
        self.text_config = _sub_config(text_config, "qwen2")
        self.vision_config = _sub_config(vision_config, "siglip_vision_model")
        self.image_token_id = image_token_id
        self.image_seq_length = image_seq_length
        self.projector = projector
        self.qk_norm = qk_norm

        self.learners = list(learners)
        self.learner_rank = learner_rank
        self.learner_layers = None if learner_layers is None else list(learner_layers)

        self.router = router
        self.router_positions = router_positions
        self.gain = gain

        self.learner_query = learner_query
        self.learner_scaled_rope = learner_scaled_rope
        self.ungated_when_alone = ungated_when_alone
        self.prompt_length = prompt_length

        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha
        self.lora_targets = list(lora_targets)
        self.prefix_length = prefix_length

        self.use_cache = use_cache
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)

    def learners_of(self, layer: int) -> list[str]:
        """Returns the learners that a layer carries."""
        carries = self.learner_layers is None or layer in self.learner_layers
        return self.learners if carries else []


def _sub_config(config, default_type):
    if isinstance(config, PretrainedConfig):
        return config
    config = dict(config or {})
    return AutoConfig.for_model(config.pop("model_type", default_type), **config)
