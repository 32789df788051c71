# make demo | test | protos | lint | clean: everything installs itself into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STUBS := --python_out=client --grpc_python_out=client --mypy_out=client --mypy_grpc_out=client

.PHONY: demo test lint protos check-protos fuzz clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[server,otel,dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python tools/demo.py

test: lint
	$(BIN)/python -m pytest

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
