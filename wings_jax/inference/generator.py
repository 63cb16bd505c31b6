"""Answers about images and text: the library surface of inference.

restored = checkpoint.load("runs/stage2")
generator = Generator.of(restored)
print(generator.generate([Request("What is this?", ["cat.jpg"])])[0].text)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from wings_jax import tree
from wings_jax.data import conversation, tokenization
from wings_jax.errors import UserError
from wings_jax.inference import engine, likelihood, prompts, scheduler, streaming
from wings_jax.inference.chat import Chat
from wings_jax.inference.dialogue import Dialogue
from wings_jax.inference.likelihood import Likelihood
from wings_jax.inference.prompts import PromptProcessor, Request
from wings_jax.inference.sampling import SamplingParams
from wings_jax.inference.streaming import TextStream
from wings_jax.model import parameters
from wings_jax.model.presets import WingsArch


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model said.

    text      without what ended it
    tokens    ids, without the stop token
    reason    why it ended: "stop" (a stop token), "string" (a stop string) or "length"
    prompt    how many slots the prompt took
    logprobs  of each token, where asked for
    """

    text: str
    tokens: tuple[int, ...]
    reason: str
    prompt: int
    logprobs: tuple[float, ...] | None = None


class Generator:
    """Answers requests with one model.

    Args:
      params: nested parameters; matrices are kept in `dtype` (bfloat16 on accelerators, float32
        on a CPU by default).
      tokenizer: a fast tokenizer of `transformers`.
      template: a name of `conversation.TEMPLATES`, or a Template.
      rows: how many requests are answered at once.
      sampling: what a request that says nothing gets.
      mesh: devices that share weights and caches, by the rules of training (`axes.RULES`); without
        one, all is on the device of the parameters.

    Raises:
      MeshError: the mesh does not divide the model.
    """

    def __init__(
        self,
        arch: WingsArch,
        params: Mapping[str, Any],
        tokenizer: Any,
        template: str | conversation.Template,
        *,
        dtype: str | None = None,
        kernel: str = "auto",
        rows: int = 16,
        sampling: SamplingParams | None = None,
        mesh: Mesh | None = None,
    ):
        if isinstance(template, str):
            template = conversation.get_template(template)
        self.spec = engine.ModelSpec(arch, dtype or parameters.default_dtype(), kernel, mesh)
        params = params if mesh is None else place_params(params, arch, mesh)
        self.weights = engine.split_layers(params, self.spec)
        self.sampling = sampling or SamplingParams()
        self.reader = PromptProcessor(arch, tokenizer, template, _lacks(arch, params))
        self.plan = scheduler.SchedulerOptions(rows, stops=stop_tokens(tokenizer, template))

    @classmethod
    def of(cls, restored: Any, **options: Any) -> Generator:
        """Returns the generator of a checkpoint (`training.checkpoint.load`)."""
        template = conversation.template_from_settings(restored.config.data)
        return cls(restored.arch, restored.params, restored.tokenizer, template, **options)

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Returns an answer to every request, in their order.

        Raises:
          UserError: a request is wrong; the message says which one.
        """
        answers: list[Answer | None] = [None] * len(requests)
        for index, answer in self.answers(requests):
            if isinstance(answer, UserError):
                where = f"request {index + 1}: " if len(requests) > 1 else ""
                raise UserError(f"{where}{answer}") from answer
            answers[index] = answer
        return answers

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer | UserError]]:
        """Yields (index, answer) as they end, or what is wrong with a request instead."""
        tasks = []
        for index, request in enumerate(requests):
            try:
                tasks.append(self._task(index, request))
            except UserError as error:
                yield index, error
        for task, draft in scheduler.run(self.spec, self.weights, tasks, self.plan):
            is_error = isinstance(draft, UserError)
            yield task.index, draft if is_error else self._answer(draft)

    def stream(self, request: Request) -> Iterator[str]:
        """Yields the answer to a request piece by piece.

        Raises:
          UserError: the request is wrong.
        """
        prompt = self.reader.read(request)
        prompt = dataclasses.replace(prompt, images=self.reader.load(request.images))
        wish = self.reader.fit(request.sampling or self.sampling, prompt)
        stream = TextStream(self.reader.text, wish.stop)
        for piece in Dialogue(self.spec, self.weights, self.plan.stops).answer(prompt, wish):
            tokens = [token for token in piece.tokens if token not in self.plan.stops]
            fresh = stream.add(tokens, is_last=piece.is_last)
            if fresh:
                yield fresh
            if stream.is_cut:
                return

    def chat(self, *, system: str = "", sampling: SamplingParams | None = None) -> Chat:
        """Returns a conversation whose past is never read twice."""
        dialogue = Dialogue(self.spec, self.weights, self.plan.stops)
        return Chat(self.reader, dialogue, sampling or self.sampling, system)

    def score(
        self,
        requests: Sequence[tuple[Request, Sequence[str]]],
        *,
        with_end: bool = True,
    ) -> list[list[Likelihood]]:
        """Returns how likely each of the given answers to each request is.

        With `with_end` the end of turn counts too, as it does when an answer is generated.

        Raises:
          UserError: a request is wrong.
        """
        found: list[list[Likelihood]] = [[] for _ in requests]
        for index, likelihoods in self.scores(requests, with_end=with_end):
            if isinstance(likelihoods, UserError):
                raise likelihoods
            found[index] = likelihoods
        return found

    def scores(
        self, requests: Sequence[tuple[Request, Sequence[str]]], *, with_end: bool = True
    ) -> Iterator[tuple[int, list[Likelihood] | UserError]]:
        """Yields (index, what `score` returns for it) as they end, or what is wrong with it."""
        offers, places = [], []
        for index, (request, answers) in enumerate(requests):
            try:
                offers.append(self._offer(request, answers, with_end))
                places.append(index)
            except UserError as error:
                yield index, error
        for number, found in likelihood.score(self.spec, self.weights, offers, self.plan.rows):
            yield places[number], found

    def score_text(self, texts: Sequence[str]) -> list[Likelihood]:
        """Returns how likely each plain text is behind its first token, which is not counted.

        There is no template around it. A text that is longer than the model reads is read in
        windows (`Reader.windows`).

        Raises:
          UserError: a text is less than two tokens.
        """
        windows = [(i, ids) for i, text in enumerate(texts) for ids in self.reader.windows(text)]
        offers = [
            likelihood.ScoringRequest(prompts.from_ids(ids[:1], (), 1), [ids[1:]])
            for _, ids in windows
        ]
        found = [Likelihood(0.0, 0, True)] * len(texts)
        for number, (part,) in likelihood.score(self.spec, self.weights, offers, self.plan.rows):
            index = windows[number][0]
            found[index] = found[index] + part
        return found

    def _offer(
        self, request: Request, answers: Sequence[str], with_end: bool
    ) -> likelihood.ScoringRequest:
        prompt = self.reader.read(request)
        prompt = dataclasses.replace(prompt, images=self.reader.load(request.images))
        ids = [self.reader.answer_ids(request, answer) for answer in answers]
        if not with_end:
            ids = [[token for token in some if token not in self.plan.stops] for some in ids]
        offer = likelihood.ScoringRequest(prompt, ids)
        self.reader.check(sum(offer.size))
        return offer

    def _task(self, index: int, request: Request) -> scheduler.GenerationTask:
        slots = self.reader.read(request)
        wish = self.reader.fit(request.sampling or self.sampling, slots)

        def ended(tokens: Sequence[int]) -> bool:
            return streaming.cut_at_stop(self.reader.text(tokens), wish.stop)[1]

        return scheduler.GenerationTask(
            index,
            slots,
            len(request.images),
            lambda: self.reader.load(request.images),
            wish,
            ended if wish.stop else None,
        )

    def _answer(self, draft: scheduler.PartialOutput) -> Answer:
        tokens, wish = list(draft.tokens), draft.task.sampling
        reason = "length"
        if tokens and tokens[-1] in self.plan.stops:
            tokens, reason = tokens[:-1], "stop"
        text, is_cut = streaming.cut_at_stop(self.reader.text(tokens), wish.stop)
        return Answer(
            text,
            tuple(tokens),
            "string" if is_cut else reason,
            draft.task.slots.count,
            tuple(draft.logprobs[: len(tokens)]) if wish.logprobs else None,
        )


def _lacks(arch: WingsArch, params: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the parts for images that have no parameters; an imported LLM may lack them."""
    needed = ("vision",) if arch.projector == "identity" else ("vision", "projector")
    return tuple(part for part in needed if part not in params)


def place_params(params: Mapping[str, Any], arch: WingsArch, mesh: Mesh) -> dict[str, Any]:
    """Returns nested parameters on the mesh, each where training would keep it."""
    parameters.check_mesh(arch, mesh, flag="mesh")
    abstract = parameters.abstract_params(arch, mesh=mesh)
    return tree.nest(parameters.place_params(tree.flatten(params), abstract))


def stop_tokens(tokenizer: Any, template: conversation.Template) -> tuple[int, ...]:
    """Returns the ids that end an answer: end of turn (template) and of text (tokenizer)."""
    after = template.speakers["gpt"].after
    ids = {tokenization.as_text_tokenizer(tokenizer).id_of(after.strip())}
    ids.add(getattr(tokenizer, "eos_token_id", None))
    return tuple(sorted(ids - {None}))
