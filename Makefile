# Every target makes the virtual environment by itself; `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
RAW    ?= data/Task03_Liver
CACHE  ?= data/liver.zarr
RUN    ?= runs/liver
CONFIG ?= configs/liver.toml
JOBS   ?=
IMAGES ?= $(RAW)/imagesTs/*.nii.gz
OUT    ?= $(RUN)/predictions
DEMO   ?= demo

LIVERSEG := $(VENV)/bin/liverseg
READY    := $(VENV)/.ready
jobs     := $(if $(JOBS),--jobs $(JOBS))

.DEFAULT_GOAL := help
.PHONY: help setup demo preprocess train evaluate report predict inspect test check bench clean

help: ## list the targets and the variables
	@echo "make TARGET [RAW=…] [CACHE=…] [RUN=…] [CONFIG=…] [JOBS=…]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "now: RAW=$(RAW) CACHE=$(CACHE) RUN=$(RUN) CONFIG=$(CONFIG) JOBS=$(or $(JOBS),all cores)"

setup: $(READY) ## make .venv and install liverseg and its tools into it

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "liverseg needs Python 3.11 or newer, PYTHON=$(PYTHON) is " + sys.version.split()[0])'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: $(READY) ## phantoms to scores in 12 minutes on two cores: open demo/report/report.html
	$(LIVERSEG) phantom $(DEMO)/raw --cases 32 --tests 1 --seed 0 $(jobs)
	$(LIVERSEG) phantom $(DEMO)/unseen --cases 8 --tests 0 --seed 1 $(jobs)
	$(LIVERSEG) preprocess $(DEMO)/raw $(DEMO)/train.zarr $(jobs)
	$(LIVERSEG) preprocess $(DEMO)/unseen $(DEMO)/unseen.zarr $(jobs)
	$(LIVERSEG) train $(DEMO)/train.zarr $(DEMO)/run --config configs/demo.toml --resume
	$(LIVERSEG) evaluate $(DEMO)/unseen.zarr $(DEMO)/run --raw $(DEMO)/unseen --out $(DEMO)/report
	$(LIVERSEG) report $(DEMO)/run --scores $(DEMO)/report --out $(DEMO)/report/report.html
	@echo "Open $(DEMO)/report/report.html; scores.csv, summary.json and overlays lie beside it, the run in $(DEMO)/run"

preprocess: $(READY) ## RAW to CACHE: every raw volume once
	$(LIVERSEG) preprocess $(RAW) $(CACHE) $(jobs)

train: $(READY) ## CACHE to RUN with CONFIG; goes on where it stopped
	$(LIVERSEG) train $(CACHE) $(RUN) --config $(CONFIG) --resume

evaluate: $(READY) ## scores of RUN in native space on cases it never trained on
	$(LIVERSEG) evaluate $(CACHE) $(RUN) --raw $(RAW)

report: $(READY) ## one HTML page of RUN: scores, curves, slice viewer
	$(LIVERSEG) report $(RUN)

predict: $(READY) ## segment IMAGES with RUN into OUT
	$(LIVERSEG) predict $(RUN) $(IMAGES) --out $(OUT)

inspect: $(READY) ## what CACHE holds
	$(LIVERSEG) inspect $(CACHE)

test: $(READY) ## the quick tests
	$(VENV)/bin/python -m pytest

check: $(READY) ## what CI runs: format, lint, types, tests, the wheel in an empty environment
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest
	$(VENV)/bin/python tests/wheel.py

bench: $(READY) ## speed, as ratios within one run
	$(LIVERSEG) bench preprocess

clean: ## remove what make builds, not data/ and runs/
	rm -rf $(VENV) $(DEMO) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
