"""Accuracy of short free answers about images: VQAv2, TextVQA (EvalAI's rules) and GQA."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

ANNOTATORS_FOR_FULL_SCORE = 3  # an answer that three people gave counts 1

# Punctuation of the official VQA evaluation, which VLMEvalKit removes before it looks for yes or
# no: dropped next to a space (or anywhere in a text with a comma between digits), else a space.
_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")

_DIGITS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}

# The contractions of the official evaluation: each is also accepted without one of its
# apostrophes. Words that its list lacks (he'll, she'd, we'd, ...) mean something else without.
_CONTRACTION_WORDS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


@functools.cache
def _contractions() -> dict[str, str]:
    """Returns the contraction that each spelling without one apostrophe stands for."""
    spellings = {"somebody'd": "somebodyd"}  # so in the official list
    for word in _CONTRACTION_WORDS.split():
        for match in re.finditer("'", word):
            spellings[word[: match.start()] + word[match.end() :]] = word
    return spellings


def remove_punctuation(text: str) -> str:
    """Returns a text without the punctuation of the official VQA evaluation."""
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    kept = text
    # The official rule tests the original text, not what is left of it.
    for mark in _VQA_PUNCTUATION:
        is_beside_space = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if is_beside_space or has_number else " ")
    return _PERIOD.sub("", kept)


def normalize_answer(answer: str) -> str:
    """Returns an answer as EvalAI compares it.

    Lower case without articles and punctuation, number words as digits, contractions with their
    apostrophes.

    >>> normalize_answer("The two dogs, dont run!")
    "2 dogs don't run"
    """
    # `word_tokenize` of EvalAIAnswerProcessor.
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = " ".join(text.split())

    words = [_DIGITS.get(word, word) for word in remove_punctuation(text).split()]
    kept = [word for word in words if word not in _ARTICLES]
    return " ".join(_contractions().get(word, word) for word in kept)


def score_vqa(answer: str, annotations: Sequence[str]) -> float:
    """Returns the VQA accuracy in [0, 1] of an answer, given those of (usually ten) people.

    The mean over all sets of annotators without one of min(1, number who gave the answer / 3).

    >>> score_vqa("a cat", ["cat"] * 2 + ["dog"] * 8)
    0.6
    """
    found = normalize_answer(answer)
    matches = [normalize_answer(annotation) == found for annotation in annotations]

    total = sum(matches)

    # Each annotator is left out in turn: the answers of the others are counted.
    scores = [min(1.0, (total - match) / ANNOTATORS_FOR_FULL_SCORE) for match in matches]
    return round(sum(scores) / len(scores), 10)


def score_gqa(answer: str, truth: str) -> float:
    """Returns 1.0 if an answer is the true one, in any case and without a last period.

    >>> score_gqa("Yes.", "yes"), score_gqa("a cat", "cat")
    (1.0, 0.0)
    """
    return float(answer.strip().rstrip(".").lower() == truth.strip().lower())
