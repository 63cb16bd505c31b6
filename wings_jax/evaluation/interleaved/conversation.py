"""The conversations of IIT: the turns that a model is asked, in the six settings.

The wording of a question is that of the paper's figure 8. Between turns stands one of ten wordings
of each kind in each language, which the manifest names: after a text question, or at an image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from wings_jax.evaluation import iit
from wings_jax.evaluation.benchmarks import prompts
from wings_jax.evaluation.benchmarks.record import LETTERS, TURNS, Item
from wings_jax.evaluation.interleaved.manifest import CONNECTIVES, ManifestEntry, ManifestItem
from wings_jax.evaluation.interleaved.pool import IMAGE, PoolItem

HISTORIES = ("gold", "model", "shuffled")
MARKER = "<image>"

# Before a text question that follows another.
TEXT_CONNECTIVES = {
    "en": (
        "Following on from that, here is the next question.",
        "Staying with this topic, please answer the following.",
        "That brings us to another question.",
        "Now consider a related question.",
        "Next, think about this.",
        "With that in mind, answer this question.",
        "Let us go on with a similar question.",
        "Here is one more on the subject.",
        "In the same vein, here is another one.",
        "Moving on, please answer this one.",
    ),
    "zh": (
        "接着上面的问题，请看下一题。",
        "继续这个话题，请回答下面的问题。",
        "由此引出另一个问题。",
        "现在请考虑一个相关的问题。",
        "接下来，请思考这个问题。",
        "结合上面的内容，请回答此题。",
        "我们继续看一个类似的问题。",
        "关于这个主题，还有一题。",
        "同样地，再来看一题。",
        "下面请回答这一题。",
    ),
}
# Before a question about an image that follows a text question.
IMAGE_CONNECTIVES = {
    "en": (
        "Now look at this picture: <image>",
        "Following on from that, look at this image. <image>",
        "Here is a related image: <image>",
        "With that in mind, please look at the picture. <image>",
        "Next, consider this image: <image>",
        "The next question is about this picture. <image>",
        "Moving on, here is an image: <image>",
        "Let us turn to a picture. <image>",
        "Please have a look at the following image. <image>",
        "That brings us to this picture: <image>",
    ),
    "zh": (
        "现在请看这张图片：<image>",
        "接着上面的问题，请看这张图。<image>",
        "这是一张相关的图片：<image>",
        "结合上面的内容，请看图。<image>",
        "接下来，请看这张图片：<image>",
        "下一题与这张图片有关。<image>",
        "下面是一张图片：<image>",
        "我们来看一张图片。<image>",
        "请看下面的图片。<image>",
        "由此引出这张图片：<image>",
    ),
}
INSTRUCTIONS = {
    "en": (
        "There is a single choice question about {subject}. Answer the question by replying "
        "{letters}.\nQuestion: {question}\n{options}"
    ),
    "zh": "下面是一道关于{subject}的单项选择题，请回答 {letters}。\n问题：{question}\n{options}",
}
BARE_INSTRUCTIONS = {
    "en": (
        "There is a single choice question. Answer the question by replying {letters}.\n"
        "Question: {question}\n{options}"
    ),
    "zh": "下面是一道单项选择题，请回答 {letters}。\n问题：{question}\n{options}",
}
assert all(
    len(bank) == CONNECTIVES
    for banks in (TEXT_CONNECTIVES, IMAGE_CONNECTIVES)
    for bank in banks.values()
)


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question as a turn of a conversation."""

    # The human's text, without what connects it with the turn before.
    text: str
    # Before the text if another turn precedes, and if it is the first one; has the marker of an
    # image that the text does not have.
    connective: str
    # As `connective`, of a first turn.
    beginning: str
    # The options in their order here.
    options: tuple[str, ...]
    # Index of the right one.
    answer: int
    # The question.
    item: PoolItem

    @property
    def letter(self) -> str:
        """Returns the right answer as the assistant gives it."""
        return LETTERS[self.answer]

    def spoken(self, is_first: bool) -> str:
        """Returns the human's whole text."""
        before = self.beginning if is_first else self.connective
        return f"{before}\n{self.text}" if before else self.text


def make_turn(item: PoolItem, wording: ManifestItem) -> Turn:
    """Returns a question with rotated options, and what connects it with the turn before."""
    count = len(item.options)

    # A rotation by r moves the option at index i + r to index i.
    options = tuple(item.options[(i + wording.rotation) % count] for i in range(count))
    answer = (item.answer - wording.rotation) % count

    letters = LETTERS[:count]
    lines = "\n".join(
        f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)
    )

    # The subject is named where the data set has one.
    template = INSTRUCTIONS if item.subject else BARE_INSTRUCTIONS
    text = template[item.language].format(
        subject=item.subject,
        letters=join_letters(letters, item.language),
        question=item.question,
        options=lines,
    )

    # An image without a marker in the question comes with the connective.
    needs_marker = item.modality == IMAGE and MARKER not in item.question
    banks = IMAGE_CONNECTIVES if needs_marker else TEXT_CONNECTIVES
    connective = banks[item.language][wording.template % CONNECTIVES]
    return Turn(text, connective, MARKER if needs_marker else "", options, answer, item)


def join_letters(letters: str, language: str) -> str:
    """Returns letters as a list in words of a language.

    >>> join_letters("ABC", "en"), join_letters("ABC", "zh")
    ('A, B or C', 'A、B 或 C')
    """
    if language == "zh":
        return f"{'、'.join(letters[:-1])} 或 {letters[-1]}"
    return prompts.join_letters(letters)


def settings_of(modality: str) -> list[str]:
    """Returns the settings that end with a question of this modality, the shortest first.

    >>> settings_of("V")
    ['V', 'TV', 'TTV']
    """
    return sorted((setting for setting in iit.SETTINGS if setting[-1] == modality), key=len)


def make_conversation(
    identifier: str, setting: str, turns: Sequence[Turn], answers: Sequence[str]
) -> Item:
    """Returns a conversation as an item, whose last turn is scored.

    Args:
      identifier: of the anchor.
      turns: as many as the setting has letters.
      answers: the assistant's, after each turn but the last.
    """
    last = turns[-1]
    history: list[dict[str, str]] = []
    for number, (turn, answer) in enumerate(zip(turns[:-1], answers, strict=True)):
        # Beside an image, a marker in the text of a question is a word.
        text = turn.spoken(number == 0)
        marked = text.replace(MARKER, f"\\{MARKER}") if last.item.image else text
        history.append({"from": "human", "value": marked})
        history.append({"from": "gpt", "value": answer})

    return Item(
        id=f"{identifier}/{setting}",
        question=last.spoken(len(turns) == 1),
        options=last.options,
        answer=last.answer,
        group=iit.format_setting(setting),
        images=(last.item.image,) if last.item.image else (),
        extra={
            TURNS: tuple(history),
            "setting": setting,
            "source": last.item.source,
            "language": last.item.language,
        },
        cluster=identifier,
    )


def anchor_name(number: int, entry: ManifestEntry) -> str:
    """Returns the identifier of an anchor: its number in the manifest and its uid."""
    return f"{number:05d}-{entry.anchor.uid}"
