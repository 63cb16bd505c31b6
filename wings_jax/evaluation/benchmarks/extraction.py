"""The answer that a generated text gives: an option, yes or no, a number, or Python code.

A benchmark with generated answers needs a rule to extract them. For multiple choice and for yes or
no these are the rules of VLMEvalKit without a judge (`can_infer` of its `matching_util.py`,
`YOrN_Extraction` of its `yorn.py`), where a text without a clear answer counts as wrong; for GSM8K
and MBPP they are those of OpenCompass. They are also applied to models that answer with a letter
only, so that one rule is stated in every report.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence

from wings_jax.evaluation.benchmarks import sandbox, vqa
from wings_jax.evaluation.benchmarks.record import LETTERS, Item, Judgment

# What VLMEvalKit returns for a refusal, or for a text in which it finds no option: counts as wrong.
REFUSED = "Z"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
MAX_WORDS_AFTER_LETTER = 3  # a letter farther from the end may be an article or a name
YES, NO, UNKNOWN = "Yes", "No", "Unknown"

_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([A-Z])(?![A-Za-z])", re.IGNORECASE)

_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_NUMBER = re.compile(r"-?\d+\.\d+|-?\d+")

_BEGIN = re.compile(r"\[?BEGIN\]?")
_DONE = re.compile(r"\[DONE\]|^\s*DONE\b", re.MULTILINE)
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


def extract_option(answer: str, options: Mapping[str, str]) -> str | None:
    """Returns the letter of the option that a text chooses; None if none or several.

    `options` maps the letters of a question to the texts of its options. In order: exactly one of
    the letters stands alone among the last words; exactly one option's text occurs (in a text of
    at most twice the length of all options); "answer is X". A refusal is `REFUSED`.

    VLMEvalKit's pattern for "answer is X" also matches the first letter of a word, as in "the
    answer is banana"; here the letter must stand alone.

    >>> options = {"A": "red", "B": "blue"}
    >>> extract_option("(B)", options), extract_option("It is red.", options)
    ('B', 'A')
    >>> extract_option("A or B", options) is None
    True
    """
    if any(refusal in answer for refusal in REFUSALS):
        return REFUSED

    # The rules in VLMEvalKit's order: a letter, the text of an option, a phrase.
    letter = extract_letter(answer, options)
    if letter:
        return letter
    letter = extract_option_text(answer, options)
    if letter:
        return letter

    stated = _ANSWER_IS.search(answer)
    if stated and stated.group(1).upper() in options:
        return stated.group(1).upper()
    return None


def extract_letter(answer: str, letters: Mapping[str, str] | Sequence[str]) -> str | None:
    """Returns the only one of the letters that is a word of the text and is near its end.

    A text with none of the letters but the word "Z" is `REFUSED`. A letter is looked for at its
    first occurrence, and counts if at most three words follow.
    """
    words = answer.translate(_SEPARATORS).split()
    found = [letter for letter in letters if letter in words]
    if not found:
        return REFUSED if REFUSED in words else None

    if len(found) > 1:
        return None

    words_after = len(words) - words.index(found[0]) - 1
    return found[0] if words_after <= MAX_WORDS_AFTER_LETTER else None


def extract_option_text(answer: str, options: Mapping[str, str]) -> str | None:
    """Returns the letter of the only option whose text occurs in the answer, in any case.

    A text longer than twice all options together explains, and may mention any of them.
    """
    if len(answer) > 2 * sum(len(text) for text in options.values()):
        return None

    lowered = answer.lower()
    found = [letter for letter, text in options.items() if text and text.lower() in lowered]
    return found[0] if len(found) == 1 else None


def extract_open_answer(answer: str, accepted: Sequence[str]) -> bool:
    """Returns whether a text contains one of the accepted answers, at most twice as long as it.

    Open questions of MMMU: VLMEvalKit makes them multiple choice with the options "A = the answer,
    B = Other Answers". The letters of these options, which no model was shown, are not looked for.
    """
    other = "Other Answers"
    return any(
        extract_option_text(answer, {"A": text, "B": other}) == "A" for text in accepted if text
    )


def parse_accepted(answer: str) -> list[str]:
    """Returns the answers that a cell accepts: a text, or a Python list of texts as a string.

    >>> parse_accepted("['24/7', '3.429']"), parse_accepted("twelve")
    (['24/7', '3.429'], ['twelve'])
    """
    if not answer.startswith("["):
        return [answer]

    # A text may begin with a bracket without being a list.
    try:
        parsed = ast.literal_eval(answer)
    except (ValueError, SyntaxError):
        return [answer]
    return [str(text) for text in parsed] if isinstance(parsed, list) else [answer]


def extract_yes_no(answer: str) -> str:
    """Returns "Yes" or "No", whichever is a word of the text, or "Unknown" if both or none.

    >>> extract_yes_no("Yes, it is."), extract_yes_no("There is no cat. Yes."), extract_yes_no("?")
    ('Yes', 'Unknown', 'Unknown')
    """
    words = vqa.remove_punctuation(answer.lower()).split()
    has_yes, has_no = "yes" in words, "no" in words

    if has_yes == has_no:
        return UNKNOWN
    return YES if has_yes else NO


def extract_pope_answer(answer: str) -> str:
    """Returns "No" if the first sentence has the word "No", "no" or "not", else "Yes".

    The rule of POPE's and LLaVA's `eval_pope.py`, under which every other text means yes.
    """
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return NO if {"No", "no", "not"} & set(words) else YES


def extract_last_number(answer: str) -> str | None:
    """Returns the last number before the next "Question:", None if there is none.

    OpenCompass' rule for GSM8K, except that commas between thousands are removed first: it reads
    "1,234" as 234.

    >>> extract_last_number("16 - 3 = 13, so $1,234.50. Question: 7"), extract_last_number("many")
    ('1234.50', None)
    """
    own_text = _THOUSANDS_COMMA.sub("", answer.split("Question:")[0])
    numbers = _NUMBER.findall(own_text)
    return numbers[-1] if numbers else None


def are_equal_numbers(found: str | None, truth: str) -> bool:
    """Returns whether two numbers are equal to 1e-6. False where one is not a number.

    >>> are_equal_numbers("18.0", "18"), are_equal_numbers(None, "18")
    (True, False)
    """
    try:
        return found is not None and abs(float(found) - float(truth.replace(",", ""))) < 1e-6
    except ValueError:
        return False


def extract_code(answer: str) -> str:
    r"""Returns the Python code of a text: between [BEGIN] and [DONE], in a fence, or all of it.

    The forms that OpenCompass' `MBPPEvaluator` accepts. Code in single quotes, as its examples
    have it, is unquoted; a quote that belongs to the code stays.

    >>> extract_code("[BEGIN]\n 'def f():\n  return 1' \n[DONE]\nmore")
    'def f():\n  return 1'
    """
    # The solved examples have their code between [BEGIN] and [DONE].
    code = _BEGIN.split(answer, maxsplit=1)[-1]
    fence = _FENCE.search(code)
    if fence:
        code = fence.group(1)

    # Text after the code is cut off; a backslash before "_" is Markdown.
    code = _DONE.split(code, maxsplit=1)[0].split("```")[0].replace("\\_", "_").strip()
    if code.startswith("'") and not code.startswith("'''"):
        code = code[1:].removesuffix("'").strip()
    return code


def judge_answer(name: str, item: Item, text: str) -> Judgment:
    """Returns what a generated text answers, and what that is worth; `name` is of EXTRACTIONS.

    An item without an answer, as in a test split, has the credit 0.
    """
    return EXTRACTIONS[name](item, text)


def are_equal_texts(answer: str, truth: str) -> bool:
    r"""Returns whether an answer equals the true one, apart from white space around it.

    >>> are_equal_texts(" top left\n", "top left"), are_equal_texts("Top left", "top left")
    (True, False)
    """
    return answer.strip() == truth.strip()


def _judge_exact(item: Item, text: str) -> Judgment:
    return Judgment(float(are_equal_texts(text, str(item.answer))), text.strip())


def _judge_option(item: Item, text: str) -> Judgment:
    options = dict(zip(LETTERS, item.options, strict=False))
    letter = extract_option(text.strip(), options)
    # A refusal is none of the letters.
    is_right = letter in options and LETTERS.index(letter) == item.answer
    return Judgment(float(is_right), letter or "")


def _judge_option_or_text(item: Item, text: str) -> Judgment:
    if item.options:
        return _judge_option(item, text)

    # An open question; without an answer there is nothing to compare.
    accepted = (item.answer,) if isinstance(item.answer, str) else item.answer
    if not isinstance(accepted, tuple):
        return Judgment(0.0, text.strip())
    return Judgment(float(extract_open_answer(text, accepted)), text.strip())


def _judge_yes_no(item: Item, text: str, extract: Callable[[str], str]) -> Judgment:
    found = extract(text)
    is_right = isinstance(item.answer, int) and item.options[item.answer] == found
    return Judgment(float(is_right), found)


def _judge_number(item: Item, text: str) -> Judgment:
    found = extract_last_number(text)
    return Judgment(float(are_equal_numbers(found, str(item.answer))), found or "")


def _judge_code(item: Item, text: str) -> Judgment:
    code = extract_code(text)
    outcome = sandbox.run_tests(code, item.extra["tests"], item.extra.get("setup", ""))
    return Judgment(float(outcome.passed), outcome.reason or "passed")


def _judge_vqa(item: Item, text: str) -> Judgment:
    found = vqa.normalize_answer(text)
    accepted = item.answer if isinstance(item.answer, tuple) else ()
    return Judgment(vqa.score_vqa(text, accepted) if accepted else 0.0, found)


def _judge_gqa(item: Item, text: str) -> Judgment:
    return Judgment(vqa.score_gqa(text, str(item.answer)), text.strip())


# By the name in `Prompt.extraction`.
EXTRACTIONS: Mapping[str, Callable[[Item, str], Judgment]] = {
    "exact": _judge_exact,
    "option": _judge_option,
    "option or text": _judge_option_or_text,
    "yes or no": lambda item, text: _judge_yes_no(item, text, extract_yes_no),
    "pope": lambda item, text: _judge_yes_no(item, text, extract_pope_answer),
    "number": _judge_number,
    "code": _judge_code,
    "vqa": _judge_vqa,
    "gqa": _judge_gqa,
}
