"""Turn by turn equals all at once; what is streamed is what is answered; given answers scored."""

from __future__ import annotations

import inference_cases as cases
import jax
import numpy as np
import pytest

from wings_jax.errors import UserError
from wings_jax.inference import dialogue, prompts, streaming
from wings_jax.inference.prompts import Request
from wings_jax.inference.sampling import SamplingParams

RNG = np.random.default_rng(1)
PICTURES = [RNG.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(3)]
WISH = SamplingParams(max_new_tokens=6)


@pytest.fixture(scope="module")
def one():
    return cases.generator(1)


def test_a_chat_equals_its_history_read_at_once(one):
    chat = one.chat(system="Be brief.", sampling=WISH)
    history = [{"from": "system", "value": "Be brief."}]
    seen, known = [], 0
    for text, pictures in (
        ("Hi.", []),
        ("What is this?", PICTURES[:1]),
        ("And here?", []),
        ("<image> or <image>?", PICTURES[1:]),
        ("Which?", []),
    ):
        said = "".join(chat.ask(text, pictures))
        asked = "<image>\n" * len(pictures) + text if "<image>" not in text else text
        seen += pictures
        history.append({"from": "human", "value": asked})
        wanted = one.generate([Request(history, seen, WISH)])[0]
        assert said == wanted.text
        if known and not (pictures and len(seen) == 1):  # the first picture opens a cache
            assert chat.read <= wanted.prompt - known
        known = wanted.prompt
        history.append({"from": "gpt", "value": said})
        assert chat.turns == history


def test_an_answer_may_be_left_half_way(one):
    chat = one.chat(sampling=SamplingParams(max_new_tokens=30))
    pieces = chat.ask("Hi.")
    half = next(pieces)
    pieces.close()
    assert chat.turns[-1] == {"from": "gpt", "value": half}
    said = "".join(chat.ask("Go on.", sampling=WISH))
    assert said == one.generate([Request(chat.turns[:-1], (), WISH)])[0].text


def test_undo_and_reset(one):
    chat = one.chat(sampling=WISH)
    first = "".join(chat.ask("Hi."))
    list(chat.ask("What is this?", PICTURES[:1]))
    chat.undo()
    assert len(chat.turns) == 2
    assert chat.images == []
    chat.undo()
    assert "".join(chat.ask("Hi.")) == first
    chat.reset()
    assert chat.turns == []
    with pytest.raises(UserError, match="nothing"):
        chat.undo()


def test_a_wrong_turn_changes_nothing(one):
    chat = one.chat(sampling=WISH)
    list(chat.ask("Hi."))
    before = list(chat.turns)
    for text, pictures in (("red " * 300, []), ("<image><image>", PICTURES[:1]), ("a", ["no.png"])):
        with pytest.raises(UserError):
            list(chat.ask(text, pictures))
        assert chat.turns == before


def test_what_is_streamed_is_the_answer(one):
    request = Request("What is this?", PICTURES[:1], SamplingParams(max_new_tokens=9))
    assert "".join(one.stream(request)) == one.generate([request])[0].text


def test_a_long_conversation_outgrows_its_memory():
    spec, weights, params = cases.make(cases.ARCHS["router"])
    talk = dialogue.Dialogue(spec, weights, ())
    prompt = cases.random_rows(spec.arch, ["tiit"], seed=3)[0]
    for turn in range(4):
        wanted = cases.uncached_greedy(spec, params, [prompt], 5)[0]
        said = []
        for piece in talk.answer(prompt, SamplingParams(max_new_tokens=5)):
            said += piece.tokens
        assert said == wanted
        new = "iit" if turn == 1 else "tt"
        more = cases.random_rows(spec.arch, [new], seed=turn)[0]
        prompt = prompts.join(prompt, cases.text(said[: 5 - turn]), more)


def test_common_starts():
    spec, _, _ = cases.make(cases.ARCHS["plain"])
    row = cases.random_rows(spec.arch, ["tiitiit"], seed=3)[0]
    other = prompts.PromptSlots(row.tokens, row.modality, (row.images[0], row.images[0] ^ 1))
    assert dialogue.common(row, row) == row.count
    assert dialogue.common(row, other) == 6
    assert dialogue.common(prompts.tail(row, 0, 4), prompts.EMPTY) == 0
    assert dialogue.not_within_image(row, 3, 4) == 1
    assert dialogue.not_within_image(row, 5, 4) == 5


def test_stop_strings_and_unfinished_characters_are_held_back():
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


def test_scores_are_sums_of_log_probabilities():
    arch = cases.with_vocabulary(cases.ARCHS["router"], len(cases.tokenizer()))
    many = cases.generator(4)
    spec, _, params = cases.make(arch)
    requests = [
        (Request("red", ()), ["blue", "a green cat", "7"]),
        (Request("What is this?", PICTURES[:1]), ["yes"]),
    ]
    greedy = many.generate([Request("red", (), SamplingParams(max_new_tokens=2))])[0]
    scored = many.score(requests)
    for (request, answers), found in zip(requests, scored, strict=True):
        prompt = many.reader.read(request)
        prompt = prompts.PromptSlots(prompt.tokens, prompt.modality, tuple(request.images))
        for answer, likelihood in zip(answers, found, strict=True):
            ids = many.reader.answer_ids(request, answer)
            assert ids[-1] in many.plan.stops
            whole = prompts.join(prompt, cases.text(ids))
            logits = cases.uncached_logits(spec, params, [whole])[0]
            logprobs = jax.nn.log_softmax(logits[prompt.count - 1 : -1])
            wanted = float(logprobs[np.arange(len(ids)), ids].sum())
            assert likelihood.tokens == len(ids)
            np.testing.assert_allclose(likelihood.logprob, wanted, rtol=1e-4, atol=1e-4)
            assert not likelihood.is_greedy
    said = many.score([(Request("red", ()), [greedy.text])], with_end=False)[0][0]
    if many.reader.answer_ids(Request("red"), greedy.text)[:-1] == list(greedy.tokens):
        assert said.is_greedy
