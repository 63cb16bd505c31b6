"""The generator: any mixture of requests is answered as each would be alone."""

from __future__ import annotations

import dataclasses
import importlib.resources
import math
import random
import types

import hf_directories
import hypothesis
import inference_cases as cases
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from wings_jax.data import conversation, tokenization
from wings_jax.errors import UserError
from wings_jax.inference import decode, device_memory, prefixes
from wings_jax.inference import generator as generator_lib
from wings_jax.inference.answers import stop_tokens
from wings_jax.inference.prompts import Request
from wings_jax.inference.sampling import SamplingParams
from wings_jax.model import hf_config, presets
from wings_jax.scenes import skills
from wings_jax.weights import store

WORDS = ["red", "a cat", "7", "where is it?", "Is 4 even?", "<|im_end|>", "Ünïcode ☃"]
RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (8 + i, 8, 3), np.uint8) for i in range(3)]
PARAMS = [
    SamplingParams(max_new_tokens=7, logprobs=True),
    SamplingParams(max_new_tokens=3),
    SamplingParams(max_new_tokens=8, temperature=0.9, top_k=20, top_p=0.9, seed=5),
    SamplingParams(max_new_tokens=8, temperature=1.3, min_p=0.01, seed=2**40 + 1),
]


@pytest.fixture(scope="module")
def generators():
    """One generator that answers four at a time, and one that answers one."""
    return [cases.generator(rows) for rows in (4, 1)]


@st.composite
def requests(draw) -> Request:
    """A text or an image question, one or two turns."""
    text = " ".join(draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=3)))
    images = draw(st.lists(st.sampled_from(IMAGES), max_size=1))
    turns = [{"from": "human", "value": text}]
    if draw(st.booleans()):
        turns = [
            {"from": "human", "value": "hi"},
            {"from": "gpt", "value": "hello"},
            *turns,
        ]
    return Request(turns, images, draw(st.sampled_from(PARAMS)))


@hypothesis.settings(max_examples=5, deadline=None, derandomize=True)
@hypothesis.given(st.lists(requests(), min_size=2, max_size=11))
def test_continuous_batching_equals_single_requests(generators, batch):
    many, one = generators
    for together, request in zip(many.generate(batch), batch, strict=True):
        alone = one.generate([request])[0]
        assert dataclasses.replace(together, logprobs=None) == dataclasses.replace(
            alone, logprobs=None
        )
        if together.logprobs is not None:
            np.testing.assert_allclose(together.logprobs, alone.logprobs, rtol=1e-4, atol=1e-5)


def test_logprobs_match_tokens(generators):
    answer = generators[0].generate([Request("red", sampling=PARAMS[0])])[0]
    assert len(answer.logprobs) == len(answer.tokens)
    assert max(answer.logprobs) <= 0
    assert answer.prompt > 0
    assert answer.reason in ("stop", "length")


def test_repetition_penalty_excludes_generated_tokens(generators):
    params = SamplingParams(max_new_tokens=12, repetition_penalty=1e6)
    answer = generators[1].generate([Request("red", sampling=params)])[0]
    assert len(set(answer.tokens)) == len(answer.tokens)


def test_stop_string_ends_an_answer(generators):
    free = generators[1].generate([Request("red", sampling=SamplingParams(max_new_tokens=8))])[0]
    middle = len(free.text) // 2
    params = SamplingParams(max_new_tokens=8, stop=(free.text[middle : middle + 2],))
    answer = generators[1].generate([Request("red", sampling=params)])[0]
    assert answer.reason == "string"
    assert answer.text == free.text[: free.text.find(params.stop[0])]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("  "), "prompt is empty"),
        (Request("red " * 300), "too many"),
        (Request("<image>" * 63, IMAGES[:1] * 63), r"\(252 of them .* 255 before .*: \d+ too"),
        (Request("<image> <image>", IMAGES[:1] * 3), "3 images, 2 <image>"),
        (Request("<image> <image>", IMAGES[:1]), r"1 image\(s\), 2 <image>"),
        (Request("red", ["no/such.png"]), "no/such.png"),
        (Request([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]), "answer"),
        (Request([{"role": "human"}]), "from"),
    ],
)
def test_batch_names_a_wrong_request_and_answers_the_others(generators, request_, message):
    good = Request("red", sampling=PARAMS[1])
    with pytest.raises(UserError, match=message) as caught:
        generators[1].generate([good, request_])
    assert "request 2" in str(caught.value)
    answers = dict(generators[1].answers([request_, good]))
    assert isinstance(answers[0], UserError)
    assert answers[1] == generators[1].generate([good])[0]


def test_a_common_beginning_is_computed_once(generators, monkeypatch):
    """Of texts that begin alike, in any order and number; the answers are those of each alone."""
    shared = "a cat 7 where is it? " * 6
    texts = [
        Request(shared + rest, sampling=PARAMS[index % 2 * 2])
        for index, rest in enumerate(["red", "Is 4 even?", "7 7 7 7 7 7", "a", "cat"])
    ]
    computed = []
    compute = prefixes.compute_prefix
    monkeypatch.setattr(
        prefixes, "compute_prefix", lambda *args: computed.append(args[2].count) or compute(*args)
    )

    together = generators[0].generate(texts)
    assert len(computed) == 1
    assert computed[0] >= 48
    alone = [generators[1].generate([text])[0] for text in texts]
    assert len(computed) == 1  # one text has nothing in common with others
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    np.testing.assert_allclose(together[0].logprobs, alone[0].logprobs, rtol=1e-4, atol=1e-5)


def test_a_batch_has_one_kv_cache_at_a_time(generators, monkeypatch):
    """Rows that end together give up their cache before the next rows get theirs."""
    requests, alive = [Request("red", sampling=PARAMS[1]) for _ in range(8)], []
    prefill = decode.prefill

    def counted(*args, **kwargs):
        # Keys and values have three axes, and the slots of this batch's caches.
        slots = dict(kwargs["slots"])["main"]
        arrays = [x for x in jax.live_arrays() if x.ndim == 3 and x.shape[1] == slots]
        alive.append(len(arrays))
        return prefill(*args, **kwargs)

    monkeypatch.setattr(decode, "prefill", counted)
    generators[0].generate(requests)
    assert alive == [0, 0]


def test_bfloat16_answers_match_float32():
    directory = importlib.resources.files("wings_jax") / "assets" / "tiny" / "llm"
    llm = hf_config.decoder_from_hf(store.read_config(directory))
    params = {"decoder": hf_directories.load_llm(directory, llm)}
    rng, sampling = random.Random(0), SamplingParams(max_new_tokens=6)
    names = [name for name in skills.SKILLS for _ in range(3)]
    requests = [Request(skills.sample(rng, name, "test")[0], (), sampling) for name in names]
    arch = presets.WingsArch(llm, cases.VISION)
    texts = []
    for dtype in ("float32", "bfloat16"):
        arguments = arch, params, cases.tokenizer(), "chatml"
        model = generator_lib.Generator(*arguments, dtype=dtype)
        texts.append([answer.text for answer in model.generate(requests)])
    same = sum(one == other for one, other in zip(*texts, strict=True))
    assert same >= 0.9 * len(requests)


def test_device_memory_check_refuses_caches_that_do_not_fit(generators, monkeypatch):
    spec, slots = generators[0].spec, {"main": 30, "textual": 20, "visual": 8}
    shapes = {"main": (16, 30, 4), "textual": (16, 20, 4), "visual": (16, 8, 4)}  # 4 rows, 4 heads
    sizes = [2 * 2 * 4 * math.prod(shape) for shape in shapes.values()]  # k and v, layers, bytes
    assert device_memory.cache_bytes(spec, 4, slots) == sum(sizes)
    monkeypatch.setattr(device_memory, "free_bytes", lambda _: sum(sizes) - 1)
    with pytest.raises(UserError, match=r"4 conversation.* of 30 slots .*lower --batch-size"):
        device_memory.check_memory(spec, 4, slots)
    device_memory.check_memory(spec, 3, slots)
    with pytest.raises(UserError, match=r"caches.*--max-new-tokens"):
        generators[0].generate([Request("red", sampling=SamplingParams(max_new_tokens=100))] * 4)


def test_device_memory_is_read_from_the_devices():
    device = types.SimpleNamespace(platform="gpu", process_index=0)
    device.memory_stats = lambda: {"bytes_limit": 10, "bytes_in_use": 3}
    assert device_memory.free_bytes([device, device]) == 14
    device.memory_stats = lambda: None
    assert device_memory.free_bytes([device]) is None
    assert device_memory.free_bytes(jax.devices()) > 0


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_out_of_memory_error_gives_advice(generators, monkeypatch, stage):
    request = Request("red", (), SamplingParams(max_new_tokens=4))

    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    chat = generators[1].chat()
    text = "".join(chat.ask("Hi.", (), request.sampling))
    before = list(chat.turns)
    with monkeypatch.context() as patch:
        patch.setattr(decode, stage, fail)
        patch.setattr(decode, "extend", fail)
        for ask in (generators[0].generate, lambda _: list(generators[1].stream(request))):
            with pytest.raises(UserError, match=r"allocating 9 bytes.*lower --batch-size"):
                ask([request, request])
        with pytest.raises(UserError, match="out of memory"):
            list(chat.ask("Hi.", (), request.sampling))
    assert chat.turns == before
    chat.undo()
    assert "".join(chat.ask("Hi.", (), request.sampling)) == text


def test_other_device_errors_are_not_changed(generators, monkeypatch):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(decode, "prefill", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        generators[0].generate([Request("red")])


def test_sampling_params_out_of_range_are_refused():
    for wrong in ({"temperature": -1}, {"top_p": 1.5}, {"max_new_tokens": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            SamplingParams(**wrong)


def test_stop_tokens_include_the_end_of_turn():
    tokenizer = cases.tokenizer()
    template = conversation.TEMPLATES["chatml"]
    stops = stop_tokens(tokenizer, template)
    assert tokenization.as_text_tokenizer(tokenizer).id_of("<|im_end|>") in stops
