# make demo | test | long-tests | soak | fuzz | protos | lint | lint-protos | clean: everything installs itself into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STUBS := --python_out=client --grpc_python_out=client --mypy_out=client --mypy_grpc_out=client

FUZZ_SECONDS ?= 300
SOAK_MINUTES ?= 10
BUF_VERSION := 1.75.0
AGAINST ?= .git\#branch=main

.PHONY: demo test long-tests soak fuzz lint lint-protos protos check-protos clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[server,otel,dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python tools/demo.py

# The tests install Node's packages themselves; what C++ needs comes from the system's packages.
test: lint
	tools/install_cpp.sh
	$(BIN)/python -m pytest

# Ten thousand histories of the manager, and a hundred rounds of threads: about ten minutes.
long-tests: $(VENV)/.installed
	$(BIN)/python -m pytest tests/stateful --hypothesis-profile long --timeout 0 --hypothesis-show-statistics

# A true server under load and faults, kill -9 included, for SOAK_MINUTES and a minute more; see docs/reliability.md.
soak: $(VENV)/.installed
	mkdir -p out
	$(BIN)/python -m tests.soak --minutes $(SOAK_MINUTES) --out out/soak.json

# New inputs are kept in out/fuzz/corpus; what fails lies in out/fuzz and belongs into tests/fuzz/corpus.
fuzz: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[fuzz]'
	mkdir -p out/fuzz/corpus
	$(BIN)/python -m tests.fuzz.fuzz -max_total_time=$(FUZZ_SECONDS) -timeout=30 -artifact_prefix=out/fuzz/ out/fuzz/corpus

# The contract's style, and whether AGAINST's users could still talk to it; needs npm, and the network once.
lint-protos: node_modules/.buf-$(BUF_VERSION)
	node_modules/.bin/buf lint
	node_modules/.bin/buf breaking --against '$(AGAINST)' --against-config buf.yaml

node_modules/.buf-$(BUF_VERSION):
	npm install --no-save --no-package-lock --no-audit --no-fund @bufbuild/buf@$(BUF_VERSION)
	touch $@

lint: $(VENV)/.installed check-protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

protos: $(VENV)/.installed
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m grpc_tools.protoc -Iprotos $(STUBS) protos/lora_api/v1/*.proto 2>/dev/null

check-protos: $(VENV)/.installed
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python tools/check_protos.py

clean:
	rm -rf out build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
