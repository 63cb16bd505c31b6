"""Chat, streaming and the likelihood of given answers."""

from __future__ import annotations

import inference_cases as cases
import jax
import numpy as np
import pytest

from wings_jax.errors import UserError
from wings_jax.inference import chunks, dialogue, streaming
from wings_jax.inference.prompts import Request
from wings_jax.inference.sampling import SamplingParams

RNG = np.random.default_rng(1)
IMAGES = [RNG.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(3)]
PARAMS = SamplingParams(max_new_tokens=6)


@pytest.fixture(scope="module")
def one():
    return cases.generator(1)


def test_chat_equals_its_history_in_one_prompt(one):
    chat = one.chat(system="Be brief.", sampling=PARAMS)
    history = [{"from": "system", "value": "Be brief."}]
    all_images, cached_slots = [], 0
    for text, images in (
        ("Hi.", []),
        ("What is this?", IMAGES[:1]),
        ("And here?", []),
        ("<image> or <image>?", IMAGES[1:]),
        ("Which?", []),
    ):
        answer = "".join(chat.ask(text, images))
        question = "<image>\n" * len(images) + text if "<image>" not in text else text
        all_images += images
        history.append({"from": "human", "value": question})
        expected = one.generate([Request(history, all_images, PARAMS)])[0]
        assert answer == expected.text
        if cached_slots and not (images and len(all_images) == 1):  # the first image opens a cache
            assert chat.computed_slots <= expected.prompt - cached_slots
        cached_slots = expected.prompt
        history.append({"from": "gpt", "value": answer})
        assert chat.turns == history


def test_chat_continues_after_a_partial_answer(one):
    chat = one.chat(sampling=SamplingParams(max_new_tokens=30))
    pieces = chat.ask("Hi.")
    half = next(pieces)
    pieces.close()
    assert chat.turns[-1] == {"from": "gpt", "value": half}
    answer = "".join(chat.ask("Go on.", sampling=PARAMS))
    assert answer == one.generate([Request(chat.turns[:-1], (), PARAMS)])[0].text


def test_chat_undo_and_reset(one):
    chat = one.chat(sampling=PARAMS)
    first = "".join(chat.ask("Hi."))
    list(chat.ask("What is this?", IMAGES[:1]))
    chat.undo()
    assert len(chat.turns) == 2
    assert chat.images == []
    chat.undo()
    assert "".join(chat.ask("Hi.")) == first
    chat.reset()
    assert chat.turns == []
    with pytest.raises(UserError, match="no question"):
        chat.undo()


def test_chat_is_unchanged_by_a_wrong_turn(one):
    chat = one.chat(sampling=PARAMS)
    list(chat.ask("Hi."))
    before = list(chat.turns)
    for text, images in (("red " * 300, []), ("<image><image>", IMAGES[:1]), ("a", ["no.png"])):
        with pytest.raises(UserError):
            list(chat.ask(text, images))
        assert chat.turns == before


def test_streaming_equals_generate(one):
    request = Request("What is this?", IMAGES[:1], SamplingParams(max_new_tokens=9))
    assert "".join(one.stream(request)) == one.generate([request])[0].text


def test_kv_cache_grows_with_a_long_conversation():
    spec, weights, params = cases.make(cases.ARCHS["router"])
    dialog = dialogue.Dialogue(spec, weights, ())
    prompt = cases.random_rows(spec.arch, ["tiit"], seed=3)[0]
    for turn in range(4):
        expected = cases.uncached_greedy(spec, params, [prompt], 5)[0]
        tokens = []
        for piece in dialog.answer(prompt, SamplingParams(max_new_tokens=5)):
            tokens += piece.tokens
        assert tokens == expected
        new = "iit" if turn == 1 else "tt"
        more = cases.random_rows(spec.arch, [new], seed=turn)[0]
        prompt = chunks.join(prompt, cases.text(tokens[: 5 - turn]), more)


def test_common_prefix_of_conversations():
    spec, _, _ = cases.make(cases.ARCHS["plain"])
    row = cases.random_rows(spec.arch, ["tiitiit"], seed=3)[0]
    other = chunks.PromptSlots(row.tokens, row.modality, (row.images[0], row.images[0] ^ 1))
    assert dialogue.common_prefix(row, row) == row.count
    assert dialogue.common_prefix(row, other) == 6
    assert dialogue.common_prefix(chunks.tail(row, 0, 4), chunks.EMPTY) == 0
    assert dialogue.start_of_image(row, 3, 4) == 1
    assert dialogue.start_of_image(row, 5, 4) == 5


def test_streaming_holds_back_stop_strings_and_unfinished_characters():
    text = "ab STOP never ☃"
    stream = streaming.TextStream(lambda tokens: text[: len(tokens)], ["STOP"])
    shown = [stream.add([0]) for _ in range(8)]
    assert "".join(shown) == "ab "
    assert shown[:3] == ["a", "b", " "]
    assert stream.is_cut
    stream = streaming.TextStream(lambda tokens: bytes(tokens).decode(errors="replace"))
    assert [stream.add([byte]) for byte in "☃".encode()] == ["", "", "☃"]
    stream = streaming.TextStream(lambda tokens: "S" * len(tokens), ["SSTOP"])
    assert stream.add([0, 0]) == ""
    assert stream.add([0], is_last=True) == "SSS"


def test_likelihood_is_the_sum_of_log_probabilities():
    arch = cases.with_vocabulary(cases.ARCHS["router"], len(cases.tokenizer()))
    many = cases.generator(4)
    spec, _, params = cases.make(arch)
    requests = [
        (Request("red", ()), ["blue", "a green cat", "7"]),
        (Request("What is this?", IMAGES[:1]), ["yes"]),
    ]
    greedy = many.generate([Request("red", (), SamplingParams(max_new_tokens=2))])[0]
    scored = many.score(requests)
    for (request, answers), likelihoods in zip(requests, scored, strict=True):
        prompt = many.processor.encode(request)
        prompt = chunks.PromptSlots(prompt.tokens, prompt.modality, tuple(request.images))
        for answer, likelihood in zip(answers, likelihoods, strict=True):
            ids = many.processor.answer_ids(request, answer)
            assert ids[-1] in many.options.stops
            whole = chunks.join(prompt, cases.text(ids))
            logits = cases.uncached_logits(spec, params, [whole])[0]
            logprobs = jax.nn.log_softmax(logits[prompt.count - 1 : -1])
            expected = float(logprobs[np.arange(len(ids)), ids].sum())
            assert likelihood.tokens == len(ids)
            np.testing.assert_allclose(likelihood.logprob, expected, rtol=1e-4, atol=1e-4)
            assert not likelihood.is_greedy
    score = many.score([(Request("red", ()), [greedy.text])], with_end=False)[0][0]
    if many.processor.answer_ids(Request("red"), greedy.text)[:-1] == list(greedy.tokens):
        assert score.is_greedy
