#!/usr/bin/env bash
# Builds and runs every engine that is installed on a machine with an NVIDIA GPU (TensorRT, TensorRT-RTX, PyTorch with
# CUDA graphs, ONNX Runtime with its CUDA, TensorRT and TensorRT-RTX providers), compares what it makes with PyTorch,
# times full against cached steps at DiT-XL/2 size, one graph for all variants against separate ones, and TensorRT's
# captured runs against launched ones, and writes JSON.
# Not run on a GPU yet.
#
#     tests/gpu/run.sh gpu.json          # options: PYTHON=... tests/gpu/run.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec env PYTHONPATH="$PWD" "${PYTHON:-.venv/bin/python}" tests/gpu/measure.py "$@"
