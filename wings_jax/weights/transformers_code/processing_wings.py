"""Text and images to what `WingsForConditionalGeneration` reads.

`apply_chat_template(messages, tokenize=True, ...)` makes exactly the ids that the model was trained
on: the template's control tokens are ids of their own, and what people wrote is always text, also
where it spells a control token or `<image>`. `processor(text=..., images=...)` takes a text that
holds the template already, as `apply_chat_template(tokenize=False)` returns it.
"""

from __future__ import annotations

import re

import numpy as np
import tokenizers
from PIL import Image, ImageOps
from transformers import BatchFeature, ProcessorMixin

IMAGE = "<image>"
ROLES = {"system": "system", "user": "human", "human": "human", "assistant": "gpt", "gpt": "gpt"}


class WingsProcessor(ProcessorMixin):
    """Tokenizer, chat template and image preparation of a Wings model.

    Args:
        tokenizer: a fast tokenizer with the token `<image>`.
        template: dictionary of the conversation template: `controls`, `start`, `system`,
            `speakers` (text before and after a turn by speaker), `lead`, `between`, `strip`,
            `always_system`, `after_system`.
        image_size: side of the prepared square in pixels.
        resample: PIL's number of the filter that resizes, 3 for bicubic.
        image_mean, image_std: per channel, of pixels in 0 to 1.
        image_seq_length: slots that one image takes.
    """

    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer=None,
        template=None,
        image_size=384,
        resample=3,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        image_seq_length=729,
        **kwargs,
    ):
        self.template = template
        self.image_size = image_size
        self.resample = resample
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.image_seq_length = image_seq_length
        self.image_token = IMAGE
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        super().__init__(tokenizer, chat_template=kwargs.get("chat_template"))

        # A copy of the tokenizer that reads special tokens as ordinary text.
        self._plain = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._plain.encode_special_tokens = True
        self._plain.no_truncation()
        self._plain.no_padding()

    def __call__(self, text=None, images=None, return_tensors="pt", padding=True, **kwargs):
        """Returns `input_ids`, `attention_mask` and, with images, `pixel_values` f32[n,3,h,w].

        Args:
            text: one text or a list; control tokens and `<image>` in it are read as such.
            images: a PIL image, a path, or a list of them (or a list of lists, one per text).
            padding: pad several texts to one length, on the left.
        """
        texts = [text] if isinstance(text, str) else list(text or ())
        encoded = [self.tokenizer(one, add_special_tokens=False)["input_ids"] for one in texts]
        rows = [self._expand(ids) for ids in encoded]
        return self._features(rows, _flatten(images), return_tensors, padding)

    def apply_chat_template(
        self,
        conversation,
        chat_template=None,
        add_generation_prompt=False,
        tokenize=False,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        **kwargs,
    ):
        """Returns a text, or with `tokenize` what the model reads.

        Args:
            conversation: messages with `role` and `content`, a text or a list of parts
                `{"type": "text", "text": ...}` and `{"type": "image", "image" | "path": ...}`; or
                a list of such conversations.
            add_generation_prompt: add the assistant's header, for the model to continue.
            return_dict: with `tokenize`: False returns the ids alone.
        """
        is_batch = bool(conversation) and not isinstance(conversation[0], dict)
        conversations = conversation if is_batch else [conversation]
        if not tokenize:
            texts = [self._text(messages, add_generation_prompt) for messages in conversations]
            return texts if is_batch else texts[0]

        rows, images = [], []
        for messages in conversations:
            turns = self._turns(messages)
            rows.append(self._expand(self._encode(turns, add_generation_prompt)))
            images += [_open(part.image) for _, parts in turns for part in parts if part.is_image]
        features = self._features(rows, images, return_tensors, padding)
        return features if return_dict else features["input_ids"]

    def prepare_image(self, image) -> np.ndarray:
        """Returns f32[3,h,w] of a PIL image: upright, RGB, padded to a square, resized, scaled."""
        image = ImageOps.exif_transpose(image).convert("RGB")
        width, height = image.size
        if width != height:
            side = max(width, height)
            square = Image.new("RGB", (side, side), tuple(int(255 * x) for x in self.image_mean))
            square.paste(image, ((side - width) // 2, (side - height) // 2))
            image = square
        if image.size != (self.image_size, self.image_size):
            image = image.resize((self.image_size, self.image_size), self.resample)
        pixels = np.asarray(image, np.uint8).astype(np.float32) * np.float32(1 / 255)
        pixels = (pixels - np.float32(self.image_mean)) / np.float32(self.image_std)
        return pixels.transpose(2, 0, 1)

    def _features(self, rows, images, return_tensors, padding) -> BatchFeature:
        found = sum(row.count(self.image_token_id) for row in rows)
        if found != len(images) * self.image_seq_length:
            raise ValueError(
                f"the text has {found // self.image_seq_length} {IMAGE}, but {len(images)} images "
                "were given"
            )
        length = max(map(len, rows), default=0)
        if padding and rows:
            pad = self.tokenizer.pad_token_id or 0
            masks = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
            rows = [[pad] * (length - len(row)) + list(row) for row in rows]
        else:
            masks = [[1] * len(row) for row in rows]
        data = {"input_ids": rows, "attention_mask": masks}
        if images:
            data["pixel_values"] = np.stack([self.prepare_image(image) for image in images])
        return BatchFeature(data, tensor_type=return_tensors)

    def _expand(self, ids) -> list[int]:
        """Returns the ids with `image_seq_length` of them where one stands for an image."""
        sizes = [self.image_seq_length if i == self.image_token_id else 1 for i in ids]
        return [i for i, size in zip(ids, sizes, strict=True) for _ in range(size)]

    def _turns(self, messages) -> list[tuple[str, list[Part]]]:
        """Returns (speaker, parts) of each message, after the template's own system text."""
        turns = [_turn(message, strip=self.template["strip"]) for message in messages]
        system = self.template["system"]
        has_default = bool(system) or self.template["always_system"]
        if has_default and (not turns or turns[0][0] != "system"):
            turns.insert(0, ("system", [Part(system)]))
        for speaker, _ in turns:
            if speaker not in self.template["speakers"]:
                raise ValueError(f"the template has no {speaker} turns")
        return turns

    def _before(self, turns, number: int) -> str:
        """Returns what the template writes before the text of a turn."""
        speaker = turns[number][0]
        follows_system = number > 0 and turns[number - 1][0] == "system"
        after_system = self.template["after_system"]
        if follows_system and speaker == "human" and after_system is not None:
            return after_system
        return self.template["speakers"][speaker]["before"]

    def _text(self, messages, add_generation_prompt) -> str:
        """Returns a conversation as a text with control tokens and `<image>`."""
        template = self.template
        turns = self._turns(messages)
        text = template["start"]
        for number, (speaker, parts) in enumerate(turns):
            markup = template["speakers"][speaker]
            lead = template["lead"] if speaker == "gpt" else ""
            content = "".join(IMAGE if part.is_image else part.text for part in parts)
            text += self._before(turns, number) + lead + content + markup["after"]
            if number + 1 < len(turns) or add_generation_prompt:
                text += template["between"]
        return text + (template["speakers"]["gpt"]["before"] if add_generation_prompt else "")

    def _encode(self, turns, add_generation_prompt) -> list[int]:
        """Returns the ids of a conversation: adjacent context as one text, answers on their own."""
        template, writer = self.template, _Writer(self)
        writer.markup(template["start"])
        for number, (speaker, parts) in enumerate(turns):
            markup = template["speakers"][speaker]
            is_answer = speaker == "gpt"
            writer.markup(self._before(turns, number))
            if is_answer:
                writer.answer(template["lead"] + "".join(part.text for part in parts))
            else:
                writer.context(parts)
            writer.markup(markup["after"], is_answer=is_answer)
            if number + 1 < len(turns) or add_generation_prompt:
                writer.markup(template["between"], is_answer=is_answer)
        if add_generation_prompt:
            writer.markup(template["speakers"]["gpt"]["before"])
        writer.flush()
        return writer.ids


class Part:
    """A part of a message: a text, or an image (PIL image, path, or None if given later)."""

    def __init__(self, text: str = "", image=None, *, is_image: bool = False):
        self.text, self.image, self.is_image = text, image, is_image


class _Writer:
    """Collects ids; what people wrote is encoded as plain text."""

    def __init__(self, processor: WingsProcessor):
        self.processor = processor
        self.template = processor.template
        self.controls = {
            token: processor.tokenizer.convert_tokens_to_ids(token)
            for token in self.template["controls"]
        }
        self.ids: list[int] = []
        self.pending = ""

    def plain(self, text: str) -> list[int]:
        return self.processor._plain.encode(text, add_special_tokens=False).ids if text else []

    def flush(self) -> None:
        self.ids += self.plain(self.pending)
        self.pending = ""

    def pieces(self, text: str) -> list[str]:
        """Returns a template's string cut into control tokens and the text between them."""
        if not self.controls:
            return [text] if text else []
        pattern = "(" + "|".join(map(re.escape, self.controls)) + ")"
        return [piece for piece in re.split(pattern, text) if piece]

    def markup(self, text: str, *, is_answer: bool = False) -> None:
        for piece in self.pieces(text):
            if piece in self.controls:
                self.flush()
                self.ids.append(self.controls[piece])
            elif is_answer:
                self.flush()
                self.ids += self.plain(piece)
            else:
                self.pending += piece

    def context(self, parts: list[Part]) -> None:
        for part in parts:
            if part.is_image:
                self.flush()
                self.ids.append(self.processor.image_token_id)
            else:
                self.pending += part.text

    def answer(self, text: str) -> None:
        """Writes an answer as it is spelled behind the last words of the assistant's header."""
        self.flush()
        header = self.pieces(self.template["speakers"]["gpt"]["before"])
        anchor = header[-1] if header and header[-1] not in self.controls else ""
        before, both = self.plain(anchor), self.plain(anchor + text)
        is_apart = both[: len(before)] == before
        self.ids += both[len(before) :] if is_apart else self.plain(text)


def _turn(message: dict, *, strip: bool) -> tuple[str, list[Part]]:
    """Returns the speaker and the parts of a message.

    An image that is directly followed by a text is written on a line of its own, as in training.
    """
    role = message["role"]
    if role not in ROLES:
        raise ValueError(f"role {role!r} is not one of {', '.join(ROLES)}")
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]

    parts = []
    for entry in content:
        if entry["type"] == "text":
            follows_image = bool(parts) and parts[-1].is_image
            line_break = "\n" if follows_image and not entry["text"].startswith("\n") else ""
            parts.append(Part(line_break + entry["text"]))
        elif entry["type"] == "image" and ROLES[role] == "human":
            image = next((entry[k] for k in ("image", "path", "url") if k in entry), None)
            parts.append(Part(image=image, is_image=True))
        else:
            raise ValueError(f"a message of {role!r} cannot hold a part of type {entry['type']!r}")

    if strip and parts:
        parts[0].text = parts[0].text.lstrip()
        parts[-1].text = parts[-1].text.rstrip()
    return ROLES[role], parts


def _open(image):
    """Returns a PIL image of an image or a path."""
    if image is None:
        raise ValueError('an image part needs "image" (PIL) or "path"')
    return image if isinstance(image, Image.Image) else Image.open(image)


def _flatten(images) -> list:
    """Returns PIL images of None, one image, a list, or a list of lists."""
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        return [_open(images)]
    return [one for image in images for one in _flatten(image)]
