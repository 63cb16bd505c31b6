"""A wings_jax checkpoint as a model of lm-eval (`pip install wings_jax[lm-eval]`).

    wings lm-eval run --model wings --model_args checkpoint=runs/stage2 --tasks piqa,mmlu

`wings lm-eval` is lm-eval's own command line with the model `wings` registered, for releases of
lm-eval that do not find models of other packages; newer ones find it by its entry point, and
`lm_eval --model wings` does the same. torch is not needed: JAX shares the model among devices.
Contexts that several continuations have, and the beginning that all contexts of a task share, are
computed once.

model_args: checkpoint (a workdir or checkpoint), batch_size, dtype (float32, bfloat16), mesh (with
"+" for "," as in data=2+tensor=4), max_length, max_gen_toks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tqdm
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from wings_jax import process
from wings_jax.data import conversation
from wings_jax.errors import UserError
from wings_jax.inference import chunks, likelihood, loading, plain_text
from wings_jax.inference.prompts import PromptProcessor
from wings_jax.inference.sampling import SamplingParams
from wings_jax.inference.scoring_plan import ScoringRequest

MARKER = "<image>"  # of lm-eval's contexts, where an image stands
DEFAULT_ROWS = 16
# Generation arguments of tasks that are taken over where a task samples.
SAMPLING = ("temperature", "top_p", "top_k")


@register_model("wings")
class WingsLM(TemplateLM):
    """The `LM` of lm-eval for one checkpoint, in one process.

    Args:
      checkpoint: workdir or checkpoint.
      batch_size: prompts that are computed at once; "auto" for the default.
      dtype: of matrices; by default bfloat16 on accelerators and float32 on a CPU.
      mesh: devices that share the model, such as "data=2+tensor=4".
      max_length: most tokens of context and continuation; by default the model's.
      max_gen_toks: most new tokens where a task sets no limit.
      options: other arguments of lm-eval's command line, such as device, which have no meaning.

    Raises:
      UserError: there is no checkpoint, or it does not fit the devices' memory.
    """

    MULTIMODAL = True

    def __init__(
        self,
        checkpoint: str,
        batch_size: int | str | None = None,
        dtype: str | None = None,
        mesh: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        **options: Any,
    ):
        super().__init__()

        # lm-eval passes a number or "auto".
        is_number = str(batch_size).isdecimal()

        # lm-eval's command is the process: on a CPU it is set up as the commands of wings_jax are.
        process.run_in_caller_thread()

        # In --model_args a comma separates arguments, so that a mesh is written with "+".
        self._generator = loading.load_generator(
            checkpoint,
            dtype=dtype,
            mesh=mesh.replace("+", ",") if mesh else None,
            rows=int(str(batch_size)) if is_number else DEFAULT_ROWS,
            flag="checkpoint",
        )
        process.keep_freed_memory()

        self._name = checkpoint
        self._max_length = int(max_length or self._processor.max_slots)
        self._max_gen_toks = int(max_gen_toks)

    @property
    def _processor(self) -> PromptProcessor:
        return self._generator.processor

    @property
    def max_length(self) -> int:
        """Most tokens of context and continuation."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Most new tokens where a task sets no limit."""
        return self._max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        token = self._processor.tokenizer.eos_token_id
        return plain_text.prefix_id(self._processor) if token is None else token

    @property
    def prefix_token_id(self) -> int:
        """The id that a text without context is conditioned on: BOS or, without it, EOS."""
        return plain_text.prefix_id(self._processor)

    @property
    def tokenizer_name(self) -> str:
        """Name for lm-eval's cache of requests."""
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the checkpoint's chat template, for lm-eval's records."""
        return repr(self._processor.template) if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns messages of role and content as text of the checkpoint's template."""
        # LLaVA's names of the speakers, which templates use.
        speakers = {"system": "system", "user": "human", "assistant": "gpt"}
        turns = [
            {"from": speakers[message["role"]], "value": message["content"]}
            for message in chat_history
        ]
        return conversation.render_text(
            turns, self._processor.template, open_answer=add_generation_prompt
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        """Returns the ids of a text; control tokens in it, as templates write them, are read.

        A BOS is put in front if the tokenizer does so and the text does not begin with it.
        """
        tokenizer = self._processor.tokenizer.backend_tokenizer
        ids = tokenizer.encode(string, add_special_tokens=False).ids

        start = list(plain_text.start_ids(self._processor))
        has_start = ids[: len(start)] == start
        return ids if has_start or add_special_tokens is False else [*start, *ids]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Returns (log-likelihood, whether it is greedy) of each continuation after its context."""
        encoded = []
        for request in requests:
            # Tasks with images have them in a third argument.
            context, continuation, *rest = request.args
            images = tuple(rest[0]["visual"]) if rest else ()
            ids, answer = self._encode_request(context, continuation, has_images=bool(images))
            encoded.append((ids, answer, images, request.task_name or ""))

        return self._score_pairs(encoded, disable_tqdm)

    def _encode_request(
        self, context: str, continuation: str, *, has_images: bool
    ) -> tuple[list[int], list[int]]:
        """Returns the ids of context and continuation."""
        if has_images:
            # Spaces at the end of the context are scored with the continuation.
            stripped, tail = plain_text.split_spaces(context, continuation)
            ids, whole = self._encode_images(stripped), self._encode_images(stripped + tail)
            return ids, whole[len(ids) :]
        if context:
            return self._encode_pair(context, continuation)

        # Without a context, the continuation is conditioned on the prefix token.
        ids = self.tok_encode(continuation, add_special_tokens=False)
        has_prefix = ids[:1] == [self.prefix_token_id]
        return (ids[:1], ids[1:]) if has_prefix else ([self.prefix_token_id], ids)

    def _encode_images(self, text: str) -> list[int]:
        """Returns ids in which `conversation.IMAGE_ID` stands for an image."""
        first, *others = text.split(MARKER)
        ids = self.tok_encode(first)
        for part in others:
            ids += [conversation.IMAGE_ID, *self.tok_encode(part, add_special_tokens=False)]
        return ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        """Returns what `loglikelihood` does, for texts that are encoded already."""
        return self._score_pairs([(ids, answer, (), "") for _, ids, answer in requests], True)

    def _score_pairs(
        self,
        encoded: Sequence[tuple[list[int], list[int], tuple[Any, ...], str]],
        disable_tqdm: bool,
    ) -> list[tuple[float, bool]]:
        """Returns the scores of (context, continuation, images, task)."""
        # Continuations of one context are scored together.
        members: dict[tuple, list[int]] = {}
        for index, (ids, answer, images, task) in enumerate(encoded):
            # A context of text that is too long loses its beginning; one with images is not cut.
            room = self.max_length - len(answer)
            context = ids if images else ids[-max(room, 1) :]
            key = (tuple(context), tuple(map(id, images)), task)
            members.setdefault(key, []).append(index)

        scoring = [
            ScoringRequest(
                self._slots(key[0], encoded[found[0]][2]),
                [encoded[i][1] for i in found],
                group=key[2],
            )
            for key, found in members.items()
        ]

        # Groups may end in another order than the requests: each score is put at its index.
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(encoded)
        groups = list(members.values())
        found = likelihood.score(
            self._generator.spec, self._generator.weights, scoring, self._generator.options.rows
        )

        progress = tqdm.tqdm(found, total=len(scoring), disable=disable_tqdm, desc="loglikelihood")
        for number, scored in progress:
            for index, answer in zip(groups[number], scored.answers, strict=True):
                scores[index] = answer.logprob, answer.is_greedy
        return scores

    def _slots(self, ids: Sequence[int], images: Sequence[Any]) -> chunks.PromptSlots:
        """Returns the slots of ids, with their images loaded. Raises UserError."""
        if images and self._processor.missing_parts:
            missing = " and no ".join(self._processor.missing_parts)
            raise UserError(f"{self._name} is text-only: it has no {missing}")

        loaded = self._processor.load_images(images) if images else ()
        return chunks.from_ids(ids, loaded, self._processor.arch.vision.num_patches)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-likelihood of each whole text, in windows of the model's length."""
        encoded, owners = [], []
        for index, request in enumerate(requests):
            # Each token is scored once; a window is conditioned on the token before it.
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            for context, answer in map(utils.make_disjoint_window, windows):
                encoded.append((list(context), list(answer), (), ""))
                owners.append(index)

        totals = [0.0] * len(requests)
        for index, (logprob, _) in zip(
            owners, self._score_pairs(encoded, disable_tqdm), strict=True
        ):
            totals[index] += logprob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns how the model continues each context, up to one of the texts that end it."""
        wanted = []
        for request in requests:
            context, arguments, *rest = request.args
            images = tuple(rest[0]["visual"]) if rest else ()
            params = self._sampling(arguments)

            # Text that is too long loses its beginning, so that the new tokens fit.
            ids = self._encode_images(context) if images else self.tok_encode(context)
            if not images:
                ids = ids[-max(self.max_length - params.max_new_tokens, 1) :]

            slots = self._slots(ids, ())
            self._processor.check_length(slots.count, len(images))
            wanted.append((slots, images, params))

        texts = [""] * len(requests)
        done = plain_text.complete_slots(self._generator, wanted)
        progress = tqdm.tqdm(done, total=len(wanted), disable=disable_tqdm, desc="generate_until")
        for index, answer in progress:
            if isinstance(answer, UserError):
                raise UserError(f"request {index}: {answer}") from answer
            texts[index] = answer.text
        return texts

    def _sampling(self, arguments: dict[str, Any]) -> SamplingParams:
        """Returns lm-eval's generation arguments as `SamplingParams`. Raises UserError."""
        until = arguments.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(until)

        # Tasks use either name for the number of new tokens.
        tokens = arguments.get("max_gen_toks", arguments.get("max_new_tokens", self.max_gen_toks))
        sampled = {name: arguments[name] for name in SAMPLING if name in arguments}

        # Greedy unless it is asked for, whatever the temperature.
        if not arguments.get("do_sample", sampled.get("temperature", 0.0) > 0):
            sampled = {}
        return SamplingParams(max_new_tokens=int(tokens), stop=stop, **sampled)
