"""The typed tree that `configs/*.py` fill.

`default()` returns it as a ConfigDict to edit; `from_config_dict()` turns an edited one into these
frozen dataclasses and names the key that is wrong. Nothing below the entry points uses a
ConfigDict. The string below a field is its documentation, which `train --help` prints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from wings_jax import config_checks, serialization
from wings_jax.data.settings import DataConfig
from wings_jax.data.settings import SourceConfig as SourceConfig  # exported with the others


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model is built: an LLM, a vision tower, and what Wings or a baseline adds to them."""

    llm: str = "tiny"
    """Preset of `presets.DECODERS`, directory, tiny (shipped), or checkpoint: `init_from`'s LLM."""
    vision: str = "tiny"
    """Preset of `presets.VISION`, directory, tiny (shipped), or checkpoint: `init_from`'s tower."""
    projector: str = "mlp2x_gelu"
    """From image features to the LLM's width: mlp2x_gelu (two layers) or linear."""
    learners: tuple[str, ...] = ()
    """Wings beside the main attention: visual, textual, both in this order, or none."""
    router: bool = False
    """Whether a router weights the two learners; without, each is added with weight 1."""
    rank: int = 64
    """Rank R of the learners' low-rank projections."""
    learner_layers: tuple[int, ...] = ()
    """Layers that have learners, from 0; () for all of them."""
    gain: float = 1.0
    """Factor on the routed sum of the learners: 1 is the paper's equation 5, 2 the release's."""
    semantics: str = "paper"
    """Which visibility the learners have: paper, or release as the authors' checkpoint needs it."""
    prompt_length: int = 14
    """Release semantics only: slots of its system prompt and user header."""
    router_positions: int = 4096
    """Longest sequence that the router can weight; it reads the attention row of all slots."""
    lora_rank: int = 0
    """Rank of LoRA on the LLM's projections; 0 for none."""
    lora_alpha: float = 16.0
    """LoRA's update is multiplied by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = config_checks.LORA_TARGETS
    """Projections that have LoRA, of q, k, v, o, gate, up, down."""
    prefix_length: int = 0
    """Trained keys and values in every layer (prefix tuning); 0 for none."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, with a learning rate per parameter group; 0 freezes the group."""

    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Group -> regular expression over whole parameter paths; the first match wins."""
    learning_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Group -> peak learning rate; 0 freezes the group."""
    name: str = "adamw"
    """adamw, or muon: orthogonalized updates of matrices (needs fewer steps), AdamW elsewhere."""
    weight_decay: float = 0.0
    """Decoupled weight decay of what `no_decay` does not match."""
    no_decay: str = ".*/(bias|scale|embedding|position|class_token)"
    """Regular expression over whole parameter paths that have no weight decay."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the rate rises linearly from 0; a cosine to 0 follows."""
    b1: float = 0.9
    """AdamW's decay rate of the first moment."""
    b2: float = 0.999
    """AdamW's decay rate of the second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    moment_dtype: str = "float32"
    """Dtype of the first moment: float32, or bfloat16, which takes 2 bytes less per trained
    parameter. The second moment is float32: bfloat16 would round its small steps away."""
    max_grad_norm: float = 1.0
    """The gradient is clipped to this global norm over the trained parameters; 0 for never."""
    accumulation: int = 1
    """Micro-batches per step (gradient accumulation); they share one mean over all targets."""
    accumulation_dtype: str = "float32"
    """Dtype in which the gradients of micro-batches are summed: float32 or bfloat16."""
    skip_limit: int = 10
    """The run stops when so many of the last `skip_window` steps were not finite."""
    skip_window: int = 100
    """Steps over which `skip_limit` counts."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1: all devices that the others leave."""

    data: int = -1
    """Replicas of the parameters; each takes a share of the batch."""
    fsdp: int = 1
    """Devices that share the parameters and the batch (fully sharded data parallelism)."""
    tensor: int = 1
    """Devices that share heads, FFN width and vocabulary (tensor parallelism)."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training; its scores are in the run's metrics."""

    every: int = 0
    """Steps between evaluations; the last step is evaluated too. 0 for never."""
    tasks: str = "scenes_images,scenes_text"
    """Tasks of `python -m wings_jax.evaluate --tasks`, separated by commas."""
    data_root: str = ""
    """Directory with the files of the tasks; '' for the embedded data set of `data.scenes`."""
    limit: int = 200
    """About how many questions of each task; 0 for all."""
    batch_size: int = 16
    """Questions that are answered at once."""
    base: str = ""
    """Checkpoint or workdir whose scores are subtracted, such as the imported base; '' for none."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run."""

    stage: str = ""
    """Name of the stage in reports."""
    workdir: str = ""
    """Directory of checkpoints and metrics; the flag --workdir replaces it."""
    init_from: str = ""
    """Workdir or checkpoint to start from; '' for the directories of model.llm and model.vision."""
    seed: int = 0
    """Seed of new parameters and of the order of the samples."""
    steps: int = -1
    """Optimizer steps in all; -1 for `epochs`."""
    epochs: float = 1.0
    """Passes over the data, where `steps` is -1."""
    batch_size: int = 32
    """Rows of a step over all hosts, devices and micro-batches."""
    compute_dtype: str = ""
    """Dtype of the matmuls: float32 or bfloat16; '' is bfloat16, float32 on a CPU."""
    frozen_dtype: str = ""
    """Dtype of parameters that do not train; '' is bfloat16, float32 on a CPU."""
    remat: str = "full"
    """What the backward pass recomputes, one of `decoder.REMAT`: full, none, save_dots, ..."""
    scan_layers: bool = True
    """Whether the layers are one loop in the compiled program; false: less memory traffic on GPUs,
    a longer compilation, more memory."""
    attention: str = "auto"
    """Attention kernel, one of `attention.KERNELS`; auto takes the fastest that fits."""
    loss_chunk: int = 512
    """Slots whose logits exist at one time; fewer need less memory."""
    log_every: int = 10
    """Steps between lines on the terminal; metrics.jsonl has every step."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    verify_checkpoints: bool = True
    """Whether what is loaded is compared with the checksums in the checkpoint."""
    accept_changed_data: bool = False
    """Whether to resume a run although its data files have changed since it was started."""
    accept_changed_model: bool = False
    """Whether to start from a checkpoint whose learners had another gain or other semantics."""
    max_checkpoints: int = 2
    """Newest checkpoints that are kept; older ones are deleted."""
    keep_every_hours: float = 0.0
    """Hours between checkpoints that are kept beside the newest ones; 0 for none."""
    watchdog_minutes: float = 30.0
    """Minutes that one step, batch or save may take before the run prints the stacks of all its
    threads; 0 for never."""
    host_timeout: int = 100
    """Seconds without a sign of another host after which a job of several hosts ends."""
    laws_every: int = 0
    """Steps between measurements of the attention shift; 0 for never."""
    wandb: str = ""
    """Project of Weights & Biases that gets the metrics too (needs wandb); '' for none."""
    profile: str = ""
    """Steps to trace, START:STOP without STOP, into WORKDIR/profile for xprof; '' for none."""
    model: ModelConfig = ModelConfig()
    """The model."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The batches."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    mesh: MeshConfig = MeshConfig()
    """The devices."""
    eval: EvalConfig = EvalConfig()
    """Evaluation during training."""


# What may differ between a run and its resumption: it changes no number of the run.
FREE = (
    "workdir",
    "log_every",
    "checkpoint_every",
    "max_checkpoints",
    "keep_every_hours",
    "watchdog_minutes",
    "host_timeout",
    "verify_checkpoints",
    "accept_changed_data",
    "accept_changed_model",
    "laws_every",
    "wandb",
    "profile",
    "data.threads",
    "data.workers",
    "data.cache",
    "data.scenes",
    "init_from",
)


class ConfigTree(config_dict.ConfigDict):
    """A ConfigDict of a config dataclass, in which renamed keys can be read and set too."""

    _kind: type = object

    def __init__(self, tree: Mapping[str, Any] | None = None, kind: type = object, **options: Any):
        object.__setattr__(self, "_kind", kind)
        super().__init__(tree, **options)

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(serialization.current_name(self._kind, key))

    def __setitem__(self, key: str, value: Any) -> None:
        # A renamed key sets the leaf with the new name.
        key = serialization.current_name(self._kind, key)
        before = self._fields.get(key)
        if isinstance(before, ConfigTree) and not isinstance(value, ConfigTree):
            value = ConfigTree(value, before._kind)
        elif isinstance(value, dict):
            value = config_dict.ConfigDict(value)
        super().__setitem__(key, value)


def default() -> config_dict.ConfigDict:
    """Returns the tree's defaults, open for editing; a key that is not there cannot be set."""
    return to_tree(Config())


def to_tree(config: Config) -> config_dict.ConfigDict:
    """Returns a config as a locked tree, open for editing."""
    return _to_tree(config).lock()


def _to_tree(value: Any) -> Any:
    # Free names: the order of the entries has a meaning.
    if isinstance(value, Mapping):  # groups are matched in their order
        return config_dict.ConfigDict(serialization.to_dict(value), sort_keys=False)
    if not dataclasses.is_dataclass(value):
        return value
    fields = {f.name: _to_tree(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return ConfigTree(fields, type(value), sort_keys=False)


def from_config_dict(tree: config_dict.ConfigDict) -> Config:
    """Returns the validated dataclasses of an edited tree.

    Raises:
      UserError: an unknown key, a value of the wrong type, or values that do not fit together.
    """
    config = serialization.from_dict(Config, tree.to_dict(), "config")
    config_checks.check_config(config)
    return config


def differences(old: Config, new: Config) -> list[str]:
    """Returns 'key: old -> new' for every leaf that differs, except those of `FREE`, mesh, eval.

    >>> differences(Config(seed=1), Config(seed=2, log_every=5))
    ['seed: 1 -> 2']
    """
    # A leaf that only one of them has counts as changed.
    before, after = (serialization.flatten(serialization.to_dict(x)) for x in (old, new))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted({**before, **after})
        if before.get(key) != after.get(key)
        and key not in FREE
        and not key.startswith(("mesh.", "eval."))
    ]
