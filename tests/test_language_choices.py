"""Multiple choice by likelihood: decisions, the embedded questions, and a user's file."""

from __future__ import annotations

import calendar
import json
import operator
import re

import inference_cases as cases
import pytest
from language_cases import choose, make, naive_nats, reading

from wings_jax.errors import UserError
from wings_jax.evaluation import choice_file, everyday, language, language_report
from wings_jax.evaluation.everyday import ChoiceQuestion
from wings_jax.evaluation.language import Decision
from wings_jax.evaluation.prose import Text
from wings_jax.inference.likelihood import Likelihood


def test_the_most_likely_choice_is_chosen():
    known = {
        "yes": Likelihood(-3.0, 1, False),
        "yes of course": Likelihood(-6.0, 3, False),
        "no": Likelihood(-9.0, 1, False),
    }
    asked = [
        ChoiceQuestion("1", "long", "?", ("yes", "no", "yes of course"), 2),
        ChoiceQuestion("2", "", "?", ("no", "yes of course", "yes"), 2),
        ChoiceQuestion("3", "short", "?", ("no", "yes"), 1),
    ]
    found = [Decision(one, [known[choice] for choice in one.choices]) for one in asked]
    assert [one.chosen for one in found] == [0, 2, 1]
    assert [one.chosen_per_token for one in found] == [2, 1, 1]
    assert language.right_by_row(found) == {
        "long": [False],
        "short": [True],
        everyday.ALL: [False, True, True],
        everyday.PER_TOKEN: [True, False, True],
    }


def test_choices_are_scored_as_answers_of_the_template():
    """By hand: the chat template as text, the answer behind it, without its end."""
    generator, params = make("plain", 4)
    items = [
        ChoiceQuestion("1", "", "Up?", ("yes", "top left"), 0),
        ChoiceQuestion("2", "", "A?", ("no", "7", "x"), 1),
    ]
    for decision in choose(generator, items):
        for choice, found in zip(decision.question.choices, decision.likelihoods, strict=True):
            prompt = f"<|im_start|>user\n{decision.question.question}<|im_end|>\n"
            system = f"<|im_start|>system\n{generator.processor.template.system}<|im_end|>\n"
            whole = cases.tokenizer()(f"{system}{prompt}<|im_start|>assistant\n").input_ids
            ids = cases.tokenizer()(choice).input_ids
            behind = naive_nats(generator, params, [*whole, *ids])
            assert -found.logprob == pytest.approx(
                behind - naive_nats(generator, params, whole), abs=1e-3
            )
            assert found.tokens == len(ids)


def test_questions_that_do_not_fit_are_counted():
    generator, _ = make("plain", 4)
    items = [
        ChoiceQuestion("fine", "", "Up?", ("a", "b"), 0),
        ChoiceQuestion("odd", "", "up " * 400, ("a", "b"), 0),
    ]
    with pytest.raises(UserError, match="language_choices: 1 of 2 items do not fit"):
        choose(generator, items)


def test_changes_are_paired_by_question():
    item = ChoiceQuestion("1", "k", "?", ("a", "b"), 0)
    right = Decision(item, (Likelihood(-1.0, 1, True), Likelihood(-2.0, 1, False)))
    wrong = Decision(item, right.likelihoods[::-1])
    few = reading([1.0, 2.0], [1, 1])
    before, after = (
        language.LanguageResult(name, "", None, few, decisions, 1.0)
        for name, decisions in (("x", [right, right, wrong]), ("y", [wrong, right, right]))
    )
    paired = language.paired_by_row(before, after)["k"]
    assert (paired.both, paired.lost, paired.gained, paired.neither) == (1, 1, 1, 0)
    found = language_report.report_to_dict(Text("s", ("a", "b")), [before, after])["models"]
    assert "change" not in found[0]
    assert found[1]["change"]["from"] == "x"
    assert found[1]["change"]["perplexity"] == {"ratio": 1.0, "interval95": [1.0, 1.0]}


def test_the_embedded_questions_are_well_formed():
    items = everyday.embedded_questions()
    assert len(items) >= 200
    assert items == everyday.embedded_questions()
    for what in ("id", "question"):
        assert len({getattr(item, what) for item in items}) == len(items)
    for item in items:
        assert len(set(item.choices)) == everyday.CHOICES
        assert 0 <= item.answer < everyday.CHOICES
        assert all(choice == choice.strip() and choice for choice in item.choices)
        assert "{" not in item.question
    places = [sum(item.answer == place for item in items) for place in range(4)]
    assert min(places) > 0.17 * len(items)  # always choosing one place gains nothing


def test_right_answers_are_those_of_the_tables():
    by_kind: dict[str, list[ChoiceQuestion]] = {}
    for item in everyday.embedded_questions():
        by_kind.setdefault(item.kind, []).append(item)
    assert set(by_kind) == {*everyday.TABLES, *everyday.ORDERS}
    for kind, (question, _) in everyday.TABLES.items():
        table = everyday.answers_by_subject(kind)
        assert len(by_kind[kind]) == len(table)
        for item, (subject, answer) in zip(by_kind[kind], table.items(), strict=True):
            assert item.question == question.format(subject)
            assert item.choices[item.answer] == answer
    for kind, (_, order) in everyday.ORDERS.items():
        assert len(by_kind[kind]) == everyday.EACH
        for item in by_kind[kind]:
            assert item.choices[item.answer] == max(item.choices, key=order.index)
            assert all(re.search(rf"\b{choice}\b", item.question) for choice in item.choices)


def test_computable_answers_are_right():
    signs = {"plus": operator.add, "minus": operator.sub, "times": operator.mul}
    for subject, answer in everyday.answers_by_subject("arithmetic").items():
        left, sign, right = subject.split()
        assert signs[sign](int(left), int(right)) == int(answer)
    for kind, names in (
        ("months", calendar.month_name[1:]),
        ("weekdays", list(calendar.day_name)),
    ):
        following = dict(zip(names, [*names[1:], names[0]], strict=True))
        assert everyday.answers_by_subject(kind) == following


def test_choice_file_is_read(tmp_path):
    file = tmp_path / "mine.jsonl"
    first = {"question": "Up?", "choices": ["yes", "no"], "answer": 1}
    file.write_text(f"{json.dumps(first)}\n\n{json.dumps(first | {'id': 'x', 'kind': 'k'})}\n")
    assert choice_file.read_choice_file(file) == [
        ChoiceQuestion("1", "", "Up?", ("yes", "no"), 1),
        ChoiceQuestion("x", "k", "Up?", ("yes", "no"), 1),
    ]


LONE = '{"id": "b", "question": "Up?", "choices": ["yes", "no"], "answer": 1, "%s": %s}'
GOOD = {"id": "a", "question": "Up?", "choices": ["yes", "no"], "answer": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "malformed JSON: .* column 2"),
        ("[1]", "is .1., not an object"),
        (GOOD, 'id "a" occurs twice'),
        ({**GOOD, "id": 3}, "id is 3, not a text"),
        ({**GOOD, "kind": None}, "kind is null, not a text"),
        ({**GOOD, "id": "b", "kind": everyday.ALL}, "kind is .*the name of a total"),
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
        (LONE % ("question", '"\\ud800"'), r"question is '\\ud800', which is not valid Unicode"),
        (LONE % ("id", '"\\udfff"'), r"id is '\\udfff', which is not valid Unicode"),
        (LONE % ("kind", '"\\ud83d!"'), r"kind is '\\ud83d!', which is not valid Unicode"),
        (LONE % ("choices", '["a", "\\ud800"]'), r"choices is '\\ud800', which is not valid"),
        ('{"answer": ' + "1" * 5000 + "}", "malformed JSON: Exceeds the limit"),
        ("[" * 100_000, "malformed JSON: maximum recursion depth"),
    ],
)
def test_choice_file_errors_name_the_line(tmp_path, line, message):
    file = tmp_path / "mine.jsonl"
    wrong = line if isinstance(line, str) else json.dumps(line)
    file.write_text(f"{json.dumps(GOOD)}\n\n{wrong}\n")
    with pytest.raises(UserError, match=rf"^--choices: {re.escape(str(file))}: line 3: {message}"):
        choice_file.read_choice_file(file)
