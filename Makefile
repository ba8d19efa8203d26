# The two commands of the README, and the steps that they share. Needs Linux, Python >= 3.11 and make; no root.
PYTHON ?= $(shell for name in python3.11 python3 python3.12 python3.13 python3.14; do \
  $$name -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2> /dev/null && echo $$name && exit; done; echo python3)
VENV   := .venv
PY     := $(VENV)/bin/python
# cpu, cuda or transformers; empty: what this machine can have.
VARIANT ?=
# Test files at a time; each may hold a trainer or an engine, with up to 4 GB.
WORKERS ?= 2

.PHONY: help setup quickstart test test-fast test-faults fuzz check locks check-locks bench-train bench-data bench-store bench-serve bench-lora bench-import docs clean
.ONESHELL:
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

help:
	@echo "make quickstart    train a small model on demo data, serve it, compare it with its base"
	echo "make test          the whole test suite, real trainer and real engine included; PALATE_TEST_THOROUGH=1 adds further cases, as CI does"
	echo "make test-fast     only the tests that start neither"
	echo "make test-faults  a campaign of 200 faults over real trainings, about 40 minutes; ARGS='--faults 50 --seed 2' and so on"
	echo "make fuzz          100,000 damaged inputs for every reader and the front, about 10 minutes; ARGS='--target uris --seed 2' and so on"
	echo "make check         lint, types, import contracts, unused code"
	echo "make setup         the virtual environment that all of them use; VARIANT=cpu, cuda or transformers instead of what it finds"
	echo "make locks         the exact packages of each variant from pyproject.toml; ARGS=--upgrade for newer versions"
	echo "make check-locks   whether they still fit pyproject.toml and the index, for each variant and Python"
	echo "make bench-train   training speed against stock TRL; ARGS='--data prefs.json --rounds 1' and so on"
	echo "make bench-data    how fast preference data is read and checked; ARGS='--rows 500000' and so on"
	echo "make bench-serve   a service's start, first token and throughput against bare vLLM; ARGS='--rounds 5' and so on"
	echo "make bench-lora    a tuned model's speed against its base's on a processor; ARGS='--rank 64' and so on"
	echo "make bench-import  how long 'import palate' takes"
	echo "make docs          the documentation site, into build/docs; a broken link or docstring is an error"

setup:
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "error: Palate needs Python 3.11 or newer, %s is %d.%d: make PYTHON=/path/to/python3.11" % (sys.executable, v[0], v[1]))'
	"$(PYTHON)" container/make_venv.py --variant "$(VARIANT)"

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
	"$(VENV)/bin/vulture"

locks: setup
	@"$(PY)" container/locks.py write $(ARGS)

check-locks: setup
	@"$(PY)" container/locks.py check

bench-train: setup
	@"$(PY)" benchmarks/train_speed.py $(ARGS)

bench-data: setup
	@"$(PY)" benchmarks/data_speed.py $(ARGS)

bench-store: setup
	@"$(PY)" benchmarks/store_speed.py $(ARGS)

bench-serve: setup
	@"$(PY)" benchmarks/serve_speed.py $(ARGS)

bench-lora: setup
	@"$(PY)" benchmarks/lora_speed.py $(ARGS)

bench-import: setup
	@"$(PY)" benchmarks/import_time.py

# A small environment of its own, made anew when the extra `docs` changes: mkdocs needs neither Palate nor the locks.
docs:
	@wanted=$$("$(PYTHON)" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	if [ "$$(cat .venv-docs/installed 2> /dev/null)" != "$$wanted" ]; then
	  rm -rf .venv-docs
	  "$(PYTHON)" -m venv .venv-docs
	  .venv-docs/bin/pip install --quiet --disable-pip-version-check $$wanted
	  echo "$$wanted" > .venv-docs/installed
	fi
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict
	echo build/docs/index.html

clean:
	@rm -rf "$(VENV)" .venv-docs dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
