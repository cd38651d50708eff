# `make demo` compresses the bundled model; `make test` is what CI runs, `make test-quick` a part of it in two minutes.
# They need Python >= 3.11, a C++ compiler and make.
# Everything is installed into .venv, once, in the versions of constraints.txt.
.PHONY: demo test test-quick lint package fuzz bench bench-export damage docs floors latent lightmoe prediction quality \
	peers pareto scale tutorial whole-run start

PYTHON ?= python3
BIN := .venv/bin
INPUTS ?= 5000
SEED ?= 1
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

demo: .venv/installed
	$(BIN)/moe-export --budget 4.5MB --budget-kind file --recover-time 5m --plan-time 2m --out demo

# One thread for each pytest worker: more would fight over two cores. Tests start the program hundreds of times, so what
# is compiled is kept, also where the environment says otherwise.
test: lint
	env -u PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX=$(CURDIR)/.venv/bytecode OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# The tests of those parts that run no model, or a layer of one, for people who change a line.
QUICK := tests/test_docs.py tests/test_docstrings.py tests/test_family_facts.py \
	$(addprefix tests/compressors/model/test_, checkpoint.py config.py glu.py json_file.py names.py routing.py shape.py \
	special_tokens.py transforms.py) \
	tests/compressors/sensitivity/test_knapsack.py tests/compressors/shrink/test_prune.py \
	$(addprefix tests/exporter/planning/test_, compression.py flags.py job.py recipe.py rates.py yaml_file.py) \
	tests/exporter/capabilities tests/exporter/estimating/test_durations.py tests/exporter/progress tests/exporter/publishing \
	tests/exporter/stages/test_table.py tests/exporter/test_api.py tests/exporter/test_command_line.py \
	tests/exporter/test_file_names.py tests/exporter/work tests/exporter/writing/gguf/test_gguf_layout.py \
	tests/exporter/writing/gguf/test_gguf_metadata.py tests/exporter/writing/onnx/test_onnx_encodings.py \
	$(addprefix tests/validate/metrics/test_, bootstrap.py domains.py floors.py statistics.py verdict.py) \
	tests/validate/report/test_report.py tests/validate/report/test_short.py
test-quick: .venv/installed-dev
	$(BIN)/ruff check .
	env -u PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX=$(CURDIR)/.venv/bytecode OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(QUICK)
	@echo "left out: whole runs, both runtimes, writing files, training, families, damaged inputs, the browser; make test has all"

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# The site of the documentation, in site/: broken links are errors.
docs: .venv/installed
	$(INSTALL) '.[cpu,docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Every command of docs/tutorial.md prints what the page shows; minutes.
tutorial: .venv/installed-dev
	$(BIN)/python -m docs.tutorial_check

# Wheel and sdist in dist/; the wheel, installed into an empty environment, inspects the bundled model and plans a run.
package: .venv/installed-dev
	rm -rf dist .venv-package
	$(BIN)/python -m hatchling build
	$(PYTHON) -m venv .venv-package
	.venv-package/bin/python -m pip install --quiet --constraint constraints.txt "$$(ls $(CURDIR)/dist/*.whl)[cpu]"
	cd .venv-package && env -u PYTHONPATH bin/moe-export --version
	cd .venv-package && env -u PYTHONPATH bin/moe-export inspect lib/python3*/site-packages/exporter/demo/model
	cd .venv-package && env -u PYTHONPATH bin/moe-export --budget 4.5MB --budget-kind file --dry-run
	cd .venv-package && env -u PYTHONPATH bin/optimum-cli export moe --version

# Thousands of damaged files, flags and folders, for every reader and for whole commands: INPUTS=5000 SEED=1.
fuzz: .venv/installed-dev
	$(BIN)/python -m tests.fuzz --inputs $(INPUTS) --seed $(SEED)

# How fast calibration and training are, whether both runtimes route alike, and, for hours, what every way of teaching a
# compressed model brings.
bench: .venv/installed-dev
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.quantized_recovery
	$(BIN)/python -m benchmarks.same_blocks
	$(BIN)/python -m benchmarks.recovery

# Compiles llama-quantize the first time; needs cmake and 10 GB of disk.
bench-export: .venv/installed-dev
	$(BIN)/python -m benchmarks.export

# Every way of shrinking experts on both trained models: half an hour.
quality: .venv/installed-dev
	$(BIN)/python -m benchmarks.quality

# Hundreds of files with one damage each, and whole ones that must pass: half an hour.
damage: .venv/installed-dev
	$(BIN)/python -m benchmarks.damage

floors: .venv/installed-dev
	$(BIN)/python -m benchmarks.floors

# The whole run on a small trained model with latent attention: pruned, recovered, quantized, in both runtimes; minutes.
latent: .venv/installed-dev
	$(BIN)/python -m benchmarks.latent

# Replaced experts beside every other family at equal bytes, with and without the same training: an hour.
lightmoe: .venv/installed-dev
	$(BIN)/python -m benchmarks.lightmoe

# Predicted against measured divergence of mixed types on both trained models: ten minutes.
prediction: .venv/installed-dev
	$(BIN)/python -m benchmarks.prediction

peers: .venv/installed-dev
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.validation

# Divergence against bytes, ours beside llama.cpp's presets, and how fast each type decodes; an hour. Rows that are in
# benchmarks/results/pareto.csv are not measured again.
pareto: .venv/installed-dev
	$(BIN)/python -m benchmarks.pareto
	$(BIN)/python -m benchmarks.decode

# Hours, and 40 GB of disk: checkpoints of real shape with random weights, every stage measured.
scale: .venv/installed-dev
	$(BIN)/python -m benchmarks.scale

# The whole command against llama.cpp's own tools on OLMoE-1B-7B's shape: hours, and 35 GB of disk.
whole-run: .venv/installed-dev
	$(BIN)/python -m benchmarks.whole_run

# The processor time of help, inspection and dry runs over the headers of a 30B model; a minute.
start: .venv/installed-dev
	$(BIN)/python -m benchmarks.start

# pip shows nothing while it compiles.
SAY_SO = @echo "installing the requirements into .venv; the first time llama.cpp is compiled, which takes some ten minutes"

.venv/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(SAY_SO)
	$(INSTALL) '.[cpu]'
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(SAY_SO)
	$(INSTALL) '.[cpu,dev]'
	touch $@ .venv/installed

$(BIN)/python:
	$(PYTHON) -m venv .venv
