# `make run` does everything on a fresh machine; `make help` lists the targets.
#
# PYTHON  the Python 3.11 that creates .venv                      make PYTHON=/opt/python3.11/bin/python3.11 run
# PY      an interpreter to use without installing anything       make PY=python3.11 test-gpu
# ARGS    arguments of the command                                make run ARGS="-p dataset cifar10 -p epochs 5"

PYTHON ?= python3.11
ARGS ?=

ifdef PY
INSTALL := check-py
else
PY := .venv/bin/python
INSTALL := install
endif

.DEFAULT_GOAL := help
.PHONY: help run test test-slow test-gpu lab tensorboard install check-py clean clean-runs

help:  ## show this list
	@grep -hE '^[a-z-]+:.*  ## ' Makefile | sed -E 's/^([a-z-]+):.*  ## /  make \1\t/' | expand -t 22

run: $(INSTALL)  ## install the requirements if necessary and run the six notebooks
	@$(PY) -m pipeline $(ARGS)

test test-slow: EXTRAS = requirements-extras.txt
test: $(INSTALL)  ## check the style and run all tests, with one test worker for each core (at most 4)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

test-slow: $(INSTALL)  ## run the tests that take minutes, which `make test` leaves out
	@$(PY) -m pytest tests/slow $(ARGS)

test-gpu: $(INSTALL)  ## run the tests that need an NVIDIA GPU
	@PIPELINE_DEVICE=gpu $(PY) -m pytest tests/gpu $(ARGS)

lab: $(INSTALL)  ## start JupyterLab with the notebooks
	@$(PY) -m pipeline.lab $(ARGS)

tensorboard: $(INSTALL)  ## start TensorBoard with the logs of all runs
	@TF_CPP_MIN_LOG_LEVEL=3 CUDA_VISIBLE_DEVICES= $(PY) -m tensorboard.main --logdir logs $(ARGS)

install:
	@scripts/install.sh "$(PYTHON)" $(EXTRAS)

check-py:
	@$(PY) -c "" 2>/dev/null || { echo "error: Expected PY to be a Python interpreter, got $(PY)" >&2; exit 2; }

clean:  ## remove .venv and caches, but not runs/ and logs/
	rm -rf .venv .pytest_cache .ruff_cache outputs multirun
	find . -path ./runs -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

clean-runs:  ## remove all runs, including trained models
	rm -rf runs logs
