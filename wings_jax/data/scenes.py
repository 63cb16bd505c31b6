"""Runs `python -m wings_jax.scenes` under its former name."""

import runpy
import sys

if __name__ == "__main__":
    print("wings_jax.data.scenes is now called wings_jax.scenes", file=sys.stderr)
    runpy.run_module("wings_jax.scenes", run_name="__main__")
