# make demo   the main job: PyTorch -> INT8 engine -> accuracy drop -> ten seconds of stream -> report.html
# make test   the tests
# make check  format, lint, types, layers: what .ci/run runs besides the tests
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help demo test test-slow test-finish tensorrt-matrix check format docs clean

help:
	@sed -n '1,3s/^# //p' Makefile

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("edgefold needs Python 3.10 or newer; try make PYTHON=python3.11" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[build,opencv,onnxruntime,tensorrt-rtx,serve,mqtt,dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/edgefold demo --out out/demo

# The streams first and by themselves: they keep time, which a busy neighbour would spoil.
FAST := -m "not slow and not gpu and not network"
STREAMS := tests/apps/streaming tests/apps/test_stream.py
test: $(INSTALLED)
	$(BIN)/pytest $(FAST) $(STREAMS)
	$(BIN)/pytest $(FAST) -n auto --dist loadfile $(STREAMS:%=--ignore=%)

test-slow: $(INSTALLED)
	$(BIN)/pytest -m "slow"

# A bundle for a GPU finished by the run-time install alone.
test-finish: $(INSTALLED)
	.ci/finish-without-torch

# Every network, precision and compute capability through TensorRT-RTX's parser and compiler: half an hour, no GPU.
tensorrt-matrix: $(INSTALLED)
	$(BIN)/python benchmarks/tensorrt_matrix.py

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(INSTALLED)
	$(BIN)/python -m typer apps.cli utils docs --name edgefold --title "Command line" --output docs/cli.md

clean:
	rm -rf .venv out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
