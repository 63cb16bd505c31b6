"""The authors' PyTorch checkpoints: Wings (`attn_pool`, `reweight_module`) and their LLaVA.

One flat state dict holds the LLM under its usual keys, the learners and the router beside each
layer's attention, `mm_projector`, and the vision tower behind a long prefix. A file of stage 1
has no router, and textual learners that were never trained.
"""

from __future__ import annotations

from wings_jax.model import presets
from wings_jax.weights import hf, rules

TOWER = "model.vision_tower.vision_tower.vision_model."
PROJECTOR = "model.mm_projector."
LEARNERS = {"visual": "attn_pool", "textual": "attn_t_pool"}
# model_type of config.json -> the LLM's own.
FAMILIES = {
    "wings_qwen2": "qwen2",
    "llava_qwen2": "qwen2",
    "wings_llama": "llama",
    "llava_llama": "llama",
}

# One learner, below `model.layers.{l}.attn_pool.` and `layers/visual/`.
LEARNER = rules.table("""
q_proj.0.weight    q/a    R D <-> D R
q_proj.1.weight    q/b    (N H) R <-> R N H
k_proj.0.weight    k/a    R D <-> D R
k_proj.1.weight    k/b    (N H) R <-> R N H
v_proj.0.weight    v/a    R D <-> D R
v_proj.1.weight    v/b    (N H) R <-> R N H
o_proj.0.weight    o/a    R (N H) <-> N H R
o_proj.1.weight    o/b    D R <-> R D
""")

ROUTER = rules.table("""
model.layers.{l}.reweight_module.linear.weight    layers/router/kernel    M S <-> M S
model.layers.{l}.reweight_module.linear.bias      layers/router/bias      M <-> M
""")

IGNORABLE = (r"model\.image_newline",)
# Stage 1 saves the textual learners as they were initialized.
IGNORABLE_WITHOUT_TEXTUAL = (r"model\.layers\.\d+\.attn_t_pool\..*",)


def projector_depth(kind: str) -> int:
    """Returns how many linear layers a projector of this kind has.

    >>> projector_depth("identity"), projector_depth("linear"), projector_depth("mlp2x_gelu")
    (0, 1, 2)
    """
    if kind in ("identity", "linear"):
        return int(kind == "linear")
    return int(kind.removeprefix("mlp").removesuffix("x_gelu"))


def projector_rules(kind: str) -> tuple[rules.Rule, ...]:
    """Returns the table of `mm_projector`; its paths are below `projector/`."""
    if kind == "linear":
        return rules.table("""
            weight    linear_0/kernel    D E <-> E D
            bias      linear_0/bias      D <-> D
        """)

    rows = []
    for index in range(projector_depth(kind)):
        # The even entries of the Sequential are linear, the odd ones GELU.
        dims = "D E <-> E D" if index == 0 else "O D <-> D O"
        rows.append(rules.Rule(f"{2 * index}.weight", f"linear_{index}/kernel", dims))
        rows.append(rules.Rule(f"{2 * index}.bias", f"linear_{index}/bias", "D <-> D"))
    return tuple(rows)


def release_rules(arch: presets.WingsArch) -> tuple[rules.Rule, ...]:
    """Returns the table of a whole checkpoint in the release's layout."""
    # The LLM, and beside each layer its learners and router.
    rows = rules.with_prefix(hf.decoder_rules(arch.decoder), path="decoder/")
    for name in arch.learners:
        key = f"model.layers.{rules.LAYER}.{LEARNERS[name]}."
        rows += rules.with_prefix(LEARNER, hf_key=key, path=f"decoder/layers/{name}/")
    if arch.router:
        rows += rules.with_prefix(ROUTER, path="decoder/")

    # The projector and the tower.
    projector = projector_rules(arch.projector)
    rows += rules.with_prefix(projector, hf_key=PROJECTOR, path="projector/")
    return rows + rules.with_prefix(hf.vision_rules(arch.vision), hf_key=TOWER, path="vision/")


def release_ignorable(arch: presets.WingsArch) -> tuple[str, ...]:
    """Returns the keys that a release checkpoint may hold beyond `release_rules`."""
    prefix = TOWER.replace(".", r"\.")
    tower = tuple(prefix + pattern for pattern in hf.vision_ignorable(arch.vision))
    textual = () if "textual" in arch.learners else IGNORABLE_WITHOUT_TEXTUAL
    return (*hf.decoder_ignorable(arch.decoder), *IGNORABLE, *tower, *textual)
