"""A `Template` from a tokenizer's own chat template, by rendering conversations of known texts.

The chat template is a Jinja program that writes a conversation as one text. Here it renders a few
conversations of marker words; what stands between the words is the markup of the turns. The result
is checked by rendering more conversations with both.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import cast

from wings_jax.data import conversation, settings, tokenization
from wings_jax.data.chat_rendering import make_turns, render_chat
from wings_jax.data.conversation import Template, TurnMarkup
from wings_jax.errors import UserError

TOKENIZER = "tokenizer"  # as the name of a template: that of the tokenizer's chat template
NAMES = (*conversation.TEMPLATES, TOKENIZER)
_FILE = "chat_template.jinja"

_SYSTEM, _QUESTIONS, _ANSWERS = "xSystemx", ("xAskx", "yAsky"), ("xReplyx", "yReplyy")
_QUESTION, _ANSWER = _QUESTIONS[0], _ANSWERS[0]


def derive_template(tokenizer: tokenization.HFTokenizer) -> Template:
    """Returns the template that writes what the tokenizer's chat template writes.

    Raises:
      UserError: the tokenizer has no chat template, or one that no `Template` can express; the
        message shows where the two differ.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("the tokenizer has no chat template")
    try:
        template = _Derivation(tokenizer).template()
    except ValueError as error:
        raise UserError(f"the tokenizer's chat template cannot be used: {error}") from error

    difference = compare_templates(template, tokenizer)
    if difference:
        raise UserError(f"the tokenizer's chat template cannot be expressed: {difference}")
    return template


def compare_templates(
    template: Template, tokenizer: tokenization.HFTokenizer, *, prompts_only: bool = False
) -> str:
    """Returns where a template differs from the tokenizer's chat template, '' if it does not.

    The separator that some chat templates write after the last turn is ignored.

    Args:
      prompts_only: compare prompts that wait for an answer, not answered conversations.
    """
    # Prompts end with a generation prompt, conversations with an answer.
    for turns in _conversations(with_system="system" in template.speakers):
        for is_open in (True,) if prompts_only else (False, True):
            part = turns[:-1] if is_open else turns
            written = conversation.render_text(part, template, open_answer=is_open)
            try:
                expected = render_chat(tokenizer, part, is_open=is_open)
            except ValueError as error:
                return f"it refuses {written[:40]!r}... ({error})"
            if expected not in (written, written + template.between):
                return _first_difference(written, expected)
    return ""


def template_from_settings(
    data: settings.DataConfig, tokenizer: tokenization.AnyTokenizer
) -> Template:
    """Returns the template of a config, with the config's system text.

    Raises:
      UserError: the template's name is unknown, or the tokenizer has no usable chat template.
    """
    if data.template == TOKENIZER:
        template = derive_template(cast("tokenization.HFTokenizer", tokenizer))
    else:
        template = conversation.get_template(data.template)

    if data.system == "none":
        return dataclasses.replace(template, system="", always_system=False)
    return dataclasses.replace(template, system=data.system) if data.system else template


def choose_template(tokenizer: tokenization.HFTokenizer, *, prefer_named: bool) -> tuple[str, str]:
    """Returns the name of the template of a tokenizer, and a line that explains the choice.

    A template of `conversation.TEMPLATES` is chosen if it equals the chat template or the
    tokenizer has none; else the name is TOKENIZER. A chat template that writes its last answer in
    another way than the others (Qwen3) is no Template; then its prompts decide.

    Args:
      prefer_named: choose the first template whose control tokens the tokenizer has even if it
        differs.

    Raises:
      UserError: neither fits.
    """
    names = conversation.find_template_names(tokenizer)
    names = names[:1] if prefer_named else names
    name = names[0] if names else None

    if not getattr(tokenizer, "chat_template", None):
        name = name or conversation.get_template_for(tokenizer)
        return name, f"template: {name}, by its control tokens; the tokenizer has no chat template"

    # A named template is best: its checkpoints do not depend on a Jinja program.
    differences = {
        each: compare_templates(conversation.TEMPLATES[each], tokenizer) for each in names
    }
    for each, difference in differences.items():
        if not difference:
            return each, f"template: {each}, equal to the tokenizer's chat template"

    difference = differences[name] if name else ""
    if name and prefer_named:
        return name, f"template: {name}; the tokenizer's chat template differs: {difference}"

    # What cannot be derived may still be one of the named templates.
    try:
        derive_template(tokenizer)
    except UserError as error:
        if name is None:
            raise UserError(f"{error}; give --template NAME or FILE") from error

        for each in names:
            template = conversation.TEMPLATES[each]
            if not compare_templates(template, tokenizer, prompts_only=True):
                return each, f"template: {each}, equal in prompts; {error}"
        return name, f"template: {name}, by its control tokens; {error}"

    differs = f"; {name} differs: {difference}" if name else ""
    return TOKENIZER, f"template: the tokenizer's chat template{differs}"


def explain_template(name: str, tokenizer: tokenization.HFTokenizer) -> str:
    """Returns a line on how the template that a user chose compares with the chat template.

    Raises:
      UserError: there is no such template.
    """
    if name == TOKENIZER:
        derive_template(tokenizer)
        return "template: the tokenizer's chat template"

    template = conversation.get_template(name)
    if not getattr(tokenizer, "chat_template", None):
        return f"template: {name}; the tokenizer has no chat template"

    difference = compare_templates(template, tokenizer)
    if not difference:
        return f"template: {name}, equal to the tokenizer's chat template"
    return f"template: {name}; the tokenizer's chat template differs: {difference}"


def with_template_file(files: Mapping[str, str], path: pathlib.Path) -> dict[str, str]:
    """Returns a tokenizer's files, name -> content, with the chat template of a Jinja file.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(
            f"--template {path}: not one of {', '.join(NAMES)}, nor a readable file: {error}"
        ) from error
    return {**files, _FILE: text}


class _Derivation:
    """The markup between the words of rendered conversations.

    Raises ValueError where the chat template has another structure.
    """

    def __init__(self, tokenizer: tokenization.HFTokenizer):
        self.tokenizer = tokenizer
        special = tokenization.special_tokens(tokenizer)

        # What stands before and after each of four texts.
        turns = make_turns(("human", _QUESTIONS[0]), ("gpt", _ANSWERS[0]), ("human", _QUESTIONS[1]))
        turns += make_turns(("gpt", _ANSWERS[1]))
        words = (_QUESTIONS[0], _ANSWERS[0], _QUESTIONS[1], _ANSWERS[1])
        text = render_chat(tokenizer, turns, is_open=False)
        self.first, self.to_answer, self.to_question, again, self.end = _split(text, words)
        if again != self.to_answer:
            raise ValueError("it writes a later answer in another way than the first")

        # The generation prompt: from the question to where an answer begins.
        opened = render_chat(tokenizer, turns[:1], is_open=True)
        _, self.header = _split(opened, words[:1])
        self.controls = tuple(sorted(token for token in special if token in text + opened))

        # Before and after a system text.
        try:
            with_system = make_turns(("system", _SYSTEM)) + turns[:2]
            text = render_chat(tokenizer, with_system, is_open=False)
            before, after, *_ = _split(text, (_SYSTEM, *words[:2]))
            self.system: tuple[str, str] | None = (before, after)
            self.controls = tuple(sorted({*self.controls, *(t for t in special if t in text)}))
        except ValueError:
            self.system = None  # such as Gemma's

    def template(self) -> Template:
        """Returns the template, which remains to be checked."""
        if not self.to_answer.startswith(self.header):
            raise ValueError("its answers do not begin with its generation prompt")

        # The second question follows the end of the first answer.
        after_answer, between = self._end_of_turn()
        question_header = self.to_question.removeprefix(after_answer + between)

        # Text that is not learned may be divided anywhere if turns have no separator.
        after_question, answer_header = "", self.header
        if self.header.startswith(after_answer + between):
            after_question = after_answer
            answer_header = self.header.removeprefix(after_answer + between)
        elif between:
            after_question, _, answer_header = self.header.partition(between)

        speakers = {
            "human": TurnMarkup(question_header, after_question),
            "gpt": TurnMarkup(answer_header, after_answer),
        }

        template = Template(
            controls=self.controls,
            start=self.first.removesuffix(question_header),
            system="",
            speakers=speakers,
            lead=self.to_answer.removeprefix(self.header),
            between=between,
            strip=self._is_stripped(),
        )
        return template if self.system is None else self._add_system(template)

    def _end_of_turn(self) -> tuple[str, str]:
        """Returns what ends an answer, up to its first control token, and what separates turns."""
        # At the end of the conversation and before a question the same text ends the answer.
        size = 0
        while size < min(len(self.end), len(self.to_question)):
            if self.end[size] != self.to_question[size]:
                break
            size += 1

        shared = self.end[:size]
        stops = [shared.index(token) + len(token) for token in self.controls if token in shared]
        if not stops:
            raise ValueError("its answers do not end with a control token")
        return shared[: min(stops)], shared[min(stops) :]

    def _add_system(self, template: Template) -> Template:
        """Returns the template with the markup of system turns and the default system text."""
        if self.system is None:
            return template

        before, after = self.system
        question_header = template.speakers["human"].before
        size = len(before) + len(after)

        # Does a conversation without system text begin as one with it?
        is_default = (
            len(self.first) >= size and self.first.startswith(before) and self.first.endswith(after)
        )

        # With a default system text every conversation begins with a system turn.
        start, text = template.start, ""
        if is_default:
            text = self.first[len(before) : len(self.first) - len(after)]
            bos = getattr(self.tokenizer, "bos_token", None) or ""
            start = bos if bos and before.startswith(bos) else ""
        if not before.startswith(start):
            raise ValueError("it begins a conversation with a system turn in another way")

        # What follows the system text: its end and a question's header, or, as in Llama 2, only
        # the question, because both are one turn.
        after_system, after_header = after.removesuffix(template.between + question_header), None
        if after_system == after:  # the question follows the system text within one turn
            after_system, after_header = after, ""
            if template.between:
                after_system, _, after_header = after.partition(template.between)

        markup = TurnMarkup(before.removeprefix(start), after_system)
        return dataclasses.replace(
            template,
            start=start,
            system=text,
            always_system=is_default and not text,
            after_system=after_header,
            speakers={"system": markup, **template.speakers},
        )

    def _is_stripped(self) -> bool:
        """Returns whether white space around a question is removed."""
        opened = render_chat(
            self.tokenizer, make_turns(("human", f"\t{_QUESTION}\t")), is_open=True
        )
        return f"\t{_QUESTION}\t" not in opened


def _conversations(*, with_system: bool) -> list[list[dict[str, str]]]:
    """Returns conversations in which templates differ, each with a last answer."""
    first = make_turns(("human", "What is it?"), ("gpt", "A cat."))
    more = make_turns(("human", "  Really?\n"), ("gpt", "\nYes, it is. "))
    conversations = [first, first + more, first + more + first]
    if with_system:
        system = make_turns(("system", "Be brief. Answer in English."))
        conversations += [system + first, system + first + more]
    return conversations


def _split(text: str, words: Sequence[str]) -> tuple[str, ...]:
    """Returns what stands before, between and after the words, each of which occurs once.

    >>> _split("[a]x[b]y[c]", ("x", "y"))
    ('[a]', '[b]', '[c]')
    """
    parts = []
    for word in words:
        if text.count(word) != 1:
            raise ValueError("it does not write every turn once and in order")
        before, _, text = text.partition(word)
        parts.append(before)
    return (*parts, text)


def _first_difference(written: str, expected: str) -> str:
    """Returns the surroundings of the first character in which two texts differ."""
    size = 0
    while size < min(len(written), len(expected)) and written[size] == expected[size]:
        size += 1

    start = max(0, size - 12)
    return f"{written[start : size + 28]!r} instead of {expected[start : size + 28]!r}"
