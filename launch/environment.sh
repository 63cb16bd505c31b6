# shellcheck shell=bash
# Sourced by the other scripts.
#
#   environment FILE...    puts a virtual environment of these requirements first in the PATH
#                          (VENV: its directory, default .venv; PYTHON: its interpreter, python3)
#   use_all_cores          makes small trainings fast on a CPU
#   show_help              prints the comment at the top of the script
#   fail LINE              ends the script with one line
#   run COMMAND...         runs it; with DRY_RUN=1 prints it instead, quoted for a shell
#   quote WORD...          returns the words as one line of a shell
#
# An environment made from the same files by the same interpreter is used again; else it is replaced.

environment() {
    local venv="${VENV:-.venv}" python="${PYTHON:-python3}" wanted
    wanted="$({ "$python" --version; cat "$@" pyproject.toml; } | sha256sum | cut -d ' ' -f 1)"
    if [ "$(cat "$venv/requirements.sha256" 2>/dev/null)" != "$wanted" ]; then
        echo "creating the environment $venv ..."
        rm -rf "$venv"
        "$python" -m venv "$venv"
        "$venv/bin/pip" install --quiet --disable-pip-version-check "${@/#/-r}"
        "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --editable .
        echo "$wanted" >"$venv/requirements.sha256"
    fi
    PATH="$(cd "$venv" && pwd)/bin:$PATH"
    export PATH
}

# On a CPU each core counts as a device, so that small steps use them all. The allocator keeps the
# memory that XLA frees: to map it again at every step would take a good part of the time.
use_all_cores() {
    local cores devices=1
    cores=$(getconf _NPROCESSORS_ONLN)
    while [ $((devices * 2)) -le "$cores" ] && [ "$devices" -lt 8 ]; do devices=$((devices * 2)); done
    export JAX_NUM_CPU_DEVICES="${JAX_NUM_CPU_DEVICES:-$devices}"
    export MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184
}

show_help() {
    sed -n '2,/^[^#]/{ /^#/s/^# \{0,1\}//p; }' "$0"
}

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

quote() {
    local word line="" escaped="'\\''"
    for word in "$@"; do
        case "$word" in
            "" | *[!A-Za-z0-9_@%+=:,./-]*) line+=" '${word//\'/$escaped}'" ;;
            *) line+=" $word" ;;
        esac
    done
    printf '%s' "${line# }"
}

run() {
    if [ -n "${DRY_RUN:-}" ]; then
        quote "$@"
        echo
    else
        "$@"
    fi
}
