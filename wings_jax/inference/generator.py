"""Answers about images and text: the library surface of inference.

model = loading.load_generator("runs/stage2")
print(model.generate("What is this?", images=["cat.jpg"]))
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

from jax.sharding import Mesh

from wings_jax import checkpoint as checkpoint_lib
from wings_jax import tree
from wings_jax.data import chat_template, conversation, tokenization
from wings_jax.errors import UserError
from wings_jax.inference import (
    adapters,
    chunks,
    device_memory,
    engine,
    likelihood,
    prompts,
    scheduler,
    scoring_plan,
    streaming,
)
from wings_jax.inference.answers import Answer, finish_answer, stop_tokens
from wings_jax.inference.chat import Chat
from wings_jax.inference.chunks import PromptSlots
from wings_jax.inference.dialogue import Dialogue
from wings_jax.inference.likelihood import Likelihood
from wings_jax.inference.prompts import PromptProcessor, Request
from wings_jax.inference.sampling import SamplingParams, change_params
from wings_jax.model import parameters
from wings_jax.model.presets import WingsArch
from wings_jax.weights import adapter as adapter_lib
from wings_jax.weights import digests


class Generator:
    """Answers requests with one model.

    Args:
      params: nested parameters.
      tokenizer: a fast tokenizer of `transformers`.
      template: a name of `conversation.TEMPLATES`, or a Template.
      dtype: of matrices, activations and caches; by default bfloat16 on accelerators and float32
        on a CPU.
      kernel: attention kernel (`attention.attend`).
      rows: how many requests are answered at once.
      sampling: for requests that have none of their own.
      eos_ids: ids that end an answer, beside those of template and tokenizer.
      mesh: devices that share weights and caches, by the rules of training (`axes.RULES`); by
        default everything is on the device of the parameters.
      release: whether the arrays of `params` may be deleted, which halves the memory while the
        layers are split; they cannot be used afterwards.

    Raises:
      MeshError: the mesh does not divide the model.
    """

    def __init__(
        self,
        arch: WingsArch,
        params: Mapping[str, Any],
        tokenizer: tokenization.HFTokenizer,
        template: str | conversation.Template,
        *,
        dtype: str | None = None,
        kernel: str = "auto",
        rows: int = 16,
        sampling: SamplingParams | None = None,
        eos_ids: Sequence[int] = (),
        mesh: Mesh | None = None,
        release: bool = False,
    ):
        if isinstance(template, str):
            template = conversation.get_template(template)
        self.spec = engine.ModelSpec(arch, dtype or parameters.default_dtype(), kernel, mesh)
        # With a mesh, arrays get their sharding first, so that splitting keeps it.
        params = params if mesh is None else place_params(params, arch, mesh)
        self.weights = engine.split_layers(params, self.spec, release=release)
        if release:
            device_memory.trim_host_memory()
        self._eos_ids = tuple(eos_ids)
        # Of LLM and tower, computed once for all adapters that are put on them.
        self._base_digests: dict[str, digests.TensorDigest] = {}
        self.sampling = sampling or SamplingParams()
        self.processor = PromptProcessor(arch, tokenizer, template, missing_parts(arch, params))
        stops = stop_tokens(tokenizer, template, eos_ids)
        self.options = scheduler.SchedulerOptions(rows, stops=stops)

    @classmethod
    def from_checkpoint(cls, restored: checkpoint_lib.Checkpoint, **options: Any) -> Generator:
        """Returns the generator of a loaded checkpoint; `options` as above, from `dtype` on."""
        data, tokenizer = restored.config.data, restored.tokenizer
        template = chat_template.template_from_settings(data, tokenizer)
        return cls(
            restored.arch, restored.params, tokenizer, template, eos_ids=restored.eos_ids, **options
        )

    def with_adapter(self, file: str | os.PathLike) -> Generator:
        """Returns the generator of this LLM and tower with the adapter of a file on them.

            base = wings_jax.load("base_7b")
            charts, scenes = (base.with_adapter(f"{name}.safetensors") for name in names)

        Nothing of the LLM and the tower is loaded or copied again; this generator stays usable.
        Its own projector, learners, router, prefix and LoRA are not in the result.

        Raises:
          UserError: the file is not an adapter, or belongs to another base.
        """
        opened = adapter_lib.open_adapter(file, flag="adapter")
        arch, tokenizer = opened.arch, self.processor.tokenizer
        # Digests need a pass over all values of the base: only for the first adapter.
        if not self._base_digests:
            self._base_digests |= digests.digest_tensors(adapters.base_tensors(self.weights))
        adapter_lib.check_base(
            opened, self._base_digests, self.spec.arch, tokenizer, origin="this", flag="adapter"
        )

        # The new parts, and the template that they were trained with.
        params = adapter_lib.read_params(opened, dtype=self.spec.dtype, mesh=self.spec.mesh)
        result = copy.copy(self)
        result.spec = dataclasses.replace(self.spec, arch=arch)
        result.weights = adapters.replace_parts(self.weights, params, result.spec)
        template = chat_template.template_from_settings(opened.config.data, tokenizer)
        missing = missing_parts(arch, result.weights.rest)
        result.processor = PromptProcessor(arch, tokenizer, template, missing)
        stops = stop_tokens(tokenizer, template, self._eos_ids)
        result.options = dataclasses.replace(self.options, stops=stops)
        return result

    @overload
    def generate(
        self, requests: str | Request, images: Sequence[Any] | Any = (), **sampling: Any
    ) -> Answer: ...

    @overload
    def generate(self, requests: Sequence[Request]) -> list[Answer]: ...

    def generate(
        self,
        requests: str | Request | Sequence[Request],
        images: Sequence[Any] | Any = (),
        **sampling: Any,
    ) -> Answer | list[Answer]:
        """Returns the answer to a question or request, or the answers to a list of requests.

            model.generate("What is red?", images=["scene.png"], max_new_tokens=20)
            model.generate([Request("What is red?", ["scene.png"]), Request("Is 4 even?")])

        A list is answered in batches of `rows`; the answers are in its order.

        Args:
          requests: a text, a Request, or a list of Requests.
          images: of a text: an image or a list of them, each a path, encoded bytes, u8[h,w,3] or
            a PIL image.
          sampling: fields of SamplingParams; the others are the request's or the generator's.

        Raises:
          UserError: a request is wrong; of several, the message names which.
        """
        if isinstance(requests, str):
            requests = Request(requests, prompts.as_list(images))
        elif prompts.as_list(images):
            raise UserError("images= goes with a text; a Request has its own images")

        if isinstance(requests, Request):
            params = change_params(requests.sampling or self.sampling, sampling)
            return self.generate([dataclasses.replace(requests, sampling=params)])[0]
        if sampling:
            names = ", ".join(sampling)
            raise UserError(f"{names}: goes with one request; in a list, set Request.sampling")

        answers: dict[int, Answer] = {}
        for index, answer in self.answers(requests):
            if isinstance(answer, UserError):
                where = f"request {index + 1}: " if len(requests) > 1 else ""
                raise UserError(f"{where}{answer}") from answer
            answers[index] = answer
        return [answers[index] for index in range(len(requests))]

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer | UserError]]:
        """Yields (index, answer) as they end, or what is wrong with a request instead."""
        # Mistakes in the text come first; images are loaded when a row is free.
        tasks = []
        for index, request in enumerate(requests):
            try:
                tasks.append(self._task(index, request))
            except UserError as error:
                yield index, error

        for task, output in scheduler.run(self.spec, self.weights, tasks, self.options):
            if isinstance(output, UserError):
                yield task.index, output
            else:
                yield task.index, self.answer(output)

    def stream(self, request: Request) -> Iterator[str]:
        """Yields the answer to a request piece by piece.

        Raises:
          UserError: the request is wrong.
        """
        prompt = self._load_prompt(request)
        params = self.processor.fit(request.sampling or self.sampling, prompt)
        dialogue = Dialogue(self.spec, self.weights, self.options.stops)
        yield from streaming.stream_text(
            dialogue.answer(prompt, params),
            self.processor.decode,
            stop_tokens=self.options.stops,
            stop_strings=params.stop,
        )

    def chat(self, *, system: str = "", sampling: SamplingParams | None = None) -> Chat:
        """Returns a new conversation, whose KV cache is reused from turn to turn."""
        dialogue = Dialogue(self.spec, self.weights, self.options.stops)
        return Chat(self.processor, dialogue, sampling or self.sampling, system)

    def score(
        self,
        requests: Sequence[tuple[Request, Sequence[str]]],
        *,
        with_end: bool = True,
    ) -> list[list[Likelihood]]:
        """Returns the likelihood of each of the given answers to each request.

        With `with_end` the end of turn counts too, as it does when an answer is generated.

        Raises:
          UserError: a request is wrong.
        """
        scores: list[list[Likelihood]] = [[] for _ in requests]
        for index, likelihoods in self.scores(requests, with_end=with_end):
            if isinstance(likelihoods, UserError):
                raise likelihoods
            scores[index] = likelihoods
        return scores

    def scores(
        self, requests: Sequence[tuple[Request, Sequence[str]]], *, with_end: bool = True
    ) -> Iterator[tuple[int, list[Likelihood] | UserError]]:
        """Yields (index, what `score` returns for it) as they end, or what is wrong with it."""
        # Requests with mistakes are reported first; the others are scored together.
        scoring_requests, indices = [], []
        for index, (request, answers) in enumerate(requests):
            try:
                scoring_requests.append(self._scoring_request(request, answers, with_end))
                indices.append(index)
            except UserError as error:
                yield index, error

        for number, scored in likelihood.score(
            self.spec, self.weights, scoring_requests, self.options.rows
        ):
            yield indices[number], scored.answers

    def score_text(self, texts: Sequence[str]) -> list[Likelihood]:
        """Returns the likelihood of each plain text after its first token, which is not counted.

        There is no template around it. A text that is longer than the model supports is scored
        in windows (`PromptProcessor.windows`).

        Raises:
          UserError: a text has less than two tokens.
        """
        windows = [
            (index, ids) for index, text in enumerate(texts) for ids in self.processor.windows(text)
        ]
        # The first token of each window is the prompt, all others are the answer.
        scoring_requests = [
            scoring_plan.ScoringRequest(chunks.from_ids(ids[:1], (), 1), [ids[1:]])
            for _, ids in windows
        ]

        totals = [Likelihood(0.0, 0, True)] * len(texts)
        for number, scored in likelihood.score(
            self.spec, self.weights, scoring_requests, self.options.rows
        ):
            index, _ = windows[number]
            totals[index] = totals[index] + scored.answers[0]
        return totals

    def _load_prompt(self, request: Request) -> PromptSlots:
        """Returns the slots of a request with its images."""
        prompt = self.processor.encode(request)
        images = self.processor.load_images(request.images)
        return dataclasses.replace(prompt, images=images)

    def _scoring_request(
        self, request: Request, answers: Sequence[str], with_end: bool
    ) -> scoring_plan.ScoringRequest:
        prompt = self._load_prompt(request)

        # As in training: the answer's ids depend on the text before it.
        ids = [self.processor.answer_ids(request, answer) for answer in answers]

        # An answer in the middle of a text, such as a choice, has no end of turn.
        if not with_end:
            ids = [[token for token in some if token not in self.options.stops] for some in ids]

        scoring_request = scoring_plan.ScoringRequest(prompt, ids)
        self.processor.check_length(sum(scoring_request.size))
        return scoring_request

    def _task(self, index: int, request: Request) -> scheduler.GenerationTask:
        slots = self.processor.encode(request)
        params = self.processor.fit(request.sampling or self.sampling, slots)

        def is_ended(tokens: Sequence[int]) -> bool:
            return streaming.cut_at_stop(self.processor.decode(tokens), params.stop)[1]

        return scheduler.GenerationTask(
            index,
            slots,
            len(request.images),
            lambda: self.processor.load_images(request.images),
            params,
            is_ended if params.stop else None,
        )

    def answer(self, output: scheduler.PartialOutput) -> Answer:
        """Returns the answer of a finished task of the scheduler."""
        return finish_answer(output, self.processor.decode, self.options.stops)


def missing_parts(arch: WingsArch, params: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the parts for images that have no parameters; an imported LLM may have none."""
    needed = ("vision",) if arch.projector == "identity" else ("vision", "projector")
    return tuple(part for part in needed if part not in params)


def place_params(params: Mapping[str, Any], arch: WingsArch, mesh: Mesh) -> dict[str, Any]:
    """Returns nested parameters on the mesh, with the sharding that they have in training."""
    parameters.check_mesh(arch, mesh, flag="mesh")
    abstract = parameters.abstract_params(arch, mesh=mesh)
    return tree.nest(parameters.place_params(tree.flatten(params), abstract))
