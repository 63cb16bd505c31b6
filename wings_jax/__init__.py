"""Wings (arXiv 2406.03496), a multimodal LLM that keeps its text-only abilities, in JAX.

    import wings_jax
    model = wings_jax.load("runs/stage2")             # or an imported checkpoint
    print(model.generate("What is red?", images=["scene.png"]))

The public surface; everything is imported when it is first used.

load            loads a checkpoint: returns a Generator
Generator       `generate`, `stream`, `chat` and `score` with one model
Request         a conversation with its images, to be answered
Answer          what `generate` returns: text, tokens, reason, log-probabilities
SamplingParams  how an answer is sampled
Chat            a conversation turn by turn: `Generator.chat`
Likelihood      the log-probability of a given answer
score           log-probabilities of given answers
UserError       what every mistake of a user raises
chat            module: `chat.run(model)` chats in the terminal
convert         module: `convert.import_model` and `convert.export_model`, from and to PyTorch
__version__     the version of the installed package
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# transformers is used for tokenizers and configs. Without torch, which is not needed here, it
# would print at every start that there are no models.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

if TYPE_CHECKING:
    from wings_jax import chat, convert
    from wings_jax.errors import UserError
    from wings_jax.inference.answers import Answer
    from wings_jax.inference.chat import Chat
    from wings_jax.inference.generator import Generator
    from wings_jax.inference.likelihood import Likelihood
    from wings_jax.inference.loading import load_generator as load
    from wings_jax.inference.loading import score
    from wings_jax.inference.prompts import Request
    from wings_jax.inference.sampling import SamplingParams

    __version__: str

__all__ = [
    "Answer",
    "Chat",
    "Generator",
    "Likelihood",
    "Request",
    "SamplingParams",
    "UserError",
    "__version__",
    "chat",
    "convert",
    "load",
    "score",
]

# Public name -> module, and its name there; None for the module itself.
_EXPORTS = {
    "Answer": ("wings_jax.inference.answers", "Answer"),
    "Chat": ("wings_jax.inference.chat", "Chat"),
    "Generator": ("wings_jax.inference.generator", "Generator"),
    "Likelihood": ("wings_jax.inference.likelihood", "Likelihood"),
    "Request": ("wings_jax.inference.prompts", "Request"),
    "SamplingParams": ("wings_jax.inference.sampling", "SamplingParams"),
    "UserError": ("wings_jax.errors", "UserError"),
    "chat": ("wings_jax.chat", None),
    "convert": ("wings_jax.convert", None),
    "load": ("wings_jax.inference.loading", "load_generator"),
    "score": ("wings_jax.inference.loading", "score"),
}


def _version() -> str:
    """Returns the installed version; "0+unknown" in a checkout that is not installed."""
    metadata = importlib.import_module("importlib.metadata")
    try:
        return metadata.version("wings_jax")
    except metadata.PackageNotFoundError:
        return "0+unknown"


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used (PEP 562)."""
    value: Any
    if name == "__version__":
        value = _version()
    elif name in _EXPORTS:
        module, attribute = _EXPORTS[name]
        imported = importlib.import_module(module)
        value = imported if attribute is None else getattr(imported, attribute)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    # From now on the module has the name, and this function is not called for it.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
