"""`wings lm-eval ...`: lm-eval's own command line, which then has the model `wings`."""

from __future__ import annotations

import importlib
import importlib.util

from wings_jax.errors import UserError


def main() -> None:
    """Registers the model and runs lm-eval.

    Raises:
      UserError: lm-eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError('lm-eval is not installed: pip install "wings_jax[lm-eval]"')

    from lm_eval.__main__ import cli_evaluate

    # Importing the module registers the model, as lm-eval does with its own.
    importlib.import_module("wings_jax.evaluation.lm_eval_model")
    cli_evaluate()
