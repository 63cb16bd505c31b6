"""Perplexity of plain text, multiple choice by likelihood, and `evaluate language`."""

from __future__ import annotations

import calendar
import dataclasses
import itertools
import json
import math
import operator
import re
import sys

import inference_cases as cases
import jax
import numpy as np
import pytest

from wings_jax import cli, evaluate
from wings_jax.errors import UserError
from wings_jax.evaluation import everyday, language, language_report, prose
from wings_jax.evaluation.everyday import Item
from wings_jax.evaluation.language import Decision, TextLikelihood
from wings_jax.evaluation.prose import Text
from wings_jax.inference.generator import Generator
from wings_jax.inference.likelihood import Likelihood

PASSAGES = (
    "What colour is the sky?",
    "The cat is top left, the digit 7 is below it.",
    "A star.",
    "Two plus three is five; über 9 — no.",
    "There is a red car beside the house.",
)


def naive_nats(generator: Generator, params, ids) -> float:
    """Returns the nats of ids behind the first one, by the forward of training."""
    (logits,) = cases.uncached_logits(generator.spec, params, [cases.text(ids)])
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    return -sum(float(logprobs[at, token]) for at, token in enumerate(ids[1:]))


def make(case: str, rows: int, change=lambda arch, params: (arch, params)):
    """Returns a generator of a random model, and its parameters."""
    arch = cases.with_vocabulary(cases.ARCHS[case], len(cases.tokenizer()))
    arch, params = change(arch, cases.make(arch)[2])
    return Generator(arch, params, cases.tokenizer(), "chatml", rows=rows), params


# ---- perplexity ----


@pytest.mark.parametrize("case", ["plain", "router"])
def test_perplexity_is_that_of_a_naive_softmax(case):
    generator, params = make(case, rows=2)
    found = language.measure_perplexity(generator, PASSAGES)
    ids = [cases.tokenizer()(text).input_ids for text in PASSAGES]
    nats = [naive_nats(generator, params, some) for some in ids]
    np.testing.assert_allclose(found.nats, nats, rtol=1e-4)
    assert found.tokens.tolist() == [len(some) - 1 for some in ids]
    mean = sum(nats) / sum(len(some) - 1 for some in ids)
    assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-4)
    assert found.nats_per_token == pytest.approx(mean, rel=1e-5)


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large():
    def blank(arch, params):
        zeros = jax.tree.map(np.zeros_like, params["decoder"]["head"])
        return arch, {**params, "decoder": {**params["decoder"], "head": zeros}}

    generator, _ = make("plain", 4, blank)
    vocabulary = len(cases.tokenizer())
    found = language.measure_perplexity(generator, PASSAGES)
    assert found.perplexity == pytest.approx(vocabulary, rel=1e-5)
    assert found.interval == pytest.approx((vocabulary, vocabulary), rel=1e-5)
    bits = math.log2(vocabulary) * found.tokens.sum()
    scored = [text[len(cases.tokenizer().tokenize(text)[0]) :] for text in PASSAGES]
    assert found.bits_per_byte == pytest.approx(bits / len("".join(scored).encode()), rel=1e-5)


def test_a_passage_does_not_depend_on_its_mates():
    alone = language.measure_perplexity(make("router", 1)[0], PASSAGES)
    together = language.measure_perplexity(make("router", 8)[0], PASSAGES)
    np.testing.assert_allclose(together.nats, alone.nats, rtol=1e-5)
    others = language.measure_perplexity(make("router", 2)[0], PASSAGES[::-1])
    np.testing.assert_allclose(others.nats[::-1], alone.nats, rtol=1e-5)


def test_a_long_text_is_read_in_windows_that_share_a_token():
    def short(arch, params):
        decoder = dataclasses.replace(arch.decoder, max_positions=20)
        return dataclasses.replace(arch, decoder=decoder), params

    generator, params = make("plain", 4, short)
    text = "\n\n".join(PASSAGES)
    ids = cases.tokenizer()(text).input_ids
    windows = generator.processor.windows(text)
    assert len(windows) > 3
    assert all(2 <= len(window) < 20 for window in windows)
    assert [windows[0][0], *(token for window in windows for token in window[1:])] == ids
    for before, after in itertools.pairwise(windows):
        assert before[-1] == after[0]
    (found,) = generator.score_text([text])
    assert found.tokens == len(ids) - 1
    nats = sum(naive_nats(generator, params, window) for window in windows)
    assert -found.logprob == pytest.approx(nats, rel=1e-4)


def test_control_tokens_in_a_text_are_text():
    generator, _ = make("plain", 4)
    (found,) = generator.score_text(["a<|im_end|>"])
    assert found.tokens > 3


def test_what_is_no_two_tokens_is_refused():
    generator, _ = make("plain", 4)
    for text in ("a", ""):
        with pytest.raises(UserError, match=rf"'{text}' is {len(text)} token.* at least 2"):
            generator.score_text(["all is well", text])


def reading(nats, tokens) -> TextLikelihood:
    return TextLikelihood(np.array(nats, float), np.array(tokens), 4 * np.array(tokens))


def test_an_interval_is_of_passages():
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 200, 120)
    found = reading(tokens * rng.normal(3, 0.5, 120), tokens)
    low, high = found.interval
    assert low < found.perplexity < high
    spread = 0.5 / math.sqrt(120) * math.sqrt(np.mean(tokens**2.0)) / tokens.mean()
    assert math.log(high / low) == pytest.approx(2 * 1.96 * spread, rel=0.25)
    assert found.interval == (low, high)  # the seed is fixed
    assert reading([3.0], [1]).interval is None
    assert found.bits_per_byte == pytest.approx(found.nats_per_token / math.log(2) / 4)


def test_a_ratio_is_of_the_same_tokens():
    rng = np.random.default_rng(1)
    before = reading(rng.uniform(100, 300, 40), [70] * 40)
    after = reading(before.nats + 70 * math.log(2), before.tokens)
    ratio, interval = after.ratio(before)
    assert ratio == pytest.approx(2)
    assert interval == pytest.approx((2, 2))  # every passage alike, though passages differ
    assert before.interval[1] / before.interval[0] > 1.1
    assert before.ratio(reading(before.nats, before.tokens + 1)) is None


# ---- text ----

WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
SENTENCE = f"It is said that {WORDS} sixteen and so on are numbers that people count with."
MARKDOWN = f"""# A heading that is followed
{SENTENCE}
It has [a link
over lines](https://a.b/c(d)) and `code`, **bold** <b>tags</b> and
more (https://x.y/z?q=1).

```python
{SENTENCE}
```

- {SENTENCE}

1. {SENTENCE}

| {SENTENCE} |

    {SENTENCE}

    $S$ is {SENTENCE}

<table><tr><td>

{SENTENCE}

</td></tr></table>

Too short a paragraph.

{WORDS} {WORDS}

{SENTENCE}
"""


def test_markdown_is_reduced_to_prose():
    first, last = prose.paragraphs(MARKDOWN.replace("c(d)", "c"))
    assert first == f"{SENTENCE} It has a link over lines and code, bold tags and more."
    assert last == SENTENCE


def test_the_default_text_is_plain_english_and_always_the_same(monkeypatch):
    monkeypatch.delitem(sys.modules, prose.PACKAGE, raising=False)
    text = prose.installed()
    assert prose.PACKAGE not in sys.modules  # it takes seconds to import
    assert text == prose.installed()
    assert re.fullmatch(r"descriptions of tensorflow_datasets \d+\.\d+\.\d+\S*", text.source)
    words = " ".join(text.passages).split()
    assert len(words) > 5000
    assert sum(word in ("the", "of", "and", "is", "a") for word in words) > 0.1 * len(words)
    for passage in text.passages:
        assert not re.search(r"```|https?:|www\.|[<>{}\[\]|*`$#]|^\s*-|\s\s(?<!\n\n)", passage)
        assert len(passage) <= prose.PASSAGE + 2 + prose.LEAST
        for paragraph in passage.split("\n\n"):
            assert paragraph == " ".join(paragraph.split())
    paragraphs = [one for passage in text.passages for one in passage.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)


def test_lists_are_no_prose():
    listed = "\n".join(f"{star} {SENTENCE}" for star in ("*", "  *"))
    assert prose.paragraphs(f"{SENTENCE}\n\n{listed}\n\n*{SENTENCE}*") == [SENTENCE, SENTENCE]


def test_passages_are_whole_paragraphs_where_they_fit():
    found = ["a" * 80, "b" * 60, "c" * 50, " ".join("d" * 9 for _ in range(24)), "e"]
    passages = prose.cut(found, 160)
    assert passages[0] == f"{found[0]}\n\n{found[1]}"
    assert passages[-1].endswith("d\n\ne")  # a rest is no passage: it may be less than two tokens
    assert all(prose.LEAST <= len(passage) <= 160 + 2 + prose.LEAST for passage in passages)
    assert " ".join(passages).split() == " ".join(found).split()  # nothing lost, nothing cut
    assert prose.cut(found, 500) == ["\n\n".join(found)]


def test_a_text_of_ones_own(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(f"\ufeff{SENTENCE}\r\nnext\r\n\r\n# {SENTENCE}\n", encoding="utf-8")
    text = prose.read_text(file)
    assert text.passages == (f"{SENTENCE} next\n\n# {SENTENCE}",)
    assert text.source == str(file)
    many = Text("", tuple(map(str, range(10))))
    assert many.some(5).passages == ("0", "2", "4", "6", "8")
    assert many.some(None) == many
    assert len({many.sha256, many.some(5).sha256, text.sha256}) == 3


# ---- multiple choice ----


class ByHand:
    """A model whose likelihoods are given by what a choice is."""

    def __init__(self, known):
        self.known = known

    def scores(self, requests, *, with_end):
        assert not with_end
        for index in reversed(range(len(requests))):
            yield index, [self.known[choice] for choice in requests[index][1]]


def test_the_likeliest_choice_wins():
    known = {
        "yes": Likelihood(-3.0, 1, False),
        "yes of course": Likelihood(-6.0, 3, False),
        "no": Likelihood(-9.0, 1, False),
    }
    asked = [
        Item("1", "long", "?", ("yes", "no", "yes of course"), 2),
        Item("2", "", "?", ("no", "yes of course", "yes"), 2),
        Item("3", "short", "?", ("no", "yes"), 1),
    ]
    found = language.choose_answers(ByHand(known), asked)
    assert [one.item for one in found] == asked
    assert [one.chosen for one in found] == [0, 2, 1]
    assert [one.chosen_per_token for one in found] == [2, 1, 1]
    assert language.outcomes(found) == {
        "long": [False],
        "short": [True],
        everyday.ALL: [False, True, True],
        everyday.PER_TOKEN: [True, False, True],
    }


def test_choices_are_scored_as_answers_of_the_template():
    """By hand: the chat template as text, the answer behind it, without its end."""
    generator, params = make("plain", 4)
    items = [Item("1", "", "Up?", ("yes", "top left"), 0), Item("2", "", "A?", ("no", "7", "x"), 1)]
    for decision in language.choose_answers(generator, items):
        for choice, found in zip(decision.item.choices, decision.found, strict=True):
            prompt = f"<|im_start|>user\n{decision.item.question}<|im_end|>\n"
            system = f"<|im_start|>system\n{generator.processor.template.system}<|im_end|>\n"
            whole = cases.tokenizer()(f"{system}{prompt}<|im_start|>assistant\n").input_ids
            ids = cases.tokenizer()(choice).input_ids
            behind = naive_nats(generator, params, [*whole, *ids])
            assert -found.logprob == pytest.approx(
                behind - naive_nats(generator, params, whole), abs=1e-3
            )
            assert found.tokens == len(ids)


def test_a_question_that_cannot_be_read_is_named():
    generator, _ = make("plain", 4)
    items = [Item("fine", "", "Up?", ("a", "b"), 0), Item("odd", "", "up " * 400, ("a", "b"), 0)]
    with pytest.raises(UserError, match="question odd: the prompt takes"):
        language.choose_answers(generator, items)


def test_changes_are_paired_by_question():
    item = Item("1", "k", "?", ("a", "b"), 0)
    right = Decision(item, (Likelihood(-1.0, 1, True), Likelihood(-2.0, 1, False)))
    wrong = Decision(item, right.found[::-1])
    few = reading([1.0, 2.0], [1, 1])
    before, after = (
        language.LanguageResult(name, "", None, few, decisions, 1.0)
        for name, decisions in (("x", [right, right, wrong]), ("y", [wrong, right, right]))
    )
    paired = language.changes(before, after)["k"]
    assert (paired.both, paired.lost, paired.gained, paired.neither) == (1, 1, 1, 0)
    found = language_report.as_json(Text("s", ("a", "b")), [before, after])["models"]
    assert "change" not in found[0]
    assert found[1]["change"]["from"] == "x"
    assert found[1]["change"]["perplexity"] == {"ratio": 1.0, "interval95": [1.0, 1.0]}


# ---- the embedded questions ----


def test_the_embedded_questions_are_well_formed():
    items = everyday.items()
    assert len(items) >= 200
    assert items == everyday.items()
    for what in ("id", "question"):
        assert len({getattr(item, what) for item in items}) == len(items)
    for item in items:
        assert len(set(item.choices)) == everyday.CHOICES
        assert 0 <= item.answer < everyday.CHOICES
        assert all(choice == choice.strip() and choice for choice in item.choices)
        assert "{" not in item.question
    places = [sum(item.answer == place for item in items) for place in range(4)]
    assert min(places) > 0.17 * len(items)  # who always takes the same place knows nothing


def test_the_right_answer_is_the_tables():
    by_kind: dict[str, list[Item]] = {}
    for item in everyday.items():
        by_kind.setdefault(item.kind, []).append(item)
    assert set(by_kind) == {*everyday.TABLES, *everyday.ORDERS}
    for kind, (question, _) in everyday.TABLES.items():
        table = everyday.facts(kind)
        assert len(by_kind[kind]) == len(table)
        for item, (subject, answer) in zip(by_kind[kind], table.items(), strict=True):
            assert item.question == question.format(subject)
            assert item.choices[item.answer] == answer
    for kind, (_, order) in everyday.ORDERS.items():
        assert len(by_kind[kind]) == everyday.EACH
        for item in by_kind[kind]:
            assert item.choices[item.answer] == max(item.choices, key=order.index)
            assert all(re.search(rf"\b{choice}\b", item.question) for choice in item.choices)


def test_what_can_be_computed_is_true():
    signs = {"plus": operator.add, "minus": operator.sub, "times": operator.mul}
    for subject, answer in everyday.facts("arithmetic").items():
        left, sign, right = subject.split()
        assert signs[sign](int(left), int(right)) == int(answer)
    for kind, names in (
        ("months", calendar.month_name[1:]),
        ("weekdays", list(calendar.day_name)),
    ):
        following = dict(zip(names, [*names[1:], names[0]], strict=True))
        assert everyday.facts(kind) == following


# ---- a user's questions ----


def test_questions_of_ones_own(tmp_path):
    file = tmp_path / "mine.jsonl"
    first = {"question": "Up?", "choices": ["yes", "no"], "answer": 1}
    file.write_text(f"{json.dumps(first)}\n\n{json.dumps(first | {'id': 'x', 'kind': 'k'})}\n")
    assert everyday.read_items(file) == [
        Item("1", "", "Up?", ("yes", "no"), 1),
        Item("x", "k", "Up?", ("yes", "no"), 1),
    ]


GOOD = {"id": "a", "question": "Up?", "choices": ["yes", "no"], "answer": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "malformed JSON: .* column 2"),
        ("[1]", "is .1., not an object"),
        (GOOD, 'id "a" is there twice'),
        ({**GOOD, "id": 3}, "id is 3, not a text"),
        ({**GOOD, "kind": None}, "kind is null, not a text"),
        ({**GOOD, "id": "b", "kind": everyday.ALL}, "kind is .*a row of its own"),
        ({**GOOD, "question": " "}, 'question is " ", not a text'),
        ({"choices": ["a", "b"], "answer": 0}, "question is null"),
        ({**GOOD, "choices": ["a"]}, "choices is .*two or more"),
        ({**GOOD, "choices": "ab"}, "choices is .*two or more"),
        ({**GOOD, "choices": ["a", 1]}, "choices is .*two or more"),
        ({**GOOD, "choices": ["a", "a "]}, "choices is .*two are the same"),
        ({**GOOD, "answer": 2}, "answer is 2, not a number from 0 to 1"),
        ({**GOOD, "answer": -1}, "answer is -1"),
        ({**GOOD, "answer": True}, "answer is true"),
        ({**GOOD, "answer": "1"}, 'answer is "1"'),
        ({**GOOD, "label": 1}, "unknown key 'label'; there are answer, choices"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    file = tmp_path / "mine.jsonl"
    wrong = line if isinstance(line, str) else json.dumps(line)
    file.write_text(f"{json.dumps(GOOD)}\n\n{wrong}\n")
    with pytest.raises(UserError, match=rf"^--choices: {re.escape(str(file))}: line 3: {message}"):
        everyday.read_items(file)


# ---- the command ----


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return cases.write_checkpoint(tmp_path_factory.mktemp("run") / "random")


def run_command(monkeypatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, flags)])
    cli.run_main("wings_jax.evaluate", evaluate.main)


def test_the_command_compares_models(workdir, tmp_path, monkeypatch, capsys):
    other = cases.write_checkpoint(tmp_path / "other", "plain")
    flags = ["language", "--base", f"old={workdir}", "--checkpoint", f"same={workdir}", other]
    out = tmp_path / "out"
    run_command(monkeypatch, *flags, "--limit", 4, "--batch-size", 2, "--out", out)
    told = capsys.readouterr().out
    assert "ratio to old" in told
    assert "tensorflow_datasets" in told
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"choices-{name}.jsonl" for name in ("old", "other", "same")),
        "language.json",
        "language.md",
    ]
    old, same, plain = json.loads((out / "language.json").read_text())["models"]
    text = prose.installed().some(4)
    assert old["perplexity"] == same["perplexity"]
    assert old["perplexity"]["sha256"] == plain["perplexity"]["sha256"] == text.sha256
    assert old["perplexity"]["passages"] == 4
    assert old["perplexity"]["value"] != plain["perplexity"]["value"]
    low, high = old["perplexity"]["interval95"]
    assert low <= old["perplexity"]["value"] <= high
    assert same["change"]["perplexity"] == {"ratio": 1.0, "interval95": [1.0, 1.0]}
    assert plain["change"]["perplexity"]["ratio"] == pytest.approx(
        plain["perplexity"]["value"] / old["perplexity"]["value"], rel=1e-4
    )
    assert same["change"]["choices"][everyday.ALL]["change"] == 0
    lines = [json.loads(line) for line in (out / "choices-other.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert plain["choices"][everyday.ALL]["total"] == 4
    assert plain["choices"][everyday.ALL]["right"] == sum(line["right"] for line in lines)
    for line in lines:
        sums = {one["text"]: one["logprob"] for one in line["choices"]}
        means = {one["text"]: one["logprob"] / one["tokens"] for one in line["choices"]}
        assert line["answer"] == max(sums, key=sums.get)
        assert line["answer_per_token"] == max(means, key=means.get)
    markdown = (out / "language.md").read_text()
    assert markdown.startswith("# Language\n")
    assert f"| **{everyday.ALL}** | **4** |" in markdown


def test_the_command_takes_ones_own_files(workdir, tmp_path, monkeypatch, capsys):
    text, choices = tmp_path / "text.txt", tmp_path / "mine.jsonl"
    text.write_text(SENTENCE * 2)
    choices.write_text(json.dumps(GOOD | {"kind": "odd kind"}))
    flags = ["language", "--checkpoint", workdir, "--text", text, "--choices", choices]
    run_command(monkeypatch, *flags)
    told = capsys.readouterr().out
    assert f"{text}, 1 passages" in told
    assert "odd kind" in told
    assert "Change" not in told
    assert sorted(tmp_path.iterdir()) == [choices, text]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["language", "--tasks", "iit"], "--tasks is not for `language`"),
        (["language", "--picture", "x.png"], "--picture is not for `language`"),
        (["language", "--data-root", "x"], "--data-root is not for `language`"),
        (["--text", "FILE"], "--text is for `language` only"),
        (["forgetting", "--choices", "FILE"], "--choices is for `language` only"),
        (["language", "--limit", "0"], "--limit: 0 is less than 1"),
        (["language", "--text", "no/such"], "--text: no/such: No such file"),
        (["language", "--text", "LATIN"], "latin.txt: not UTF-8 at byte 1"),
        (["language", "--text", "SHORT"], "short.txt: 11 characters are too few; take 40"),
        (["language", "--text", "EMPTY"], "empty.txt: 0 characters are too few"),
        (["language", "--choices", "no/such"], "--choices: no/such: No such file"),
        (["language", "--choices", "LATIN"], "latin.txt: not UTF-8 at byte 1"),
        (["language", "--choices", "EMPTY"], "empty.txt holds no question"),
        (["language", "--out", "SHORT/x"], "--out: cannot write"),
    ],
)
def test_a_mistake_is_one_line(workdir, tmp_path, monkeypatch, capsys, flags, message):
    made = {"LATIN": b"d\xe9j\xe0", "SHORT": b"all is well", "EMPTY": b"\n"}
    for name, content in made.items():
        (tmp_path / f"{name.lower()}.txt").write_bytes(content)
    known = {name: tmp_path / f"{name.lower()}.txt" for name in made}
    known["SHORT/x"] = known["SHORT"] / "x"
    flags = [known.get(flag, flag) for flag in flags]
    with pytest.raises(SystemExit) as caught:
        run_command(monkeypatch, *flags, "--checkpoint", workdir)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_without_the_package_a_text_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, prose.PACKAGE, None)
    with pytest.raises(UserError, match="--text is missing"):
        prose.installed()
