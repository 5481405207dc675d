# Every target first makes the environment in .venv, and those that test add what tests need; `make try`,
# `make run` and `make test` are all a newcomer needs.
PYTHON ?= python3
PROFILE ?= smoke
BIN := .venv/bin
# Most of torch's modules are never imported, so each is compiled when it first is; tests, where the warnings
# of compiling would be errors, compile all beforehand.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable

.DEFAULT_GOAL := help
.PHONY: help setup try run lab dashboard test faults fuzz lint bench tables sample docs linkcheck soak train clean clean-all

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: .venv/ready  ## Make the environment in .venv (on Linux 7 GB, most of it torch with its GPU libraries)
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	@echo "Installing kclib and what it needs into .venv takes minutes, most of them for torch."
	$(INSTALL) .
	touch $@

.venv/tested: .venv/ready
	$(INSTALL) '.[test]'
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	touch $@

try: setup  ## Show in a minute what clustering the shipped model saves and costs
	$(BIN)/kclib try

run: setup  ## Run all notebooks and write the report (PROFILE=smoke|full|imagenet)
	$(BIN)/kclib batch --profile $(PROFILE)

lab: setup  ## Open JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks

dashboard: setup  ## Serve notebook 04's explorer alone, as a page (Voila)
	$(BIN)/voila notebooks/04-clustering.ipynb --Voila.config_file_paths=notebooks/dashboard

test: .venv/tested  ## Run the tests: browsers' alone, then a file of them to a processor, the longest first
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder --ignore=tests/browser

soak: .venv/tested  ## What is too long for every day: 200 kills, whole profiles on the shipped model (at most 30 minutes)
	SOAK=1 OMP_NUM_THREADS=1 timeout --kill-after=30 30m $(BIN)/python -m pytest -n logical --maxprocesses=4 -rP \
		--dist=loadfile --no-loadscope-reorder tests/test_survival.py tests/similarity/test_embedding.py tests/test_notebooks*.py

faults: .venv/tested  ## Try every fault and write docs/what-happens-if.md from what is seen (as root)
	WRITE_FAULTS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0

fuzz: .venv/tested  ## Read what is damaged at random, 30 s a kind; a printed seed repeats it (--hypothesis-seed)
	@set -e; for kind in compressed weights profile folder; do \
		end=$$(($$(date +%s) + 30)); \
		while [ $$(date +%s) -lt $$end ]; do \
			seed=$$(od -An -N4 -tu4 /dev/urandom | tr -d ' '); \
			echo "fuzz $$kind, seed $$seed"; \
			$(BIN)/python -m pytest tests/test_fuzz.py -k $$kind --hypothesis-seed=$$seed; \
		done; \
	done

lint: .venv/tested  ## Check style, import order, and that notebooks carry no outputs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify notebooks/*.ipynb
	$(BIN)/lint-imports

bench: .venv/tested  ## Measure what the tables show (WEIGHTS=a safetensors file of other kernels; four hours, resumable)
	$(BIN)/python -m benchmarks.evaluation
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.latency
	$(BIN)/python -m benchmarks.sweeps
	$(BIN)/python -m benchmarks.similarity
	WEIGHTS=$(WEIGHTS) $(BIN)/python -m benchmarks.recovery
	$(BIN)/python -m benchmarks.choices
	$(BIN)/python -m benchmarks.orthogonality
	$(BIN)/python -m benchmarks.kmeans $(WEIGHTS)
	$(BIN)/python -m benchmarks.explorer

tables: setup  ## Write the tables and pictures of the README and the site from the runs kept in docs/
	$(BIN)/python -m benchmarks.tables

sample: setup  ## Write docs/sample, the report of the last full run made small, for the site
	$(BIN)/python docs/sample_report.py

.venv/docs-ready: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

docs: .venv/docs-ready  ## Build the site into docs/_build/html, with the notebooks as last run (warnings are errors)
	$(BIN)/python -m sphinx -q -W --keep-going -j auto docs docs/_build/html

linkcheck: .venv/docs-ready  ## Check the site's links to other servers too
	$(BIN)/python -m sphinx -q -b linkcheck docs docs/_build/linkcheck

train: setup  ## Train the shipped model again (START=features.safetensors; resumable, about an hour)
	$(BIN)/python data/train.py --out data/vgg16_fashion.fp16.safetensors $(if $(START),--start $(START))

clean:  ## Remove the environment and what can be made again at once; results stay
	rm -rf .venv docs/_build docs/api docs/notebooks docs/command-line.md data/cache/FashionMNIST .pytest_cache .hypothesis .ruff_cache .import_linter_cache
	find kclib tests benchmarks data notebooks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

clean-all: clean  ## Remove all that was made here: results, reports and the states of trainings too
	rm -rf data/cache reports
