"""Rows of image benchmarks that need more than a choice of columns, as in `rewrites`."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from wings_jax.errors import UserError
from wings_jax.evaluation.benchmarks import ratings
from wings_jax.evaluation.benchmarks.record import LETTERS
from wings_jax.evaluation.benchmarks.rewrites import Rewrite, with_values
from wings_jax.evaluation.benchmarks.row_files import IMAGE_COLUMNS, Blob, Row

MARKER = re.compile(r"<image (\d+)>")
SELECT = "Please select the correct answer from the options above. \n"
SHORT_ANSWER = "Answer the question using a single word or phrase."
WITHHELD = "?"  # MMMU's answer in its test split
NO_VALUE = "nan"  # MMBench at Hugging Face: pandas' missing value as a text
_SPACES = re.compile(r"\s+")


def mmmu(row: Row) -> Iterator[Row]:
    """MMMU: options are a Python list as a string, or columns A to I; markers are "<image k>".

    The images are put into the order of the markers in question and options, where a marker may
    occur twice; without any marker all images come first.
    """
    values = row.values
    if "options" in values:
        options = _parse_options(row)
    else:
        options = [values[letter] for letter in "ABCDEFGHI" if values.get(letter)]

    question = values["question"]

    # Markers count from 1; the column of an image may be empty.
    numbers = [int(number) for number in MARKER.findall(" ".join([question, *options]))]
    stored = _stored_images(values)
    outside = [number for number in numbers if number > len(stored) or stored[number - 1] is None]
    if outside:
        raise UserError(f"{row.place}: the question names <image {outside[0]}>, which is missing")

    # VLMEvalKit's lines of the options, which an open question does not have.
    lines = "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, options, strict=False))
    block = f"Options:\n{lines}{SELECT}" if options else ""
    subject = values.get("category") or "_".join(str(values.get("id", "")).split("_")[1:-1])

    # The model gets an image per marker, so that one with two markers comes twice.
    ordered = [stored[number - 1] for number in numbers] or [
        image for image in stored if image is not None
    ]
    answer = values.get("answer")
    yield with_values(
        row,
        answer=None if answer == WITHHELD else answer,
        question=MARKER.sub("<image>", question),
        options=[MARKER.sub("<image>", option) for option in options],
        choices_block=MARKER.sub("<image>", block),
        subject=subject,
        images=ordered,
    )


def _stored_images(values: Mapping[str, Any]) -> list[Any]:
    """Returns the images by number: Hugging Face has columns, VLMEvalKit a list as a string."""
    if "image_1" in values:
        return [values.get(name) for name in IMAGE_COLUMNS[1:]]

    image = values.get("image")
    if isinstance(image, Blob) and image.count:
        return [Blob(_read_entry(image, position)) for position in range(image.count)]
    return [image] if image else []


def _read_entry(blob: Blob, position: int) -> Callable[[], Any]:
    return lambda: ast.literal_eval(blob.read())[position]


def _parse_options(row: Row) -> list[str]:
    value = row.values["options"]
    if not isinstance(value, str):
        return list(value or ())
    if not value.strip():
        return []

    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError) as error:
        raise UserError(f"{row.place}: options are not a Python list: {value[:60]!r}") from error
    return [str(option) for option in parsed]


def hallusion(row: Row) -> Iterator[Row]:
    """HallusionBench: one identifier from six columns, of which none is unique."""
    values = row.values
    if "index" in values:  # VLMEvalKit: VD_illusion_1_0_0_2
        subcategory = values["l2-category"]
        _, _, _, set_id, figure_id, question_id = values["index"].split("_")
        identifier = values["index"]
    else:
        # Other forms have the parts in columns.
        subcategory = f"{values['category']}_{values['subcategory']}"
        set_id, figure_id, question_id = (
            str(values[name]) for name in ("set_id", "figure_id", "question_id")
        )
        identifier = f"{subcategory}_{values['visual_input']}_{set_id}_{figure_id}_{question_id}"

    # `figure` names the image that several questions are about.
    yield with_values(
        row,
        id=identifier,
        l2=subcategory,
        set_id=set_id,
        figure_id=figure_id,
        question_id=question_id,
        image=values.get("image") or values.get("image_path"),
        figure=f"{subcategory}_{set_id}_{figure_id}",
    )


def image_or_path(row: Row) -> Iterator[Row]:
    """VLMEvalKit's tables without images: the files that `image_path` names."""
    yield with_values(row, image=row.values.get("image") or row.values["image_path"])


def mmbench(row: Row) -> Iterator[Row]:
    """MMBench: `circular` is a rotation's base question; options and hints "nan" are missing."""
    missing = {name: "" for name in ("hint", *LETTERS[:9]) if row.values.get(name) == NO_VALUE}
    yield with_values(row, circular=ratings.circular_group(row.values["index"]), **missing)


def llava_question(row: Row) -> Iterator[Row]:
    """LLaVA's question files: the question without the instruction, which the prompt adds."""
    text = row.values["text"].replace(SHORT_ANSWER, "").strip()
    yield with_values(row, question=text)


def mme_answers(row: Row) -> Iterator[Row]:
    """MME's folders: a line "question<TAB>Yes" in the file that is named like the image."""
    question, mark, answer = row.values["line"].rpartition("\t")
    if not mark:
        raise UserError(f"{row.place}: expected a question, a tab, and Yes or No")

    # code_reasoning/0020.txt, or artwork/questions_answers_YN/12.txt beside artwork/images/.
    directory = row.path.parent
    category = directory.parent.name if directory.name == "questions_answers_YN" else directory.name

    # A missing image is reported under its name with .jpg.
    image = next(
        (f"{row.path.stem}{suffix}" for suffix in (".jpg", ".png") if _has_image(row, suffix)),
        f"{row.path.stem}.jpg",
    )

    yield with_values(
        row,
        question=question.strip(),
        answer=answer.strip(),
        category=category,
        image=image,
        image_path=f"{category}/{image}",
        key=mme_key(category, row.path.stem, question),
    )


def _has_image(row: Row, suffix: str) -> bool:
    directory = row.path.parent
    name = f"{row.path.stem}{suffix}"
    return (directory / name).is_file() or (directory.parent / "images" / name).is_file()


def mme_key(category: str, stem: str, question: str) -> str:
    """Returns what a question of MME is found by, in the folders and in LLaVA's question file."""
    # The two files differ in instructions and spaces.
    text = question.replace("Please answer yes or no.", "").replace(SHORT_ANSWER, "")
    return f"{category}/{stem}: {_SPACES.sub(' ', text).strip()}"


def llava_mme(row: Row) -> Iterator[Row]:
    """LLaVA's question file of MME, with the key of the folders."""
    category = row.values["category"]
    stem = row.values["image"].rpartition("/")[2].rpartition(".")[0]
    key = mme_key(category, stem, row.values["text"])
    for llava_row in llava_question(row):
        yield with_values(llava_row, key=key)


def textvqa(row: Row) -> Iterator[Row]:
    """LLaVA's question file of TextVQA: an image has several questions, found by their text."""
    question = row.values["text"].replace(SHORT_ANSWER, "").strip()

    # Further lines are the OCR tokens, which the annotations lack.
    bare = question.partition("\n")[0].strip().lower()
    yield with_values(row, question=question, key=f"{row.values['question_id']}: {bare}")


def textvqa_answers(row: Row) -> Iterator[Row]:
    """TextVQA's annotations, with the same key."""
    question = row.values["question"].strip().lower()
    yield with_values(row, key=f"{row.values['image_id']}: {question}")


def textvqa_images(row: Row) -> Iterator[Row]:
    """TextVQA's annotations alone: the name of the image file."""
    yield with_values(row, image_file=f"{row.values['image_id']}.jpg")


def gqa(row: Row) -> Iterator[Row]:
    """GQA's questions alone: the name of the image file."""
    yield with_values(row, image_file=f"{row.values['imageId']}.jpg")


def nlvr(row: Row) -> Iterator[Row]:
    """NLVR: the first of the six arrangements of the image that a sentence is about."""
    values = row.values
    name = f"{values['directory']}/dev-{values['identifier']}-0.png"
    yield with_values(row, image=name)


def vqav2(row: Row) -> Iterator[Row]:
    """VQAv2's questions: the name of the image file from its number and the file's name."""
    split = next((name for name in ("val2014", "test2015") if name in row.path.name), "val2014")
    # COCO's names have twelve digits.
    image = f"COCO_{split}_{int(row.values['image_id']):012d}.jpg"
    yield with_values(row, image=image)


REWRITES: Mapping[str, Rewrite] = {
    "mmmu": mmmu,
    "hallusion": hallusion,
    "image_or_path": image_or_path,
    "mmbench": mmbench,
    "llava_question": llava_question,
    "mme_answers": mme_answers,
    "llava_mme": llava_mme,
    "textvqa": textvqa,
    "textvqa_answers": textvqa_answers,
    "textvqa_images": textvqa_images,
    "gqa": gqa,
    "nlvr": nlvr,
    "vqav2": vqav2,
}
