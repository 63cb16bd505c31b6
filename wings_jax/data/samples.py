"""A raw sample, and the causes for which one cannot be used."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from wings_jax.errors import UserError

MALFORMED = "malformed"
NO_HUMAN_TURN = "no human turn"
NO_ANSWER = "no assistant turn"
MARKERS = "image and marker counts differ"
TOO_MANY_IMAGES = "too many images"
MISSING_IMAGE = "missing image"
UNREADABLE_IMAGE = "unreadable image"
CUT_OFF = "all targets cut off"
UNKNOWN_FORM = "unknown record form"
EMPTY_IMAGE = "empty image with a marker"
MEDIA = "video or audio"
TOOLS = "tool call"
PREFERENCE = "preference pair"
WEIGHT = "weight other than 1"
URL = "image on the web"
CAUSES = (
    MALFORMED,
    NO_HUMAN_TURN,
    NO_ANSWER,
    MARKERS,
    TOO_MANY_IMAGES,
    MISSING_IMAGE,
    UNREADABLE_IMAGE,
    CUT_OFF,
    UNKNOWN_FORM,
    EMPTY_IMAGE,
    MEDIA,
    TOOLS,
    PREFERENCE,
    WEIGHT,
    URL,
)


class BadSample(UserError):
    """A sample that cannot be learned from.

    Attributes:
      cause: one of `CAUSES`.
      detail: what is wrong, on one line.
      sample_id: the sample's id, where the record could be read that far.
    """

    def __init__(self, cause: str, detail: str, sample_id: str | None = None):
        detail = printable(detail)
        super().__init__(f"{cause}: {detail}")
        self.cause = cause
        self.detail = detail
        self.sample_id = sample_id

    def __reduce__(self):  # by default an exception with several arguments cannot be unpickled
        return BadSample, (self.cause, self.detail, self.sample_id)


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a source holds at one index.

    id             identifies the sample in messages
    images         what `images.load_image` accepts: paths, encoded bytes or u8[h,w,3]
    conversations  turns {"from": ..., "value": ...}, unchecked
    extra          the remaining keys of the record, unchanged
    form           name of the record's form (`records.FORMS`), None if it has none of them
    """

    id: str
    images: tuple[Any, ...]
    conversations: Sequence[Mapping[str, str]]
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    form: str | None = "conversations"


@dataclasses.dataclass
class Tally:
    """Counts of samples, and of the bad ones by cause.

    max_examples  how many bad samples are listed per cause
    seen          samples counted so far, good and bad
    causes        cause -> number of bad samples
    first         cause -> 'id: detail' of the first bad samples
    """

    max_examples: int = 5
    seen: int = 0
    causes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    first: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, seen: int, bad: Sequence[tuple[str, BadSample]]) -> None:
        """Counts `seen` samples, of which those in `bad` (id, reason) were skipped."""
        self.seen += seen

        for identity, reason in bad:
            self.causes[reason.cause] += 1
            examples = self.first.setdefault(reason.cause, [])
            message = f"{identity}: {reason.detail}"
            # A sample that is bad again in a later epoch is listed once.
            if len(examples) < self.max_examples and message not in examples:
                examples.append(message)

    def merge(self, other: Tally) -> None:
        """Adds the counts of another tally, and its first bad samples where there is room."""
        self.seen += other.seen
        self.causes.update(other.causes)

        for cause, messages in other.first.items():
            examples = self.first.setdefault(cause, [])
            examples += messages[: self.max_examples - len(examples)]

    @property
    def bad(self) -> int:
        """How many of the counted samples are bad."""
        return sum(self.causes.values())

    def summary(self, causes: int = 3) -> str:
        """Returns one line: the most frequent causes, their counts and a first sample of each."""
        parts = [
            f"{count} x {cause} (first: {self.first[cause][0]})"
            for cause, count in self.causes.most_common(causes)
        ]
        return f"{self.bad} of {self.seen} samples are bad: " + "; ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Returns the counts in a form that JSON can hold."""
        by_cause = {
            cause: {"count": count, "first": self.first[cause]}
            for cause, count in self.causes.most_common()
        }
        return {"seen": self.seen, "bad": self.bad, "causes": by_cause}

    @classmethod
    def from_dict(cls, counts: Mapping[str, Any]) -> Tally:
        """Returns the tally whose `as_dict` is `counts`."""
        by_cause = counts["causes"]
        causes = collections.Counter({cause: entry["count"] for cause, entry in by_cause.items()})
        first = {cause: list(entry["first"]) for cause, entry in by_cause.items()}
        return cls(seen=counts["seen"], causes=causes, first=first)


def printable(text: str) -> str:
    """Returns `text` on one line and without lone surrogates, which no output can encode.

    >>> printable("a\\ud800b")
    'a\\\\ud800b'
    """
    return " ".join(text.splitlines()).encode("utf-8", "backslashreplace").decode("utf-8")


def shorten(value: Any, limit: int = 60) -> str:
    """Returns `value` as JSON on one line, shortened, to be quoted in a message.

    >>> shorten({"from": "bot"})
    '{"from": "bot"}'
    >>> shorten("a long text", limit=10)
    '"a long...'
    """
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."
