#!/usr/bin/env bash
# Installs what the tests need into .venv and runs all of them, with ruff before.
#
#   ./launch/test.sh [pytest arguments, for instance: -m "not slow" -k laws]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
environment requirements.txt requirements-dev.txt
# The Qwen tokenizer's table, for the golden conversations; without it these tests are skipped.
pip install --quiet --disable-pip-version-check --no-deps 'dashscope>=1.20' || true

ruff check .
ruff format --check .
export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=2 TOKENIZERS_PARALLELISM=false
python -m pytest --numprocesses "${WORKERS:-2}" --dist loadfile "$@"
