# Two commands: `make demo` runs the whole chain on the embedded model, `make test` the tests.
# Each sets up a virtual environment in .venv first, from the versions pinned in pyproject.toml.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
CORES ?= 2
DEMO := results/tiny/goodhart.png results/tiny/report.md

.PHONY: demo test lint format config bench-allocate bench-resume bench-sweep clean

demo: $(VENV)/.core
	$(BIN)/snakemake $(DEMO) --cores $(CORES) --quiet rules host
	@$(BIN)/python -m bitalloc.report results/tiny

test: $(VENV)/.dev lint
	$(BIN)/pytest -n $(CORES) --dist loadgroup

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check --line-length 120 Snakefile workflow
	$(BIN)/lint-imports
	$(BIN)/snakemake --lint

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt --line-length 120 Snakefile workflow

config: $(VENV)/.core
	$(BIN)/python -m bitalloc.config config

# torch comes first and as the platform offers it, so that nothing else chooses its build
$(VENV)/.core: pyproject.toml envs/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint envs/constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint envs/constraints.txt --editable '.[dev]'
	touch $@

bench-sweep: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_sweep.py --size 1024

bench-allocate: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_allocate.py

bench-resume: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_resume.py

clean:
	rm -rf results logs .snakemake
