#!/usr/bin/env bash
# Measures tc-deploy on a machine with an NVIDIA GPU, the most valuable part first, and writes a JSON file per part: the
# device runtime, PyTorch's backend on a DiT-XL/2, calibration, every engine that is installed. Run it again with the same
# folder for what is missing.
#
#     tests/gpu/run.sh results                                            # in the project's own environment
#     PYTHON=python3 tests/gpu/run.sh results --kit .gpu-kit --minutes 8   # on a bare machine, with what `make gpu-kit` packed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-.venv/bin/python}"
path="$PWD:$PWD/tests"
words=("$@")
for ((place = 0; place < ${#words[@]} - 1; place++)); do
    if [[ ${words[place]} == --kit ]]; then
        site="${TMPDIR:-/tmp}/tc-deploy-gpu-site-$(id -u)"
        if [[ ! -e $site/.done ]]; then
            "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --upgrade \
                --target "$site" "${words[place + 1]}"/wheels/*.whl
            touch "$site/.done"
        fi
        path="$site:$path"
    fi
done
exec env PYTHONPATH="$path${PYTHONPATH:+:$PYTHONPATH}" "$python" tests/gpu/measure.py "$@"
