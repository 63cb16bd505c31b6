"""Answers in generated text: the judgments of VLMEvalKit's rules, and of the VQA evaluation."""

from __future__ import annotations

import csv
import json
import pathlib

import pytest

from wings_jax.evaluation.benchmarks import extraction, ratings, vqa
from wings_jax.evaluation.benchmarks.record import Item

REAL = pathlib.Path(__file__).parents[2] / "shared" / "data" / "eval"

ANIMALS = {"A": "a cat", "B": "a dog", "C": "a horse", "D": "none of them"}
COLORS = {"A": "red", "B": "blue", "C": "green"}
CHINESE = {"A": "猫", "B": "狗", "C": "马", "D": "以上都不是"}
NUMBERS = {"A": "3", "B": "13", "C": "30"}

# options, answer of the model, letter that VLMEvalKit's rules find (None: no option)
OPTION_CASES = [
    # One letter, with punctuation around it.
    (ANIMALS, "A", "A"),
    (ANIMALS, "B.", "B"),
    (ANIMALS, "(C)", "C"),
    (ANIMALS, "[D]", "D"),
    (ANIMALS, "B:", "B"),
    (ANIMALS, "**B**", "B"),
    (ANIMALS, "#A", "A"),
    (ANIMALS, "{B}", "B"),
    (ANIMALS, "C!", "C"),
    (ANIMALS, "A;", "A"),
    (ANIMALS, "\n B \n", "B"),
    (ANIMALS, "Answer: C", "C"),
    (ANIMALS, "Option D", "D"),
    (ANIMALS, "The answer is B.", "B"),
    (ANIMALS, "It must be (A), I think", "A"),
    (ANIMALS, "B. a dog", "B"),
    (ANIMALS, "B, a cat", "B"),
    (ANIMALS, "答案：B", None),
    (ANIMALS, "答案是 B", "B"),
    (CHINESE, "选 C。", None),
    (CHINESE, "选 C .", "C"),
    (CHINESE, "B", "B"),
    (CHINESE, "（A）", None),
    # A letter too far from the end may be an article or a name; then texts are looked for.
    (ANIMALS, "A is what one can see in this picture of mine", None),
    (ANIMALS, "B since the dog barks at us", None),
    (ANIMALS, "B since the dog barks", None),
    (ANIMALS, "B as it barks", "B"),
    # No letter, or several.
    (ANIMALS, "A or B", None),
    (ANIMALS, "A, B, C and D are possible", None),
    (ANIMALS, "b", None),
    (ANIMALS, "E", None),
    (ANIMALS, "AB", None),
    (ANIMALS, "", None),
    (ANIMALS, "   ", None),
    (ANIMALS, "?", None),
    (ANIMALS, "I do not know.", None),
    (ANIMALS, "Z", "Z"),
    (ANIMALS, "(Z)", "Z"),
    # The text of exactly one option.
    (COLORS, "red", "A"),
    (COLORS, "It is Blue.", "B"),
    (COLORS, "GREEN", "C"),
    (COLORS, "red or blue", None),
    (COLORS, "reddish", "A"),
    (COLORS, "The sky over the sea was blue that day", None),
    (ANIMALS, "I see a dog.", "B"),
    (ANIMALS, "It is a dog and a cat", None),
    (ANIMALS, "none of them", "D"),
    (ANIMALS, "dog", None),
    (CHINESE, "图中是一只狗", "B"),
    (CHINESE, "这是狗", "B"),
    (CHINESE, "狗和猫", None),
    (CHINESE, "以上都不是", "D"),
    (NUMBERS, "30", None),
    (NUMBERS, "13", None),
    (NUMBERS, "3", "A"),
    # "answer is X" in a long text with several letters.
    (ANIMALS, "A and B look alike, but after some thought the answer is B, as ears show", "B"),
    (ANIMALS, "Between A and C, the correct answer is **C** because of its long mane", "C"),
    (ANIMALS, "A and B look alike; the answer is unclear to me at this point", None),
    (ANIMALS, "The answer is banana, which is not among the choices A and B here", None),
    (ANIMALS, "Neither A nor B: the answer is E as far as I can tell from this", None),
    (ANIMALS, "The correct answer is d, neither A nor B, from all that I can see", "D"),
    # Refusals.
    (ANIMALS, "Sorry, I can't help with images of people yet.", "Z"),
    (ANIMALS, "I'm sorry, but without the image provided I guess B", "Z"),
    (ANIMALS, "Cannot determine the answer", "Z"),
]

YES_NO_CASES = [
    ("Yes", "Yes"),
    ("yes.", "Yes"),
    ("No", "No"),
    ("NO!", "No"),
    ("Yes, it is.", "Yes"),
    ("No, the circle is smaller.", "No"),
    ("The answer is yes", "Yes"),
    ("Yes, there is no person.", "Unknown"),
    ("Nothing", "Unknown"),
    ("yes/no", "Unknown"),
    ('"Yes"', "Yes"),
    ("Yes-it is", "Yes"),
    ("yesterday", "Unknown"),
    ("", "Unknown"),
    ("是", "Unknown"),
    ("It is not possible to say", "Unknown"),
]


def test_extraction_table_has_the_judgments_of_vlmevalkit():
    assert len(OPTION_CASES) >= 60
    wrong = [
        (answer, expected, extraction.extract_option(answer, options))
        for options, answer, expected in OPTION_CASES
        if extraction.extract_option(answer, options) != expected
    ]
    assert not wrong


@pytest.mark.parametrize(("answer", "expected"), YES_NO_CASES)
def test_yes_or_no(answer, expected):
    assert extraction.extract_yes_no(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "Yes"),
        ("No, there is none", "No"),
        ("There is not", "No"),
        ("no", "No"),
        ("There is a dog. No cat.", "Yes"),
        ("I see nothing", "Yes"),
        ("", "Yes"),
    ],
)
def test_pope_has_llavas_rule(answer, expected):
    assert extraction.extract_pope_answer(answer) == expected


@pytest.mark.parametrize(
    ("answer", "truth", "is_right"),
    [
        ("The answer is 18", "18", True),
        ("so 16 - 3 = 13 eggs.\n#### 13", "13", True),
        ("It costs $1,234.", "1,234", True),
        ("2,125", "2125", True),
        ("18.0", "18", True),
        ("18.5", "18", False),
        ("-7", "-7", True),
        ("7", "-7", False),
        ("eighteen", "18", False),
        ("18\n\nQuestion: How many are 5 and 6?", "18", True),
        ("It is 18, not 19", "18", False),
        ("", "0", False),
    ],
)
def test_last_number_of_gsm8k(answer, truth, is_right):
    assert extraction.are_equal_numbers(extraction.extract_last_number(answer), truth) == is_right
    judged = extraction.judge_answer("number", Item("1", "?", answer=truth), answer)
    assert judged.credit == float(is_right)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("def f(): return 'a'\n[DONE]", "def f(): return 'a'"),
        ("[BEGIN]\n 'def f(): pass' \n[DONE] \n\n You are", "def f(): pass"),
        ("Here it is:\n```python\ndef f(): pass\n```\nThis returns None.", "def f(): pass"),
        ("```\ndef f(): pass", "def f(): pass"),
        ("def f(x):\n    return x", "def f(x):\n    return x"),
        ("[BEGIN]\ndef f(a\\_b): pass\n[DONE]\nx = 1\n[DONE]", "def f(a_b): pass"),
        ("'''doc'''\nx = 1\n[DONE]", "'''doc'''\nx = 1"),
        ("DONE = 1\ndef f(): return DONE", ""),
        ("x = 'DONE'", "x = 'DONE'"),
    ],
)
def test_code_of_mbpp(answer, code):
    assert extraction.extract_code(answer) == code


@pytest.mark.parametrize(
    ("answer", "annotations", "score"),
    [
        ("cat", ["cat"] * 10, 1.0),
        ("Cat.", ["cat"] * 10, 1.0),
        ("the cat", ["cat"] * 3 + ["dog"] * 7, 0.9),
        ("cat", ["cat"] + ["dog"] * 9, 0.3),
        ("cat", ["dog"] * 10, 0.0),
        ("two", ["2"] * 10, 1.0),
        ("dont walk", ["don't walk"] * 10, 1.0),
        ("1,000", ["1000"] * 10, 1.0),
        ("tv, sofa", ["tv sofa"] * 10, 1.0),
        ("it's", ["its"] * 10, 0.0),
        ("", ["cat"] * 10, 0.0),
    ],
)
def test_vqa_accuracy(answer, annotations, score):
    assert vqa.score_vqa(answer, annotations) == pytest.approx(score)
    item = Item("1", "?", answer=tuple(annotations))
    assert extraction.judge_answer("vqa", item, answer).credit == pytest.approx(score)


def test_open_question_of_mmmu_accepts_any_of_its_answers():
    item = Item("1", "How fast?", answer=("24/7", "3.429"))
    assert extraction.judge_answer("option or text", item, "It is 24/7").credit == 1
    assert extraction.judge_answer("option or text", item, "3.429 ft/s").credit == 1
    assert extraction.judge_answer("option or text", item, "A").credit == 0
    assert extraction.judge_answer("option or text", item, "3").credit == 0


def test_answers_of_options_get_their_credit():
    item = Item("1", "Which?", tuple(ANIMALS.values()), 1)
    assert extraction.judge_answer("option", item, "(B)").credit == 1
    assert extraction.judge_answer("option", item, "A") == type(
        extraction.judge_answer("option", item, "A")
    )(0.0, "A")
    assert extraction.judge_answer("option", item, "who knows").extracted == ""
    # Without an answer nothing counts as right.
    withheld = Item("1", "Which?", tuple(ANIMALS.values()), None)
    assert extraction.judge_answer("option", withheld, "B").credit == 0
    shown = Item("1", "Is it?", ("Yes", "No"), 0)
    assert extraction.judge_answer("yes or no", shown, "Yes, it is.").credit == 1
    assert extraction.judge_answer("pope", shown, "No").credit == 0
    assert extraction.judge_answer("gqa", Item("1", "?", answer="cat"), "Cat.").credit == 1


def read_table(name: str) -> list[dict[str, str]]:
    path = REAL / "vlmevalkit" / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.parametrize("name", ["MME.noimage.tsv", "HallusionBench.noimage.tsv"])
def test_yes_or_no_of_real_answers_equals_vlmevalkit(name):
    rows = read_table(name)
    assert [extraction.extract_yes_no(row["prediction"]) for row in rows] == [
        row["extracted"] for row in rows
    ]


def test_mme_of_real_answers_equals_vlmevalkits_score():
    rows = read_table("MME.noimage.tsv")
    scores = ratings.rate_mme(
        [row["category"] for row in rows],
        [row["image_path"] for row in rows],
        [extraction.extract_yes_no(row["prediction"]) == row["answer"] for row in rows],
    )
    with open(REAL / "vlmevalkit" / "vila_8b_MME_score.csv", encoding="utf-8") as file:
        (published,) = csv.DictReader(file)
    assert len(published) == 16
    for name, value in published.items():
        assert scores[name] == pytest.approx(float(value), abs=1e-9)


def test_hallusion_bench_of_real_answers_equals_vlmevalkits_score():
    rows = read_table("HallusionBench.noimage.tsv")
    with open(REAL / "vlmevalkit" / "vila_8b_HallusionBench_score.csv", encoding="utf-8") as file:
        published = list(csv.DictReader(file))
    for split in published:
        name = split["split"]
        chosen = [row for row in rows if name in ("Overall", row["category"], row["l2-category"])]
        identifiers = [row["index"].split("_") for row in chosen]
        scores = ratings.rate_hallusion(
            [row["l2-category"] for row in chosen],
            *([parts[position] for parts in identifiers] for position in (3, 4, 5)),
            [extraction.extract_yes_no(row["prediction"]) == row["answer"] for row in chosen],
        )
        for metric in ("aAcc", "fAcc", "qAcc"):
            assert scores[metric] == pytest.approx(float(split[metric]), abs=1e-9), (name, metric)


def test_real_rambling_answers_never_raise_and_rarely_have_a_letter():
    path = REAL / "mmmu" / "Math" / "output.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    rows = json.loads(path.read_text(encoding="utf-8"))
    found = [extraction.extract_option(row["response"], row.get("index2ans") or {}) for row in rows]
    assert found[1] == "B"  # "... Therefore, the answer is (B)."
    assert found[2] == "B"  # "B"
    assert found[0] is None  # a list of points without an end
    assert len(found) == 30
