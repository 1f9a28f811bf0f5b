# Everything a newcomer types. `make help` lists it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Two pytest workers, one thread each: the default machine has two cores. Who is done takes from the other: tests are of
# very unlike length.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv peers demo bench test lint format docs clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: .venv/.complete ## build .venv with everything that demo, test, lint and docs need

.venv/.complete: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "apportion needs Python 3.11 or newer, and $(PYTHON) is older: make venv PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,docs]'
	@touch $@

peers: .venv/.peers ## add the peers: the tests of their formats run instead of skipping, and the benchmarks have company

# The last two ask for torchvision, whose registry build is for CUDA and breaks `import transformers` beside a CPU build
# of torch; what the benchmarks take of them works without it, and without anything else that they ask for.
.venv/.peers: .venv/.complete
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		dictionary-learning nnsight overcomplete
	@touch $@

demo: venv ## harvest SmolLM2, train three dictionaries at equal budget, write demo/report.html
	$(BIN)/apportion fetch smollm2
	$(BIN)/apportion compare smollm2 --site layers.9.residual --text english --tokens 120000 --model-dtype auto \
		--rules topk,mutual,feature --features 2304 --budget 32 --batch-size 2048 --steps 250 --learning-rate 3e-3 \
		--seed 0 --out demo
	@echo "open demo/report.html in a browser"

bench: peers ## measure speed and memory on an idle machine, then write docs/performance.md
	$(BIN)/apportion fetch smollm2
	$(BIN)/python -m benchmarks --plots

test: venv ## run the tests with coverage (a single file: .venv/bin/pytest tests/test_import.py)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --cov --cov-report=term

lint: venv ## ruff, mypy and the floors' import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: venv ## build the documentation into site/, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove what the targets above made
	rm -rf .venv site demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage*
