# Two commands: `make demo` runs the whole chain on the embedded model, `make test` the tests.
# Each sets up a virtual environment in .venv first, from the versions pinned in pyproject.toml.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
CORES ?= 2
DEMO := $(addprefix results/tiny/,goodhart.png report.md)

.PHONY: demo test lint format config bench-allocate bench-allocators bench-clusters bench-evaluate bench-evolve bench-export bench-goodhart bench-matrices bench-memory bench-peers bench-phase bench-resume bench-rounds bench-scan bench-sweep bench-techniques bench-tune test-lepton test-slurm validate clean

demo: $(VENV)/.core
	$(BIN)/snakemake $(DEMO) --cores $(CORES) --quiet rules host
	@$(BIN)/python -m bitalloc.report results/tiny

test: $(VENV)/.dev lint
	$(BIN)/pytest -n $(CORES) --dist worksteal

# every study of config/studies that this machine can run, and one table of what was claimed and what came of it
validate: $(VENV)/.dev
	@$(BIN)/python -m bitalloc.validate -- --cores $(CORES) --quiet rules host

# what .ci/run leaves out: Lepton's own client, a real Slurm (installs Debian's packages, needs root)
test-lepton: $(VENV)/.dev
	test -x .lepton/bin/python || $(PYTHON) -m venv .lepton
	.lepton/bin/pip install --quiet --disable-pip-version-check leptonai==0.47.1
	LEPTONAI_PYTHON=$(CURDIR)/.lepton/bin/python $(BIN)/pytest tests/lepton

# the plugin stays out of $(VENV): merely installed it slows every start of snakemake
test-slurm: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .slurm \
		snakemake-executor-plugin-slurm==2.8.0 snakemake-executor-plugin-slurm-jobstep==0.6.1
	BITALLOC_SLURM=1 PYTHONPATH=$(CURDIR)/.slurm $(BIN)/pytest tests/slurm

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

# Python compiles what it imports; pip would compile all 18,600 files, one after the other. Images for containers often
# forbid it to keep that, and each process would then compile torch anew
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile

# torch comes first and as the platform offers it, so that nothing else chooses its build
$(VENV)/.torch: pyproject.toml envs/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==2.13.0
	touch $@

$(VENV)/.core: $(VENV)/.torch
	$(INSTALL) --constraint envs/constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.torch
	$(INSTALL) --constraint envs/constraints.txt --editable '.[dev]'
	$(INSTALL) --no-deps lm_eval==0.4.13 # 23 s; 108 s with all it requires
	touch $(VENV)/.core $@

bench-sweep: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_sweep.py

# the embedded model; with BITALLOC_DATA also a small real one, and attention weights of GPT-2
ROUNDS := tiny $(if $(BITALLOC_DATA),stories260k)
GPT2 := $(if $(BITALLOC_DATA),--gpt2 $(BITALLOC_DATA)/models/gpt2_small_attention_only)
bench-rounds: $(VENV)/.dev
	$(BIN)/snakemake --cores $(CORES) $(ROUNDS:%=results/%/moments.parquet) --quiet rules host
	$(BIN)/python benchmarks/bench_rounds.py --models $(ROUNDS) $(GPT2)

bench-phase: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_phase.py $(GPT2)

bench-allocate: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_allocate.py

bench-allocators: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_allocators.py

# faults of a Lepton workspace at random moments, against a stand-in on loopback; half an hour
bench-clusters: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_clusters.py

bench-evaluate: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_evaluate.py

bench-evolve: $(VENV)/.dev
	$(BIN)/snakemake --cores $(CORES) results/tiny/plans.parquet --quiet rules host
	$(BIN)/python benchmarks/bench_evolve.py

bench-memory: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_memory.py

bench-resume: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_resume.py

bench-scan: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_scan.py

bench-export: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_export.py

bench-goodhart: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_goodhart.py

bench-matrices: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_matrices.py

# whole models: `make bench-peers MODEL=/a/folder TEXT=some.txt SEEDS=5`, all three optional
bench-peers: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_peers.py --models $(or $(MODEL),$(ROUNDS)) $(TEXT:%=--text %) $(SEEDS:%=--seeds %)

bench-tune: $(VENV)/.dev
	$(BIN)/snakemake --cores $(CORES) $(ROUNDS:%=results/%/plans.parquet) --quiet rules host
	$(BIN)/python benchmarks/bench_tune.py --models $(ROUNDS) --seeds 5

# each technique off in turn, on a model that nothing is compared on: `make bench-techniques MODEL=/a/folder`, any other
bench-techniques: $(VENV)/.dev
	$(if $(MODEL),,$(BIN)/snakemake --cores $(CORES) results/trained/gpt2-6/model.safetensors --quiet rules host)
	$(BIN)/python benchmarks/bench_techniques.py $(MODEL:%=--models %)

clean:
	rm -rf results logs .snakemake
