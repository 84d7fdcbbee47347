# Needs nothing installed but Python 3.10 to 3.13 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
EXPERIMENT ?= digits_trousers
METHODS ?= posterior,retrack,adaptive_siss,siss,siss_no_is,erase_diff,naive_deletion,neg_grad
SEEDS ?= 0,1,2

.DEFAULT_GOAL := help
.PHONY: help install run table bench scaling test test-all test-gpu lint format clean clean-cache

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/installed ## make .venv and install the package with its tools into it

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev,joblib,tensorboard]'
	touch $@

run: install ## the whole story on embedded data: python train.py $(ARGS)
	$(BIN)/python train.py $(ARGS)

table: install ## a table of docs/results.md on two CPU cores: make table EXPERIMENT=mnist_trousers_small
	$(BIN)/python train.py -m experiment=$(EXPERIMENT) method=$(METHODS) seed=$(SEEDS) evaluation.oracle=true \
		hydra.sweep.dir=outputs/tables/$(EXPERIMENT) hydra/launcher=joblib hydra.launcher.n_jobs=2 \
		hardware=cpu hardware.threads=1 $(ARGS)
	$(BIN)/python scripts/compare.py outputs/tables/$(EXPERIMENT)

bench: install ## milliseconds of every method's step against a plain loop; nothing else may run: make bench ARGS="--network paper"
	$(BIN)/python scripts/bench.py $(ARGS)

scaling: install ## what a step costs as batch, pictures, processes and jobs grow; nothing else may run
	$(BIN)/python scripts/scaling.py $(ARGS)

test: install ## the default tests: two CPU cores, no network, under 10 minutes
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-all: test ## the slow tests too, which measure seconds and so run alone
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

test-gpu: install ## those that need a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: install ## what ruff finds wrong
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install ## let ruff mend and lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environment and tools' caches; outputs/ and the model cache stay
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

clean-cache: ## remove cached base models, oracles and classifiers
	rm -rf "$${UNLEARN_RUNNER_CACHE:-$$HOME/.cache/unlearn_runner}"
