"""Records in the forms that people publish, read into one form: turns and images.

`FORMS` is the table of them. A record has the first form whose keys it has. Every form yields
turns {"from": system|human|gpt, "value": text} in which `<image>` stands for an image; what a
model cannot be trained on (video, tool calls, images on the web, masked turns) is refused by cause.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wings_jax.data import samples, turns
from wings_jax.data.record_images import image_source
from wings_jax.data.samples import BadSample

Record = Mapping[str, Any]
Turn = dict[str, str]

IMAGE_KEYS = ("image", "images")
CAPTION_IMAGE_KEYS = (*IMAGE_KEYS, "image_path", "file_name")
SYSTEM_KEYS = ("system", "system_prompt")
CAPTION_KEYS = ("text", "caption", "label")
# Keys of a record or a turn that must be empty -> the cause if they are not.
REFUSED_KEYS = {
    "video": samples.MEDIA,
    "videos": samples.MEDIA,
    "audio": samples.MEDIA,
    "audios": samples.MEDIA,
    "tools": samples.TOOLS,
    "functions": samples.TOOLS,
    "tool_calls": samples.TOOLS,
    "function_call": samples.TOOLS,
    "chosen": samples.PREFERENCE,
    "rejected": samples.PREFERENCE,
}
# Keys that say whether a record or a turn is learned; only 1, true and null are.
RECORD_WEIGHTS = ("weight",)
TURN_WEIGHTS = ("weight", "train", "loss")
IMAGE_PARTS = ("image", "image_url")
IMAGE_PART_KEYS = ("image", "image_url", "value", "url", "path")  # the first that is not empty
TOOL_SPEAKERS = ("function", "function_call", "tool", "tool_call", "tool_response")


@dataclasses.dataclass(frozen=True)
class RecordForm:
    """One way to write a conversation.

    name        what data.check calls it
    keys        the record has at least one key of each of these groups
    read_turns  the turns of a record; images among them are appended to the list
    image_keys  where the record's images are, the first that is not empty
    """

    name: str
    keys: tuple[tuple[str, ...], ...]
    read_turns: Callable[[Record, list[Any]], list[Turn]]
    image_keys: tuple[str, ...] = IMAGE_KEYS

    def fits(self, record: Record) -> bool:
        """Returns whether the record has the keys of this form."""
        return all(any(key in record for key in group) for group in self.keys)


def to_sample(record: Record, name: str, images: pathlib.Path) -> samples.Sample:
    """Returns the sample of a record.

    A record of no known form gives a sample whose `form` is None, which `turns.normalize_sample`
    refuses.

    Args:
      name: the id of a record that has none.
      images: directory that image paths are relative to.

    Raises:
      BadSample: the record cannot be trained on; it has the record's id.
    """
    given = record.get("id")
    identity = samples.printable(name if given is None else str(given))
    try:
        return _read_sample(record, identity, images)
    except BadSample as reason:
        raise BadSample(reason.cause, reason.detail, sample_id=identity) from reason


def _read_sample(record: Record, identity: str, images: pathlib.Path) -> samples.Sample:
    _refuse_keys(record, RECORD_WEIGHTS)
    form = next((form for form in FORMS if form.fits(record)), None)
    if form is None:
        return samples.Sample(identity, (), (), record, form=None)

    # Images are in the messages, in a list beside them, or both.
    inline: list[Any] = []
    conversation = form.read_turns(record, inline)
    listed = _listed_images(record, form.image_keys)
    values = _fill_images(inline, listed) if inline else listed

    if not values:
        _refuse_empty_image(record, form, conversation)

    # The system text of the record becomes the first turn; unused keys stay available.
    conversation = _add_system(record, conversation)
    sources = tuple(image_source(value, images) for value in values)
    used = {*form.image_keys, *SYSTEM_KEYS, "id", *(key for group in form.keys for key in group)}
    extra = {key: value for key, value in record.items() if key not in used}
    return samples.Sample(identity, sources, conversation, extra, form=form.name)


def _fill_images(inline: Sequence[Any], listed: Sequence[Any]) -> list[Any]:
    """Returns the images of the messages; a part without content takes the next listed one."""
    empty = sum(image is None for image in inline)
    if empty != len(listed):
        detail = f"{empty} image parts without content, {len(listed)} images in the record"
        raise BadSample(samples.MARKERS, detail)

    rest = iter(listed)
    return [next(rest) if image is None else image for image in inline]


def _refuse_keys(record: Record, weights: Sequence[str]) -> None:
    """Raises BadSample for keys of a record or turn that cannot be trained on."""
    for key, cause in REFUSED_KEYS.items():
        if record.get(key) and record[key] != "[]":
            raise BadSample(cause, f"{key} is {samples.shorten(record[key])}")

    # A masked turn would be learned, so it is refused rather than ignored.
    for key in weights:
        if record.get(key, 1) not in (1, None):
            raise BadSample(samples.WEIGHT, f"{key} is {samples.shorten(record[key])}")


def _refuse_empty_image(record: Record, form: RecordForm, conversation: Any) -> None:
    """Raises BadSample if an image key is empty although a human turn has a marker."""
    keys = [key for key in form.image_keys if key in record]
    if not keys or not isinstance(conversation, list):
        return

    # Turns are not checked yet: they may be anything.
    for turn in conversation:
        text = turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(text, str) or turns.speaker_of(turn) != "human":
            continue
        if turns.count_markers(text):
            detail = f"{keys[0]} is {samples.shorten(record[keys[0]])}"
            raise BadSample(samples.EMPTY_IMAGE, detail)


def _add_system(record: Record, conversation: Any) -> Any:
    """Returns the turns with the record's system text in front."""
    key = next((key for key in SYSTEM_KEYS if record.get(key)), None)
    if key is None or not isinstance(conversation, list):
        return conversation

    has_system = conversation and turns.speaker_of(conversation[0]) == "system"
    if not isinstance(record[key], str) or has_system:
        what = "and there is a system turn" if has_system else "not a text"
        raise BadSample(samples.MALFORMED, f"{key} is {samples.shorten(record[key])}, {what}")
    return [{"from": "system", "value": record[key]}, *conversation]


def _message_list(key: str) -> Callable[[Record, list[Any]], list[Turn]]:
    """Returns the reader of a list of turns or of question-answer pairs under `key`."""

    def read_turns(record: Record, images: list[Any]) -> list[Turn]:
        messages = record[key]
        if not isinstance(messages, (list, tuple)):
            return messages  # refused with all other malformed turns

        # Where a sample has images, the word `<image>` of a text part must be escaped.
        has_images = bool(_listed_images(record, IMAGE_KEYS)) or _has_image_parts(messages)
        conversation: list[Turn] = []
        for message in messages:
            conversation += _read_message(message, images, escape=has_images)
        return conversation

    return read_turns


def _has_image_parts(messages: Sequence[Any]) -> bool:
    """Returns whether any content part of the messages is an image."""
    contents = [
        message.get("content", message.get("value"))
        for message in messages
        if isinstance(message, Mapping)
    ]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, Mapping) and _kind(part) in IMAGE_PARTS for part in parts)


def _kind(part: Mapping[str, Any]) -> str:
    """Returns the type of a content part, without the prefix of newer forms."""
    return str(part.get("type")).removeprefix("input_").removeprefix("output_")


def _read_message(message: Any, images: list[Any], *, escape: bool) -> list[Turn]:
    """Returns the turn of a message, or the two of a pair."""
    if not isinstance(message, Mapping):
        return [message]

    _refuse_keys(message, TURN_WEIGHTS)

    # ShareGPT pairs, then role/content, then LLaVA's from/value.
    if "from" not in message and {"human", "assistant"} <= set(message):
        pair = ("human", message["human"]), ("gpt", message["assistant"])
        return [{"from": speaker, "value": text} for speaker, text in pair]
    if "from" not in message and "role" in message:
        message = {"from": message["role"], "value": message.get("content")}
    if "from" not in message or "value" not in message:
        return [dict(message)]

    # Content may be a text or a list of parts.
    speaker, content = message["from"], message["value"]
    if isinstance(speaker, str) and speaker.lower() in TOOL_SPEAKERS:
        raise BadSample(samples.TOOLS, f"a turn of {speaker!r}")
    if isinstance(content, (list, tuple)):
        content = _read_parts(content, turns.speaker_of(message), images, escape=escape)
    return [{"from": speaker, "value": content}]


def _read_parts(
    parts: Sequence[Any], speaker: str | None, images: list[Any], *, escape: bool
) -> str:
    """Returns the text of content parts, with a marker for each image part."""
    texts = []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise BadSample(samples.MALFORMED, f"a content part is {samples.shorten(part)}")

        # Text keeps its place among the images; other kinds of parts are refused.
        kind = _kind(part)
        if kind == "text":
            content = part.get("text", part.get("value"))
            if not isinstance(content, str):
                raise BadSample(samples.MALFORMED, f"a text part is {samples.shorten(part)}")
            # Where images have parts of their own, the word `<image>` in a text is not a marker.
            is_escaped = escape and speaker == "human"
            texts.append(turns.escape_markers(content) if is_escaped else content)
        elif kind in IMAGE_PARTS:
            if speaker != "human":
                raise BadSample(samples.MALFORMED, f"an image in a turn of {speaker}")
            images.append(next((part[key] for key in IMAGE_PART_KEYS if part.get(key)), None))
            texts.append(turns.MARKER)
        else:
            is_media = kind.startswith(("video", "audio"))
            cause = samples.MEDIA if is_media else samples.TOOLS
            raise BadSample(cause, f"a content part of type {part['type']!r}")
    return "".join(texts)


def _question_answer(question: str, answer: str) -> RecordForm:
    """Returns the form of one question and its answer, with an optional history of pairs."""

    def read_turns(record: Record, images: list[Any]) -> list[Turn]:
        history = record.get("history") or []
        pairs = [*history] if isinstance(history, (list, tuple)) else [history]
        for pair in pairs:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                detail = f"history has {samples.shorten(pair)}, not a question and an answer"
                raise BadSample(samples.MALFORMED, detail)

        # The record's own question and answer are the last pair.
        question_text = record[question]
        if question == "instruction" and record.get("input"):
            if not isinstance(question_text, str) or not isinstance(record["input"], str):
                raise BadSample(samples.MALFORMED, f"input is {samples.shorten(record['input'])}")
            question_text = (
                f"{question_text}\n{record['input']}"  # Alpaca: the input follows the instruction
            )
        pairs.append((question_text, record[answer]))

        conversation = []
        for human, assistant in pairs:
            conversation.append({"from": "human", "value": human})
            conversation.append({"from": "gpt", "value": assistant})
        return conversation

    return RecordForm(f"{question}, {answer}", ((question,), (answer,)), read_turns)


def _caption(record: Record, images: list[Any]) -> list[Turn]:
    """Returns the image as the question and its text as the answer."""
    listed = _listed_images(record, CAPTION_IMAGE_KEYS)
    if not listed:
        raise BadSample(samples.EMPTY_IMAGE, "an image and text without an image")

    caption = next(record[key] for key in CAPTION_KEYS if key in record)
    return [
        {"from": "human", "value": turns.MARKER * len(listed)},
        {"from": "gpt", "value": caption},
    ]


FORMS: tuple[RecordForm, ...] = (
    RecordForm("conversations", (("conversations",),), _message_list("conversations")),
    RecordForm("messages", (("messages",),), _message_list("messages")),
    RecordForm("conversation", (("conversation",),), _message_list("conversation")),
    _question_answer("instruction", "output"),
    _question_answer("query", "response"),
    _question_answer("prompt", "completion"),
    _question_answer("prompt", "response"),
    _question_answer("question", "answer"),
    RecordForm("image and text", (CAPTION_IMAGE_KEYS, CAPTION_KEYS), _caption, CAPTION_IMAGE_KEYS),
)


def _listed_images(record: Record, keys: Sequence[str]) -> list[Any]:
    """Returns the images of the record's first image key that is not empty."""
    value: Any = next((record[key] for key in keys if record.get(key)), [])
    return list(value) if isinstance(value, (list, tuple)) else [value]
