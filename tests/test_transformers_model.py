"""The torch code of `export --format transformers` computes what the JAX model computes."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny_model

from wings_jax import tree
from wings_jax.model import layout
from wings_jax.model.wings import Wings
from wings_jax.training import loss as loss_lib
from wings_jax.weights import transformers_format

pytest.importorskip("torch")
import torch
import transformers_cases as cases

VARIANTS, ROWS = cases.VARIANTS, cases.ROWS


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_loss_equal_the_jax_models(name, attention):
    """With padding on either side; the loss is the mean over all targets of the batch."""
    arch = VARIANTS[name]
    model, params, other = cases.torch_model(arch, attention=attention)
    batch = cases.batch_of(arch, ROWS)
    wanted = tiny_model.logits(model, params, batch)
    used = batch.layout.modality != layout.PADDING
    with torch.no_grad():
        right = other(**cases.torch_inputs(arch, batch))
        left = other(**cases.torch_inputs(arch, batch, left=True))
    np.testing.assert_allclose(right.logits.numpy()[used], wanted[used], atol=1e-4)
    for row, count in enumerate(used.sum(1)):
        found = left.logits[row, -count:].numpy()
        np.testing.assert_allclose(found, wanted[row, :count], atol=1e-4)

    # Cross-entropy of the JAX model's logits.
    is_target = batch.targets != layout.IGNORE
    log_probs = np.asarray(jax.nn.log_softmax(wanted))
    index = np.where(is_target, batch.targets, 0)[..., None]
    losses = -np.take_along_axis(log_probs, index, axis=-1)[..., 0]
    for output in (right, left):
        np.testing.assert_allclose(output.loss.item(), losses[is_target].mean(), atol=1e-4)


def test_loss_and_gradients_equal_those_of_training():
    """The function that the trainer minimizes, with some answers left out, by `labels`."""
    arch = VARIANTS["router"]
    model, params, other = cases.torch_model(arch)
    batch = cases.batch_of(arch, ROWS)
    targets = np.array(batch.targets)
    targets[:, ::3] = layout.IGNORE
    batch = layout.Batch(batch.layout, targets, batch.images)

    def mean_loss(params):
        hidden = model.apply({"params": params}, batch)
        total, _ = loss_lib.token_loss(model, params, hidden, batch.targets, chunk=8)
        return total / (targets != layout.IGNORE).sum()

    wanted, gradients = jax.jit(jax.value_and_grad(mean_loss))(params)
    loss = other(**cases.torch_inputs(arch, batch, left=True)).loss
    np.testing.assert_allclose(loss.item(), float(wanted), atol=1e-4)

    # The gradient of every parameter that the loss depends on, under the exported names.
    loss.backward()
    found = dict(other.named_parameters())
    table = transformers_format.wings_rules(arch)
    exported = cases.transfer.export_tree(table, tree.flatten(gradients))
    assert exported.keys() == found.keys()
    for key, tensor in exported.items():
        expected, actual = np.asarray(tensor), found[key].grad
        actual = np.zeros_like(expected) if actual is None else actual.numpy()
        scale = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(actual, expected, atol=1e-4 * scale, err_msg=key)


def test_labels_of_images_and_padding_have_no_loss():
    """`labels = input_ids` is what people write first."""
    arch = VARIANTS["both"]
    _, _, other = cases.torch_model(arch)
    batch = cases.batch_of(arch, ROWS)
    for left in (False, True):
        inputs = cases.torch_inputs(arch, batch, left=left)
        is_learned = (inputs["input_ids"] != cases.IMAGE_TOKEN) & inputs["attention_mask"].bool()
        is_learned[:, 1:] &= inputs["attention_mask"].bool()[:, :-1]
        by_hand = inputs["input_ids"].masked_fill(~is_learned, layout.IGNORE)
        with torch.no_grad():
            wanted = other(**{**inputs, "labels": by_hand}).loss
            found = other(**{**inputs, "labels": inputs["input_ids"]}).loss
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_ids_equal_the_jax_models(name):
    """Batched and padded on the left, each row alone, with and without a cache."""
    arch = VARIANTS[name]
    model, params, other = cases.torch_model(arch)
    wanted = cases.greedy_ids(model, params, ROWS)
    inputs = cases.generate_inputs(arch, ROWS)
    assert cases.generate(other, inputs) == wanted
    assert cases.generate(other, inputs, use_cache=False) == wanted
    for row, ids in zip(ROWS, wanted, strict=True):
        assert cases.generate(other, cases.generate_inputs(arch, [row])) == [ids]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_table_is_total(name):
    arch = VARIANTS[name]
    flat = tree.flatten(tiny_model.init(Wings(arch)))
    table = transformers_format.wings_rules(arch)
    assert sorted(rule.path for rule in table) == sorted(flat)
