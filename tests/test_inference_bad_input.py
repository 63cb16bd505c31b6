"""Requests, flags and files that are wrong: one line each, and a job goes through."""

from __future__ import annotations

import codecs
import json

import inference_cases as cases
import numpy as np
import pytest

from wings_jax import checkpoint
from wings_jax.errors import UserError
from wings_jax.inference import jobs, sampling
from wings_jax.inference.loading import load_generator
from wings_jax.inference.prompts import Request
from wings_jax.inference.sampling import SamplingParams
from wings_jax.model import layout

SHORT = SamplingParams(max_new_tokens=3)
LONE = "\ud83d"


def parse_lines(tmp_path, content: bytes) -> list[jobs.Line]:
    path = tmp_path / "requests.jsonl"
    path.write_bytes(content)
    return jobs.read_requests(path, tmp_path, SHORT)


def run_job(generator, tmp_path, lines) -> list[dict]:
    output = tmp_path / "answers.jsonl"
    journal = jobs.Journal(output, {"job": 1})
    list(jobs.run(generator, lines, journal))
    journal.finish()
    return [json.loads(line) for line in output.read_text("utf-8").splitlines()]


# --- A4: every eos id ends an answer ---------------------------------------------------------


def test_all_eos_ids_of_generation_config_stop(tmp_path):
    free = cases.generator(1).generate("red", max_new_tokens=6)
    assert len(free.tokens) == 6
    eos = free.tokens[3]
    content = json.dumps({"eos_token_id": [eos, cases.tokenizer().eos_token_id]})
    cases.write_checkpoint(tmp_path / "run", files={"generation_config.json": content})
    model = load_generator(tmp_path / "run", rows=1)
    answer = model.generate("red", max_new_tokens=6)
    first = free.tokens.index(eos)
    assert (answer.reason, answer.tokens) == ("stop", free.tokens[:first])
    assert "".join(model.stream(Request("red"))) == answer.text


@pytest.mark.parametrize(
    ("content", "ids"),
    [("{}", ()), ('{"eos_token_id": null}', ()), ('{"eos_token_id": 3}', (3,)), (None, ())],
)
def test_eos_ids_may_be_missing_or_one(content, ids):
    files = {} if content is None else {"generation_config.json": content}
    assert checkpoint.read_eos_ids(files, "DIR") == ids


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"eos_token_id": "a"}', '{"eos_token_id": [true]}']
)
def test_eos_ids_of_a_malformed_file_name_it(content):
    with pytest.raises(UserError, match=r"^DIR: generation_config.json: "):
        checkpoint.read_eos_ids({"generation_config.json": content}, "DIR")


# --- text, paths and numbers -----------------------------------------------------------------


@pytest.mark.parametrize("text", [f"red {LONE}", b"caf\xe9".decode("utf-8", "surrogateescape")])
def test_unicode_surrogates_in_text_are_refused(text):
    model = cases.generator(1)
    for request in (text, Request([{"from": "human", "value": text}])):
        with pytest.raises(UserError, match="not valid Unicode"):
            model.generate(request, max_new_tokens=2)
    with pytest.raises(UserError, match="not valid Unicode"):
        model.score([(Request("red"), [text])])
    with pytest.raises(UserError, match="not valid Unicode"):
        model.score_text([text])
    chat = model.chat(sampling=SHORT)
    with pytest.raises(UserError, match="not valid Unicode"):
        list(chat.ask(text))
    assert chat.turns == []


@pytest.mark.parametrize("path", ["a\0b.png", f"{LONE}.png", 7, "x" * 5000])
def test_image_that_cannot_be_opened_is_a_user_error(path):
    with pytest.raises(UserError, match=r"image|x+"):
        cases.generator(1).generate(Request("red", [path]), max_new_tokens=2)


def test_seed_may_be_any_whole_number():
    seeds = [5, 2**40 + 1, -1, 10**20, 2**64, -(10**30)]
    params = [SamplingParams(seed=seed, temperature=1.0) for seed in seeds]
    keys = sampling.stack_params(params, 29).keys
    assert keys[0].tolist() == [0, 5]
    assert keys[1].tolist() == [256, 1]
    assert keys[2].tolist() == [2**28 - 1, 2**32 - 1]
    masked = 10**20 % 2**60
    assert keys[3].tolist() == [masked >> 32, masked & (2**32 - 1)]
    assert keys[4].tolist() == [0, 0]


def test_sampling_params_beyond_the_range_of_arrays():
    params = SamplingParams(max_new_tokens=10**30, top_k=10**30, temperature=1e-40, seed=10**20)
    batch = sampling.stack_params([params, SamplingParams(temperature=1.0)], 29)
    assert batch.limits[0] == 2**31 - 1
    assert batch.top_k.tolist() == [29, 29]
    assert batch.temperature.tolist() == [0, 1]
    answer = cases.generator(1).generate("red", temperature=1e-40, top_k=10**30, max_new_tokens=2)
    assert answer == cases.generator(1).generate("red", max_new_tokens=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", True),
        ("seed", 1.5),
        ("seed", "3"),
        ("temperature", "hot"),
        ("temperature", None),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("top_p", True),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e300),
        ("stop", 5),
        ("stop", {"a": 1}),
    ],
)
def test_sampling_params_of_a_wrong_type_are_refused(name, value):
    with pytest.raises(UserError, match=f"^{name}: "):
        SamplingParams(**{name: value})


# --- the word <image> ------------------------------------------------------------------------


def prompt_text(model, request: Request) -> str:
    """Returns the text of a request's prompt; image slots have no text."""
    slots = model.processor.encode(request)
    return model.processor.tokenizer.decode(slots.tokens[slots.modality == layout.TEXT].tolist())


def test_marker_without_images_is_text():
    model = cases.generator(1)
    assert "What does <image> mean?" in prompt_text(model, Request("What does <image> mean?"))
    model.generate("What does <image> mean?", max_new_tokens=1)
    image = np.zeros((8, 8, 3), np.uint8)
    text = prompt_text(model, Request(r"<image>What does \<image> mean?", [image]))
    assert "What does <image> mean?" in text
    with pytest.raises(UserError, match=r"1 image\(s\), 2 <image> in the prompt"):
        model.generate("<image>What does <image> mean?", images=image)


def test_marker_as_text_in_a_chat_before_and_after_an_image():
    model = cases.generator(1)
    chat, image = model.chat(sampling=SHORT), np.zeros((8, 8, 3), np.uint8)
    for text, images in (("A <image>?", []), ("B?", [image]), ("C <image>?", [])):
        answer = "".join(chat.ask(text, images))
        request = Request(chat.turns[:-1] if answer else chat.turns, chat.images, SHORT)
        assert model.generate(request).text == answer
    text = prompt_text(model, Request([*chat.turns, {"from": "human", "value": "D"}], chat.images))
    assert [part in text for part in ("A <image>?", "B?", "C <image>?")] == [True] * 3
    assert "\\" not in text
    chat.undo()
    chat.undo()
    assert chat.turns[0] == {"from": "human", "value": "A <image>?"}


# --- files of requests -----------------------------------------------------------------------


def test_input_with_a_byte_order_mark(tmp_path):
    (line,) = parse_lines(tmp_path, codecs.BOM_UTF8 + b'{"prompt": "red"}\r\n')
    assert line.request.conversations == "red"
    with pytest.raises(UserError, match="is UTF-16; convert"):
        parse_lines(tmp_path, '{"prompt": "red"}'.encode("utf-16"))


def test_input_lines_that_are_wrong_never_end_a_job(tmp_path):
    good = b'{"prompt": "red"}'
    bad = {
        b'{"prompt": "caf\xe9"}': "not UTF-8: byte 0xe9 at column 16",
        b"[" * 100_000: "JSON that cannot be read",
        b'{"prompt": "red", "id": ' + b"9" * 5000 + b"}": "JSON that cannot be read",
        b'{"prompt": "\\ud83d"}': "not valid Unicode",
        b'{"prompt": "red", "images": ["a\\u0000b.png"]}': "a",
        b'{"prompt": "red", "images": ["\\udce9.png"]}': "png",
        b'{"prompt": "red", "images": [""]}': "",
        b'{"prompt": "red", "sampling": {"seed": "x"}}': "seed: 'x' is not a whole number",
        b'{"prompt": "red", "sampling": {"temperature": Infinity}}': "not a finite number",
        b'{"prompt": "red", "sampling": {"size": 1}}': "unknown sampling parameter 'size'",
        b'{"prompt": "red", "sampling": []}': "sampling is [], not an object",
        b'{"prompt": null}': "prompt is null",
        b'{"conversations": [null]}': "a turn is null",
        b'{"conversations": [{"from": "human", "value": null}]}': "value is null",
        b'{"conversations": []}': "human",
        b'"red"': 'is "red", not an object',
        b"nul": "malformed JSON",
    }
    content = b"\n".join([good, *bad, b'{"prompt": "red", "id": "\\udce9"}', good])
    lines = parse_lines(tmp_path, content)
    answers = run_job(cases.generator(4), tmp_path, lines)
    assert len(answers) == len(bad) + 3
    for number, (answer, message) in enumerate(zip(answers[1:-2], bad.values(), strict=True), 2):
        assert answer["error"].startswith(f"line {number}: ")
        assert message in answer["error"]
    texts = [answers[0]["answer"], answers[-2]["answer"], answers[-1]["answer"]]
    assert len(set(texts)) == 1
    assert answers[-2]["id"] == "\udce9"


def test_journal_that_is_cut_off_or_damaged(tmp_path):
    output, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    journal.write_text('{"job": "ab')
    first = jobs.Journal(output, {"job": 1})
    first.add(1, {"id": 1, "answer": "é"})
    first.close()
    content = journal.read_bytes()
    journal.write_bytes(content + '{"line": 2, "answer": "é'.encode()[:-1])
    second = jobs.Journal(output, {"job": 1})
    second.close()
    assert list(second.answers) == [1]
    assert journal.read_bytes() == content
    journal.write_bytes(content + b"{}\n")
    with pytest.raises(UserError, match=r"out.jsonl.partial is damaged: remove it"):
        jobs.Journal(output, {"job": 1})
