#!/usr/bin/env bash
# Create .venv and install the pinned packages:  scripts/install.sh [PYTHON] [requirements-extras.txt]
# `make` calls this before each command. A stamp file for each requirements file makes the second call instant.
set -euo pipefail
cd -P "$(dirname "$0")/.."
python=${1:-python3.11}

trap 'exit 130' INT
fail() {
  echo "error: $*" >&2
  exit 2
}

# The stamp covers the pins, the project's own metadata and the folder, because the scripts in .venv contain its path.
key="$PWD $(cat requirements*.txt constraints.txt pyproject.toml | cksum)"
installed() {
  [[ -x .venv/bin/python && ! -e .venv/.installing && -f .venv/.installed-$1 && $(<".venv/.installed-$1") == "$key" ]]
}

has_nvidia_driver() {
  [[ ${PIPELINE_DEVICE:-} != cpu && $(uname -sm) == "Linux x86_64" ]] && "$python" -c '
import ctypes
driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
raise SystemExit(driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value)' 2>/dev/null
}

create_venv() {
  "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || fail \
    "Expected Python 3.11 with the venv module, got $python ($("$python" --version 2>/dev/null || echo "does not start"))." \
    $'Install it with one of:\n' \
    $' uv:     uv python install 3.11 && make PYTHON="$(uv python find 3.11)" run\n' \
    $' pyenv:  pyenv install 3.11 && make PYTHON="$(pyenv prefix 3.11)/bin/python" run\n' \
    $' conda:  conda create -n py311 python=3.11 && conda activate py311 && make run'
  [[ ! -L .venv ]] || fail "$PWD/.venv is a symbolic link; remove it, or use it unchanged: make PY=.venv/bin/python run"
  # Recreate .venv if an installation was interrupted, the folder was moved, or its Python is missing.
  if [[ -e .venv/.installing || $(.venv/bin/pip --version 2>/dev/null) != *"$PWD/.venv/"*"(python 3.11)" ]]; then
    rm -rf .venv
    "$python" -m venv .venv
  fi
  touch .venv/.installing
}

# PIP_USER=0, because the pip setting "user" is an error inside a virtual environment.
pip_install() { PIP_USER=0 .venv/bin/python -m pip install --disable-pip-version-check --no-input "$@"; }

install() {
  ! installed "$1" || return 0
  create_venv
  echo "Installing $1 into .venv; the first installation takes a few minutes."
  pip_install -r "$1" && pip_install --no-deps -e . ||
    fail "pip could not install $1. Check its output above, the network, the free disk space and 'pip config list';" \
      "then run the command again."
  if [[ $1 == requirements-gpu.txt ]]; then
    pip_install -r requirements-tensorrt.txt ||
      echo "TensorRT was not installed; only the TF-TRT export needs it." \
        "Try again: .venv/bin/pip install -r requirements-tensorrt.txt"
  fi
  echo "$key" >".venv/.installed-$1"
  rm .venv/.installing
}

# Lock, because simultaneous calls would install into the same folder.
exec 9<requirements.txt
! command -v flock >/dev/null || flock 9
if ! installed requirements-gpu.txt; then
  if has_nvidia_driver; then install requirements-gpu.txt; else install requirements.txt; fi
fi
[[ -z ${2:-} ]] || install "$2"
