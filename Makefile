# make demo   the main job: PyTorch -> INT8 engine -> accuracy drop -> ten seconds of stream -> report.html
# make test   the tests; test-gstreamer and test-soak have the rest of what .ci/run runs
# make check  format, lint, types, layers: what .ci/run runs besides the tests
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help demo test test-gstreamer test-soak test-gpu test-slow test-finish test-modelopt tensorrt-matrix check format docs clean

help:
	@sed -n '1,3s/^# //p' Makefile

$(INSTALLED): pyproject.toml pipeline/planar.c pipeline/resample.c pipeline/resample.h
	$(PYTHON) -c 'import sys; sys.exit("edgefold needs Python 3.10 or newer; try make PYTHON=python3.11" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[build,opencv,av,onnxruntime,tensorrt-rtx,serve,mqtt,dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/edgefold demo --out out/demo

# Those that keep time by themselves, since a busy neighbour would spoil it; the others side by side, file by file in
# the order of the folders: the files of few long tests must not come last.
FAST := not slow and not gpu and not network and not gstreamer and not soak
test: $(INSTALLED)
	$(BIN)/pytest -m "keeps_time and $(FAST)" tests/apps/streaming
	$(BIN)/pytest -m "not keeps_time and $(FAST)" -n auto --dist loadfile --no-loadscope-reorder

# What meets GStreamer: Debian's OpenCV, and its RTSP server. Nothing is skipped: what is missing is a failure, and the
# last line says how many ran.
test-gstreamer: $(INSTALLED)
	$(BIN)/pytest -m gstreamer --skips-fail -v tests/apps/streaming

# The stream for a minute with a fault every second or two, each of which it must survive and count.
test-soak: $(INSTALLED)
	$(BIN)/pytest -m soak --skips-fail tests/apps/streaming

# On a machine with an NVIDIA GPU. TensorRT's library is wanted by four of them only; -rs says what was skipped.
test-gpu: $(INSTALLED)
	$(BIN)/pytest -rs -m "gpu" tests/engines/tensorrt tests/apps/streaming/test_stream_on_a_gpu.py tests/pipeline/training

test-slow: $(INSTALLED)
	$(BIN)/pytest -m "slow"

# A bundle for a GPU finished by the run-time install alone.
test-finish: $(INSTALLED)
	.ci/finish-without-torch

# NVIDIA Model Optimizer itself as the calibrator, in an environment of its own.
test-modelopt: $(INSTALLED)
	.ci/test-modelopt

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
