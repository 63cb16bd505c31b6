"""FLOPs by part: against the traced program, XLA's count, and the figures of 7B."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_model
from jax.extend import core
from jax.interpreters import partial_eval

from wings_jax.model import decoder, flops, layout, parameters, presets
from wings_jax.model.wings import Wings
from wings_jax.training import step

DECODER = dataclasses.replace(
    tiny_model.DECODER, vocab_size=512, hidden_size=128, head_dim=32, ffn_size=384
)
VISION = dataclasses.replace(
    tiny_model.VISION, hidden_size=64, ffn_size=192, image_size=64, feature_layer=-2
)
STAGE1 = r"projector/", "decoder/layers/visual/"
ROWS, SLOTS = 2, 160


def arch(learners: tuple[str, ...], layers: int = 3, **changes) -> presets.WingsArch:
    """Returns a model whose LLM has so many layers; with one, the tower has one too."""
    return presets.WingsArch(
        dataclasses.replace(DECODER, num_layers=layers),
        dataclasses.replace(VISION, num_layers=2 if layers == 1 else 3),
        learners=learners,
        router=len(learners) == 2,
        rank=8,
        router_positions=SLOTS,
        **changes,
    )


def make_program(
    model: presets.WingsArch, remat: str, trained: tuple[str, ...], kernel: str = "einsum"
):
    """Returns a training step, its inputs, and the trained paths; einsum has no loop of blocks."""
    shapes = parameters.abstract_params(model)
    chosen = {path: leaf for path, leaf in shapes.items() if path.startswith(trained)}
    frozen = {path: leaf for path, leaf in shapes.items() if path not in chosen}
    optimizer = optax.sgd(0.1)
    counter = jax.ShapeDtypeStruct((), jnp.int32)
    state = step.TrainState(
        counter, counter, chosen, frozen, jax.eval_shape(optimizer.init, chosen)
    )

    slots = np.ones((ROWS, SLOTS), np.int32)
    pixels = np.zeros((ROWS, 1, 64, 64, 3), np.uint8)
    batch = layout.Batch(layout.make_layout(slots, slots), slots, pixels)
    model = Wings(model, jnp.float32, kernel, remat)
    update = step.make_train_step(model, optimizer, loss_chunk=SLOTS, accumulation=1)
    return update, (state, batch), chosen.keys()


def inner_programs(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def count_products(program: core.Jaxpr) -> int:
    """Returns the operations of all matrix products, the body of a scan as often as it runs."""
    total = 0
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            summed = math.prod(shape[axis] for axis in contracted)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * summed
        repeated = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += repeated * sum(map(count_products, inner_programs(equation)))
    return total


def trace(update, inputs) -> core.Jaxpr:
    """Returns the traced program without what nothing uses."""
    closed = jax.make_jaxpr(update)(*inputs)
    program, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return program


CASES = {
    "stage 2": (arch(("visual", "textual")), ("projector/", "decoder/")),
    "stage 1": (arch(("visual",)), STAGE1),
    "llava": (arch(()), ("projector/", "decoder/")),
    "lora": (
        arch((), lora_rank=4, lora_targets=("q", "down")),
        (
            "projector/",
            *(f"decoder/layers/{x}/{ab}" for x in ("attn/q", "mlp/down") for ab in "ab"),
        ),
    ),
    "prefix": (arch((), prefix_length=5), ("decoder/layers/prefix/",)),
    "everything": (arch(("visual", "textual")), ("vision/", "projector/", "decoder/")),
    "head": (arch(()), ("decoder/head/",)),
}


def test_every_remat_policy_has_its_operations():
    assert flops.RECOMPUTED.keys() == decoder.REMAT.keys()


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
@pytest.mark.parametrize("case", CASES)
def test_flops_are_those_of_the_traced_program(case, remat):
    """Every product of the program is counted, none twice.

    The program also sums the gradients of biases by products, which are less than 0.2 % here.
    """
    model, trained = CASES[case]
    update, inputs, paths = make_program(model, remat, trained)
    program = trace(update, inputs)

    work = flops.padded_workload(model, ROWS, SLOTS, images=1)
    parts = flops.count_flops(model, work, paths, remat)
    total = sum(part.executed for part in parts.values())
    assert total <= count_products(program) <= 1.002 * total


@pytest.mark.parametrize("case", ["stage 2", "stage 1", "llava"])
def test_save_dots_computes_no_product_again(case):
    """A kernel that names its results: the einsum does not. Gating is an einsum without a sum."""
    model, trained = CASES[case]

    def count(remat: str) -> int:
        update, inputs, _ = make_program(model, remat, trained, "chunked")
        return count_products(trace(update, inputs))

    assert count("save_dots") == pytest.approx(count("none"), rel=1e-4)
    assert count("none") < count("save_attn") < count("full")


@pytest.mark.slow
def test_flops_agree_with_xla():
    """XLA counts the body of a loop once, so the stacks have one layer; and no pallas kernel."""
    # Without rematerialization: of one layer, XLA drops what is computed again.
    model, remat = arch(("visual", "textual"), layers=1), "none"
    update, inputs, paths = make_program(model, remat, ("projector/", "decoder/"))
    compiled = jax.jit(update).lower(*inputs).compile()

    work = flops.padded_workload(model, ROWS, SLOTS, images=1)
    parts = flops.count_flops(model, work, paths, remat)
    counted = compiled.cost_analysis()["flops"]
    assert counted == pytest.approx(sum(part.executed for part in parts.values()), rel=0.05)


def seven_billion(learners: tuple[str, ...]) -> presets.WingsArch:
    return presets.WingsArch(
        presets.DECODERS["qwen1_5_7b"],
        presets.VISION["siglip_so400m_384"],
        learners=learners,
        router=len(learners) == 2,
    )


@pytest.mark.parametrize(
    ("learners", "trained", "expected"),
    [
        (("visual", "textual"), ("projector/", "decoder/"), 97.9e12),
        ((), ("projector/", "decoder/"), 91.3e12),
        (("visual",), STAGE1, 64.7e12),
        ((), ("projector/",), 62.2e12),
    ],
)
def test_flops_of_7b_are_those_of_the_formulas(learners, trained, expected):
    """Per row of 2048 slots, an image at slot 14, causal attention counted half.

    The formulas take half of T x T for the textual learner too, with keys of all slots.
    """
    model = seven_billion(learners)
    slots, image, start = 2048, model.vision.num_patches, 14
    half = slots**2 // 2
    pairs = {
        "main": half,
        "textual": half,
        "visual": image**2 // 2 + (slots - start - image) * image,
    }
    work = flops.Workload(slots, 1, {"visual": image, "textual": slots}, pairs)
    shapes = parameters.abstract_params(model)
    paths = [path for path in shapes if path.startswith(trained)]
    total = flops.model_flops(model, work, paths)
    # The formulas give the projector's first layer a gradient of its input, which nobody needs,
    # and the tower 27 layers; 26 are read.
    assert total == pytest.approx(expected, rel=2e-3)


def test_workload_of_a_packed_batch_counts_visible_pairs():
    tokens = np.ones((2, 12), np.int32)
    modality = np.full((2, 12), layout.TEXT)
    modality[0, 1:5] = modality[0, 7:11] = layout.IMAGE
    modality[0, 11] = modality[1, 5:] = layout.PADDING
    segments = np.array([[1] * 6 + [2] * 5 + [0], [1] * 5 + [0] * 7])
    rows = layout.make_layout(tokens, modality, segments)
    model = dataclasses.replace(arch(()), vision=dataclasses.replace(VISION, image_size=16))
    batch = layout.Batch(rows, tokens, np.zeros((2, 2, 16, 16, 3), np.uint8))
    work = flops.count_workload(batch, model)

    assert (work.slots, work.images, work.keys) == (16, 2, {"visual": 8, "textual": 8})
    query = layout.query_visibility(rows)
    for name, index in {"main": layout.MAIN, **layout.LEARNERS}.items():
        mask = layout.visible(query, layout.key_visibility(rows, index))
        assert work.pairs[name] == int(mask.sum()), name


def test_workload_of_release_semantics_counts_visible_pairs():
    modality = np.array([[1, 1, 2, 2, 2, 2, 1, 1, 0]])
    rows = layout.make_layout(modality, modality, prompt_length=1)
    model = dataclasses.replace(arch(()), vision=dataclasses.replace(VISION, image_size=16))
    batch = layout.Batch(rows, modality, np.zeros((1, 1, 16, 16, 3), np.uint8))
    work = flops.count_workload(batch, model)
    query = layout.query_visibility(rows)
    for name, index in {"main": layout.MAIN, **layout.LEARNERS}.items():
        mask = layout.visible(query, layout.key_visibility(rows, index))
        assert work.pairs[name] == int(mask.sum()), name
