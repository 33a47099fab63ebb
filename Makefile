# make run: everything, on a fresh machine. `make help` lists the rest.
#
# PYTHON  the Python 3.11 that .venv is made with                     make PYTHON=/opt/python3.11/bin/python3.11 run
# PY      an interpreter that has the packages; nothing is installed  make PY=python3.11 test-gpu
# ARGS    goes to the command                                         make run ARGS="-p dataset cifar10 -p epochs 5"

PYTHON ?= python3.11
ARGS ?=

ifdef PY
INSTALL := check-py
else
PY := .venv/bin/python
INSTALL := install
endif

.DEFAULT_GOAL := help
.PHONY: help run test test-gpu lab tensorboard install check-py clean clean-runs

help:  ## this list
	@grep -hE '^[a-z-]+:.*  ## ' Makefile | sed -E 's/^([a-z-]+):.*  ## /  make \1\t/' | expand -t 22

run: $(INSTALL)  ## install what is missing, run the six notebooks, show the artifacts
	@$(PY) -m pipeline $(ARGS)

test: EXTRAS = --extras
test: $(INSTALL)  ## style and tests, notebooks included
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m pytest $(ARGS)

test-gpu: $(INSTALL)  ## the tests that need an NVIDIA GPU
	@PIPELINE_DEVICE=gpu $(PY) -m pytest tests/gpu $(ARGS)

lab: $(INSTALL)  ## JupyterLab on the notebooks
	@$(PY) -m pipeline.lab $(ARGS)

tensorboard: $(INSTALL)  ## TensorBoard on the runs' logs
	@TF_CPP_MIN_LOG_LEVEL=3 CUDA_VISIBLE_DEVICES= $(PY) -m tensorboard.main --logdir logs $(ARGS)

install:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 6))" 2>/dev/null || { \
	  echo "error: $(PYTHON) was not found, does not start or is no Python 3; install Python 3.11" \
	  "(on Debian and Ubuntu: sudo apt install python3.11 python3.11-venv) or name one: make PYTHON=/path/to/python3.11" \
	  "$(firstword $(MAKECMDGOALS))" >&2; exit 2; }
	@$(PYTHON) scripts/bootstrap.py $(EXTRAS)

check-py:
	@$(PY) -c "" 2>/dev/null || { echo "error: $(PY), given as PY, was not found or does not start" >&2; exit 2; }

clean:  ## remove .venv and caches; runs/ and logs/ stay
	rm -rf .venv .pytest_cache .ruff_cache outputs multirun
	find . -path ./runs -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

clean-runs:  ## remove every run, trained models included
	rm -rf runs logs
