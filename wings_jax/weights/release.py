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
# Stage 1 saves the textual learners as they were initialised.
IGNORABLE_WITHOUT_TEXTUAL = (r"model\.layers\.\d+\.attn_t_pool\..*",)


def projector_depth(kind: str) -> int:
    """Returns how many linear layers a projector of this kind has."""
    if kind in ("identity", "linear"):
        return int(kind == "linear")
    return int(kind.removeprefix("mlp").removesuffix("x_gelu"))


def projector_rules(kind: str) -> tuple[rules.Rule, ...]:
    """Returns the table of `mm_projector`; ours are paths below `projector/`."""
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
    rows = rules.under(hf.decoder_rules(arch.decoder), ours="decoder/")
    for name in arch.learners:
        key = f"model.layers.{rules.LAYER}.{LEARNERS[name]}."
        rows += rules.under(LEARNER, foreign=key, ours=f"decoder/layers/{name}/")
    if arch.router:
        rows += rules.under(ROUTER, ours="decoder/")
    rows += rules.under(projector_rules(arch.projector), foreign=PROJECTOR, ours="projector/")
    return rows + rules.under(hf.vision_rules(arch.vision), foreign=TOWER, ours="vision/")


def release_ignorable(arch: presets.WingsArch) -> tuple[str, ...]:
    """Returns the keys that a release checkpoint may hold beyond `release_rules`."""
    prefix = TOWER.replace(".", r"\.")
    tower = tuple(prefix + pattern for pattern in hf.vision_ignorable(arch.vision))
    unused = () if "textual" in arch.learners else IGNORABLE_WITHOUT_TEXTUAL
    return (*hf.decoder_ignorable(arch.decoder), *IGNORABLE, *tower, *unused)
