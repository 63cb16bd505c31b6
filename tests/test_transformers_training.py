"""The exported torch code in training and in generation beyond greedy ids: torch alone."""

from __future__ import annotations

import copy
import re

import pytest

pytest.importorskip("torch")
import torch
import transformers_cases as cases

VARIANTS, ROWS = cases.VARIANTS, cases.ROWS
# What is trained: regular expressions of parameter names.
SUBSETS = {
    "all": r".*",
    "learners and router": r".*\.(learners|router)\..*",
    "projector": r".*\.projector\..*",
    "LLM": r".*language_model\.(layers\.\d+\.(self_attn|mlp)|embed_tokens)\..*",
    "LoRA": r".*\.lora_[ab]\..*",
    "prefix": r".*\.prefix\..*",
}


def gradients(other, inputs: dict, subset: str, *, checkpointing: bool, reentrant: bool = False):
    """Returns the gradients of the parameters of a subset; the others do not require any."""
    other.train()
    for name, parameter in other.named_parameters():
        parameter.requires_grad_(re.fullmatch(subset, name) is not None)
        parameter.grad = None
    if checkpointing:
        other.gradient_checkpointing_enable({"use_reentrant": reentrant})
        other.enable_input_require_grads()
    other(**inputs).loss.backward()
    if checkpointing:
        other.gradient_checkpointing_disable()
        other.disable_input_require_grads()
    return {
        name: parameter.grad
        for name, parameter in other.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize(
    ("name", "subset"),
    [
        ("router", "all"),
        ("router", "learners and router"),
        ("router", "projector"),
        ("router", "LLM"),
        ("release", "learners and router"),
        ("some_layers", "all"),
        ("lora", "LoRA"),
        ("prefix", "prefix"),
    ],
)
def test_gradient_checkpointing_changes_no_gradient(name, subset):
    arch = VARIANTS[name]
    _, _, other = cases.torch_model(arch)
    inputs = cases.torch_inputs(arch, cases.batch_of(arch, ROWS))
    wanted = gradients(other, inputs, SUBSETS[subset], checkpointing=False)
    assert wanted
    for reentrant in (False, True):
        found = gradients(other, inputs, SUBSETS[subset], checkpointing=True, reentrant=reentrant)
        assert found.keys() == wanted.keys()
        for key, gradient in wanted.items():
            torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-6, msg=key)
    # Those of layers without learners, and what the loss does not depend on, have none.
    reached = [key for key, gradient in wanted.items() if gradient is not None and gradient.any()]
    assert len(reached) >= len(wanted) // 2


@pytest.mark.parametrize("name", ["router", "release", "clip", "prefix", "lora", "visual"])
def test_bfloat16_is_close_to_float32(name):
    """A forward pass, a backward pass and an answer; logits within 3 % of their range."""
    arch = VARIANTS[name]
    _, _, other = cases.torch_model(arch)
    inputs = cases.torch_inputs(arch, cases.batch_of(arch, ROWS), left=True)
    used = inputs["attention_mask"].bool()
    with torch.no_grad():
        wanted = other(**inputs)
    half = copy.deepcopy(other).to(torch.bfloat16)
    found = half(**inputs)
    assert found.logits.dtype == torch.float32
    span = wanted.logits[used].max() - wanted.logits[used].min()
    difference = (found.logits - wanted.logits)[used].abs()
    assert difference.max() < 0.03 * span
    assert (found.loss - wanted.loss).abs() < 0.02 * wanted.loss
    found.loss.backward()
    assert all(p.grad.isfinite().all() for p in half.parameters() if p.grad is not None)

    # The last slots one by one, on the cache of the others; then an answer.
    if arch.semantics.prompt_length is None:
        steps = cached_logits(half, {k: v for k, v in inputs.items() if k != "labels"}, steps=2)
        difference = (steps - wanted.logits[:, -2:]).abs()
        assert difference[used[:, -2:]].max() < 0.03 * span
    assert len(cases.generate(half, cases.generate_inputs(arch, ROWS))[0]) == cases.ANSWER


@torch.no_grad()
def cached_logits(other, inputs: dict, *, steps: int) -> torch.Tensor:
    """Returns f32[B,steps,V] of the last slots, which are text."""
    length = inputs["input_ids"].shape[1] - steps
    heads = {**inputs, **{k: inputs[k][:, :length] for k in ("input_ids", "attention_mask")}}
    output = other(**heads, use_cache=True)
    name = cases.load_code().CACHE
    logits = []
    for end in range(length + 1, length + steps + 1):
        ids, mask = inputs["input_ids"][:, end - 1 : end], inputs["attention_mask"][:, :end]
        logits.append(other(ids, attention_mask=mask, **{name: output[name]}).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("name", ["router", "visual", "release"])
def test_beam_search_with_several_images(name):
    """Every beam has the images of its row; a batch gives what each row gives."""
    arch = VARIANTS[name]
    _, _, other = cases.torch_model(arch)
    inputs = cases.generate_inputs(arch, ROWS)
    batched = cases.generate(other, inputs, num_beams=3)
    assert batched == cases.generate(other, inputs, num_beams=3, use_cache=False)
    for row, ids in zip(ROWS, batched, strict=True):
        assert cases.generate(other, cases.generate_inputs(arch, [row]), num_beams=3) == [ids]


@pytest.mark.parametrize("name", ["router", "visual", "textual", "llava", "some_layers"])
def test_a_conversation_goes_on_with_its_cache(name):
    """A second turn, with an image of its own, on the cache of the first one."""
    arch = VARIANTS[name]
    _, _, other = cases.torch_model(arch)
    inputs = cases.generate_inputs(arch, ["tittitt"])
    patches = arch.vision.num_patches
    first = {
        "input_ids": inputs["input_ids"][:, : 2 + patches],
        "pixel_values": inputs["pixel_values"][:1],
    }
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        output = other.generate(**first, **options, return_dict_in_generate=True)
        cache = getattr(output, cases.load_code().CACHE)
        ids = torch.cat([output.sequences, inputs["input_ids"][:, 2 + patches :]], dim=1)
        second = {"input_ids": ids, "pixel_values": inputs["pixel_values"]}
        wanted = other.generate(**second, **options)
        found = other.generate(**second, **options, **{cases.load_code().CACHE: cache})
    assert torch.equal(found, wanted)


def test_assisted_decoding_is_refused():
    """The cached keys of the learners cannot be cut to a length."""
    arch = VARIANTS["router"]
    _, _, other = cases.torch_model(arch)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        cases.generate(other, cases.generate_inputs(arch, ["ttttt"]), prompt_lookup_num_tokens=2)
