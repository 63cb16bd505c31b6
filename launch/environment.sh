# Sourced by the other scripts: puts a virtual environment of the given requirements on the PATH.
#
#   environment FILE...    (VENV: where it lies, default .venv; PYTHON: what makes it, python3)
#
# An environment made from the same files is used again; another one is replaced.

environment() {
    local venv="${VENV:-.venv}" wanted
    wanted="$(cat "$@" pyproject.toml | sha256sum | cut -d ' ' -f 1)"
    if [ "$(cat "$venv/requirements.sha256" 2>/dev/null)" != "$wanted" ]; then
        echo "making the environment $venv ..."
        rm -rf "$venv"
        "${PYTHON:-python3}" -m venv "$venv"
        "$venv/bin/pip" install --quiet --disable-pip-version-check $(printf ' -r %s' "$@")
        "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --editable .
        echo "$wanted" >"$venv/requirements.sha256"
    fi
    PATH="$(cd "$venv" && pwd)/bin:$PATH"
    export PATH
}
