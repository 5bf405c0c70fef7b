# Every target sets up what it needs on a machine that has Python >= 3.11 and make.
#   make demo      train the embedded world's policy, from nothing to its held-out accuracy
#   make test      the tests                make lint     style, types, layers
#   make test-long the tests that take minutes: two hosts, a sweep that is killed again and again, a
#                  sweep on two slices, a run's start that is interrupted at 20 moments, learning in both call formats, more meshes
#   make docs      the documentation's site, in site/
#   make bench     speed: the sampler, the tools and, with DATA=DIR_OF_GSM8K, whole steps; make parity: our policies against
#                  transformers, live
#   make compare   APPO against GRPO at equal sampled tokens, over three seeds

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
RUN := .venv/.run-time
DEV := .venv/.development
PEERS := .venv-peers/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Programs compiled once are compiled for every later run of this checkout.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/artifacts/xla

# One process more than there are cores, because many tests wait for processes that they start; at most 4, for memory.
PYTEST = $(BIN)/pytest --numprocesses $$($(BIN)/python -c 'import os; print(min(os.cpu_count() + 1, 4))') --dist worksteal

.PHONY: setup demo test test-long lint docs bench parity compare
.DELETE_ON_ERROR:

setup: $(RUN)

$(RUN): requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: needs Python 3.11 or newer; name it with PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	$(PIP) --no-deps -e .
	@touch $@

$(DEV): requirements-dev.txt $(RUN)
	$(PIP) -r requirements-dev.txt
	@touch $@

# transformers, tunix and TRL, which only benchmarks compare with, and whose needs must not change what everything else runs on.
$(PEERS): pyproject.toml $(RUN)
	test -x $(PEERS)/pip || $(PYTHON) -m venv .venv-peers
	$(PEERS)/python -m pip install --quiet --disable-pip-version-check -e '.[bench,smollm2]'
	@touch $@

artifacts/smollm2: | $(PEERS)
	$(PEERS)/appo-jax convert smollm2 --out $@

# ARGS are passed on: make demo ARGS="--seed 1 --run-dir runs/seed1"
demo: $(RUN)
	$(BIN)/appo-jax data world --config configs/quickstart.py
	$(BIN)/appo-jax train --config configs/quickstart.py $(ARGS)

test: $(DEV)
	$(PYTEST) $(ARGS)

test-long: $(DEV)
	$(PYTEST) -m long $(ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(DEV)
	DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --quiet --strict --site-dir site

bench: $(PEERS) artifacts/smollm2
	$(PEERS)/python benchmarks/sampler.py --policy artifacts/smollm2
	$(if $(DATA),$(PEERS)/python benchmarks/step.py --data $(DATA))
	$(BIN)/python benchmarks/tools.py $(ARGS)

parity: $(PEERS)
	$(PEERS)/python benchmarks/parity.py $(ARGS)

# Each algorithm from the same cold start, until 40,000 tokens have been sampled; ends in runs/study/study.md and study.png.
compare: $(RUN)
	$(BIN)/appo-jax data world --config configs/quickstart.py
	$(BIN)/appo-jax study --config configs/studies/study.py --arms appo grpo --seeds 0 1 2 $(ARGS)
