"""Single-choice questions of benchmarks as the pool that IIT's conversations are made of."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import random
import re
from collections.abc import Mapping, Sequence

from wings_jax.errors import UserError
from wings_jax.evaluation.benchmarks import readers
from wings_jax.evaluation.benchmarks.record import Benchmark, ImageRef, Item, Shots
from wings_jax.evaluation.benchmarks.records import BENCHMARKS

TEXT, IMAGE = "T", "V"
# Of the paper; the others are what `--sources` may add, such as files that may be redistributed.
SOURCES = (
    "mmlu",
    "cmmlu",
    "openbookqa",
    "hellaswag",
    "mmmu",
    "mmbench_en",
    "mmbench_cn",
    "seedbench",
    "ai2d",
)
MINI_SOURCES = ("gsm8k", "piqa", "openbookqa", "nlvr")
MAX_TOKENS = 400  # words, or Chinese characters, of a question
MAX_OPTIONS = 8

_TOKEN = re.compile(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+")


@dataclasses.dataclass(frozen=True)
class PoolItem:
    """A question with its options, of any benchmark."""

    # "mmlu:test:sociology-12": benchmark, split, identifier.
    uid: str
    # Name of the benchmark.
    source: str
    # "en" or "zh".
    language: str
    # TEXT or IMAGE.
    modality: str
    # Subject or category, for the prompt; "" if there is none.
    subject: str
    # The question; `<image>` stands for the image.
    question: str
    # The options.
    options: tuple[str, ...]
    # Index of the right one.
    answer: int
    # The image of an IMAGE item.
    image: ImageRef | None = None

    @property
    def sha256(self) -> str:
        """Returns the hash of question, options and answer."""
        content = json.dumps([self.question, self.options, self.answer], ensure_ascii=False)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def text(self) -> str:
        """Returns what is embedded: subject, question and options."""
        return "\n".join([self.subject, self.question, *self.options])

    def image_sha256(self) -> str:
        """Returns the hash of the image, "" without one. Raises UserError if it cannot be read."""
        return hashlib.sha256(self.image.read()).hexdigest() if self.image else ""


def read_pool(
    names: Sequence[str], data_root: pathlib.Path, *, is_default: bool = False
) -> tuple[list[PoolItem], list[str]]:
    """Returns the items of benchmarks, and a line for each whose files are missing.

    Args:
      is_default: whether a benchmark without files is left out, which otherwise is an error.

    Raises:
      UserError: a name is unknown, or files are missing or wrong.
    """
    pool: list[PoolItem] = []
    missing = []
    for name in names:
        if name not in BENCHMARKS:
            raise UserError(f"--sources: no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")

        # Solved examples are not used, and their files may be missing.
        benchmark = dataclasses.replace(BENCHMARKS[name], shots=Shots())
        try:
            items = readers.read_data_set(benchmark, data_root).items
        except readers.MissingDataError as error:
            if not is_default:
                raise
            missing.append(str(error))
            continue

        pool += [found for item in items if (found := normalize_item(benchmark, item))]
    return drop_duplicates(pool), missing


def normalize_item(benchmark: Benchmark, item: Item) -> PoolItem | None:
    """Returns an item as a single-choice question; None if it is not one, or too long.

    Left out are questions without an answer, with several images, an empty option, more than
    MAX_OPTIONS options or MAX_TOKENS words, and rotations of MMBench. The numbers that answer GSM8K
    get three others as options.
    """
    if benchmark.name == "gsm8k":
        item = add_numbers(item)

    # MMBench repeats a question with its options rotated: the base question is enough.
    circular = item.extra.get("circular")
    is_rotation = circular is not None and str(circular) != item.id

    is_choice = 2 <= len(item.options) <= MAX_OPTIONS and all(map(str.strip, item.options))
    has_image_option = any("<image>" in option for option in item.options)
    if not isinstance(item.answer, int) or not is_choice or is_rotation or has_image_option:
        return None

    # An image benchmark may have questions without an image, which are left out.
    if len(item.images) > 1 or (benchmark.modality == "image") != bool(item.images):
        return None

    question = _whole_question(item)
    if len(_TOKEN.findall(question)) > MAX_TOKENS:
        return None

    return PoolItem(
        uid=f"{benchmark.name}:{benchmark.split}:{item.id}",
        source=benchmark.name,
        language=benchmark.language,
        modality=IMAGE if item.images else TEXT,
        subject=item.group.replace("_", " "),
        question=question,
        options=item.options,
        answer=item.answer,
        image=item.images[0] if item.images else None,
    )


def _whole_question(item: Item) -> str:
    """Returns the question with the hint that it needs."""
    hint = item.extra.get("hint")
    return f"{hint}\n{item.question}" if hint else item.question


def add_numbers(item: Item) -> Item:
    """Returns a question for a whole number as single choice, with three other numbers.

    The others are what slips give: one more or less, half, double or ten times the number.
    """
    text = str(item.answer).replace(",", "")
    if not text.lstrip("-").isdigit():
        return item

    number = int(text)

    # Seeded by the question, so that its options do not depend on other questions.
    rng = random.Random(f"numbers-{item.question}")
    others = {number + 1, number - 1, number * 2, number // 2, number * 10, number + 10}
    chosen = rng.sample(sorted(others - {number}), 3)

    options = [number, *chosen]
    rng.shuffle(options)
    return dataclasses.replace(item, options=tuple(map(str, options)), answer=options.index(number))


def drop_duplicates(pool: Sequence[PoolItem]) -> list[PoolItem]:
    """Returns the items without text questions that occurred before, in any case and spacing."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    for item in pool:
        # Different questions may have the same wording and differ in their options only.
        key = tuple(normalize_text(text) for text in (item.question, *item.options))
        if item.modality == TEXT and key in seen:
            continue
        seen.add(key)
        kept.append(item)
    return kept


def normalize_text(text: str) -> str:
    """Returns a text in lower case, as words with single spaces.

    >>> normalize_text("What's  this?")
    'what s this'
    """
    return " ".join(_TOKEN.findall(text.lower()))


def find_by_uid(pool: Sequence[PoolItem]) -> Mapping[str, PoolItem]:
    """Returns the items by uid."""
    return {item.uid: item for item in pool}
