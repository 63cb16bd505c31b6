"""Parity: the `release` semantics reproduce what the authors' PyTorch release computed.

The golden arrays were made by running the release itself. They are not part of this project, but
in `../shared/fixtures`; without them these tests are skipped.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wings_jax import tree
from wings_jax.model import decoder, hf_config, layout, parameters, presets, vision
from wings_jax.weights import hf, release, sources, store, transfer

FIXTURES = pathlib.Path(__file__).parents[2] / "shared" / "fixtures"
pytestmark = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason="the golden arrays (../shared/fixtures) are not here"
)

BOTH = {"learners": ("visual", "textual"), "router": True, "gain": 2.0}
CASES = {
    # arrays: (weights and config, entries of WingsArch)
    "wings_qwen2_a_stage1": ("wings_qwen2", {"learners": ("visual",)}),
    "wings_qwen2_a2_stage1_textonly_none": ("wings_qwen2", {"learners": ("visual",)}),
    "wings_qwen2_b_image": ("wings_qwen2", BOTH),
    "wings_qwen2_d1_text_none": ("wings_qwen2", BOTH),
    "wings_qwen2_i_image_first": ("wings_qwen2", BOTH),
    "wings_qwen2_gqa_f_image": ("wings_qwen2_gqa", BOTH),
    "wings_qwen2_gqa_f_text": ("wings_qwen2_gqa", BOTH),
    "llava_qwen2_b_image": ("wings_qwen2", {}),
    "wings_llama_a_stage1": ("wings_llama", {"learners": ("visual",)}),
    "wings_llama_b_image": ("wings_llama", BOTH),
    "wings_llama_d1_text_none": ("wings_llama", BOTH),
}


class Golden:
    """One golden case: its arrays, the architecture, the parameters, its rows as a layout."""

    def __init__(self, case: str):
        weights, wings_entries = CASES[case]
        self.arrays = dict(np.load(FIXTURES / f"{case}.npz"))
        config = json.loads((FIXTURES / f"{weights}.json").read_text())
        family = config["model_type"].removeprefix("wings_").removeprefix("llava_")
        arch = presets.WingsArch(
            hf_config.decoder_from_hf({**config, "model_type": family}),
            presets.VISION["siglip_base_224"],
            projector="identity",
            rank=config["lora_dim"],
            semantics=presets.release_semantics(config["system_prompt_length"]),
            **wings_entries,
        )
        self.arch = arch
        self.flat = self._import(FIXTURES / f"{weights}.safetensors")
        self.rows, self.features = self.expand(config["image_token_length"])

    def _import(self, file: pathlib.Path) -> dict[str, np.ndarray]:
        table = [r for r in release.release_rules(self.arch) if r.path.startswith("decoder/")]
        ours = {
            p: s
            for p, s in parameters.abstract_params(self.arch).items()
            if p.startswith("decoder/")
        }
        unused = r"model\.layers\.\d+\.(attn_pool|attn_t_pool|reweight_module)\..*"
        ignorable = [*release.release_ignorable(self.arch), unused]
        flat = transfer.import_tree(table, store.open_file(file), ours, ignorable=ignorable)
        return {path.removeprefix("decoder/"): array for path, array in flat.items()}

    def expand(self, patches: int, length: int = 0) -> tuple[layout.Layout, np.ndarray]:
        """Returns the slots of the rows, each image token replaced by its features."""
        ids, mask = self.arrays["input_ids"], self.arrays["attention_mask"].astype(bool)
        width = self.arch.decoder.hidden_size
        slots = [list(row[used]) for row, used in zip(ids, mask, strict=True)]
        length = length or max(len(row) + (patches - 1) * (-200 in row) for row in slots)
        tokens = np.zeros((len(slots), length), np.int64)
        modality = np.full((len(slots), length), layout.PADDING)
        features = np.zeros((len(slots), length, width), np.float32)

        for b, row in enumerate(slots):
            start = 0
            for token in row:
                count = patches if token == -200 else 1
                span = slice(start, start + count)
                modality[b, span] = layout.IMAGE if token == -200 else layout.TEXT
                if token == -200:
                    features[b, span] = self.arrays["image_features"][b]
                else:
                    tokens[b, start] = token
                start += count

        prompt_length = self.arch.semantics.prompt_length
        return layout.make_layout(tokens, modality, prompt_length=prompt_length), features

    @property
    def is_used(self) -> np.ndarray:
        return self.rows.modality != layout.PADDING

    def targets(self) -> np.ndarray:
        """Returns i32[B,T], the next slot's label where it has a loss, else IGNORE."""
        labels, mask = self.arrays["labels"], self.arrays["attention_mask"].astype(bool)
        ids = self.arrays["input_ids"]
        out = np.full(self.rows.tokens.shape, layout.IGNORE)
        for b in range(len(out)):
            patches = (self.rows.modality[b] == layout.IMAGE).sum()
            expanded: list[int] = []
            for token, label in zip(ids[b][mask[b]], labels[b][mask[b]], strict=True):
                expanded += [layout.IGNORE] * patches if token == -200 else [label]
            out[b, : len(expanded) - 1] = expanded[1:]
        return out

    def run(self, flat, features, rows=None):
        """Returns logits, normed states and what the layers sow."""
        rows = self.rows if rows is None else rows
        module = decoder.Decoder(self.arch)
        params = {"params": tree.nest(flat)}
        embedded = jnp.asarray(flat["embed/embedding"])[rows.tokens]
        modality = rows.modality[..., None]
        x0 = jnp.where(modality == layout.IMAGE, features, embedded)
        x0 = jnp.where(modality == layout.PADDING, 0.0, x0)

        hidden, sown = module.apply(params, x0, rows, mutable=["intermediates"])
        logits = module.apply(params, hidden, method=decoder.Decoder.logits)
        return logits, hidden, sown["intermediates"]["layers"]

    def loss(self, logits) -> jax.Array:
        targets = self.targets()
        counted = targets != layout.IGNORE
        logp = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(logp, np.where(counted, targets, 0)[..., None], -1)[..., 0]
        return -jnp.where(counted, picked, 0.0).sum() / counted.sum()


@pytest.mark.parametrize("case", CASES)
def test_forward(case: str):
    """Logits, loss, all hidden states, both learners before their gates, the router's weights."""
    golden = Golden(case)
    logits, hidden, sown = jax.jit(golden.run)(golden.flat, golden.features)
    is_used, arrays = golden.is_used, golden.arrays

    def assert_close(result, expected):
        result = np.asarray(result)[is_used]
        np.testing.assert_allclose(result, expected[is_used], rtol=1e-5, atol=1e-5)

    assert_close(logits, arrays["logits"])
    assert_close(hidden, arrays["hidden_states"][-1])
    for layer in range(golden.arch.decoder.num_layers - 1):
        assert_close(sown["hidden"][0][layer], arrays["hidden_states"][layer + 1])
    np.testing.assert_allclose(golden.loss(logits), arrays["loss"], rtol=1e-5)

    names = {"visual_learner": "visual_wing", "text_learner": "textual_wing", "router": "gates"}
    for release_name, sown_name in names.items():
        for layer, expected in enumerate(arrays.get(release_name, ())):
            assert_close(sown[sown_name][0][layer], expected)


WITH_GRADIENTS = [
    "wings_qwen2_b_image",
    "wings_qwen2_gqa_f_image",
    "wings_llama_b_image",
    "llava_qwen2_b_image",
]


@pytest.mark.parametrize("case", WITH_GRADIENTS)
def test_gradients(case: str):
    golden = Golden(case)

    def loss(flat, features):
        return golden.loss(golden.run(flat, features)[0])

    grads, by_feature = jax.jit(jax.grad(loss, (0, 1)))(golden.flat, golden.features)
    grads = {f"decoder/{path}": np.asarray(g) for path, g in grads.items()}
    table = release.release_rules(golden.arch)
    exported = {key: np.asarray(t) for key, t in transfer.export_tree(table, grads).items()}
    is_image = golden.rows.modality[0] == layout.IMAGE
    exported["image_features"] = np.asarray(by_feature)[:, is_image]

    stored = {k.removeprefix("grad/"): v for k, v in golden.arrays.items() if k.startswith("grad/")}
    assert len(stored) >= 9
    for key, expected in stored.items():
        grad = exported[key.removesuffix("[:,:S]")]
        if key.endswith("[:,:S]"):
            grad = grad[:, : expected.shape[1]]
        scale = np.abs(expected).max()
        np.testing.assert_allclose(grad, expected, atol=1e-4 * scale, rtol=1e-4, err_msg=key)

    if case == "wings_qwen2_b_image":
        norms = json.loads((FIXTURES / "wings_qwen2_grad_norms.json").read_text())
        for key, norm in norms[f"{case}/grad_norms"].items():
            computed = np.linalg.norm(exported[key].astype(np.float64))
            assert computed == pytest.approx(norm, rel=1e-4, abs=1e-7), key


@pytest.mark.parametrize("prompt", ["image", "text"])
def test_greedy_ids(prompt: str):
    """The whole row is computed again for every token, as by the release."""
    golden = Golden("wings_qwen2_b_image")
    arrays = np.load(FIXTURES / "wings_qwen2_h_generate.npz")
    expected = arrays[f"{prompt}_output_ids"][0]
    ids = arrays[f"{prompt}_input_ids"][0]
    patches = golden.arrays["image_features"].shape[1]
    length = len(expected) + (patches if prompt == "image" else 0)
    run = jax.jit(golden.run)

    for _ in range(len(expected) - len(ids)):
        golden.arrays |= {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)))}
        golden.arrays["image_features"] = arrays["image_features"]
        rows, features = golden.expand(patches, length=length)
        logits, _, _ = run(golden.flat, features, rows)
        last = (rows.modality[0] != layout.PADDING).sum() - 1
        ids = np.append(ids, np.argmax(logits[0, last]))
    np.testing.assert_array_equal(ids, expected)


def test_tower_and_projector():
    """From normalized pixels to tower features and projector outputs."""
    arrays = np.load(FIXTURES / "siglip_tiny.npz")
    config = json.loads((FIXTURES / "siglip_tiny.json").read_text())
    # With mean 0 and deviation 1/255 the model's own normalization is the identity.
    arch = presets.VisionArch(
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        ffn_size=config["intermediate_size"],
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        activation=config["hidden_act"],
        norm_eps=config["layer_norm_eps"],
        class_token=False,
        pre_norm=False,
        post_norm=True,
        patch_bias=True,
        mean=(0.0, 0.0, 0.0),
        std=(1 / 255, 1 / 255, 1 / 255),
    )
    width = arrays["projector_output"].shape[-1]
    tensors = store.open_file(FIXTURES / "siglip_tiny.safetensors")
    tower = hf.vision_tensors(tensors, "siglip_tiny")
    decoder_arch = dataclasses.replace(sources.ANY_DECODER, hidden_size=width)
    shapes = tree.nest(parameters.abstract_params(presets.WingsArch(decoder_arch, arch)))
    flat = transfer.import_tree(
        hf.vision_rules(arch),
        tower,
        tree.flatten(shapes["vision"]),
        ignorable=hf.vision_ignorable(arch),
    )
    pixels = arrays["pixel_values"].transpose(0, 2, 3, 1)
    features = vision.VisionTower(arch).apply({"params": tree.nest(flat)}, pixels)
    np.testing.assert_allclose(features, arrays["tower_output"], rtol=1e-5, atol=1e-5)

    head = {k[k.index("mm_projector.") + 13 :]: t for k, t in tensors.items() if "mm_proj" in k}
    table = release.projector_rules("mlp2x_gelu")
    params = tree.nest(transfer.import_tree(table, head, tree.flatten(shapes["projector"])))
    projected = vision.Projector("mlp2x_gelu", width).apply({"params": params}, features)
    np.testing.assert_allclose(projected, arrays["projector_output"], rtol=1e-5, atol=1e-5)
