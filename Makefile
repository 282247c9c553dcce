# One environment in .venv, from exact pins. On a machine where the package index carries CUDA builds of torch, give the
# index of its CPU builds:  make setup PIP_ARGS="--extra-index-url <PyTorch's CPU wheel index>"
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test test-slow test-all check format clean

setup: $(READY)

# --no-deps: the pins are the whole set. A resolver would add torchvision, torchaudio, torchcodec and triton, which do not
# load beside a CPU build of torch and which text models do not need.
$(READY): constraints-cpu.txt pyproject.toml
	@command -v java >/dev/null || { echo "Java 17 is needed for Spark (Debian: apt-get install openjdk-17-jre-headless)"; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make setup PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps -r constraints-cpu.txt
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps -e .
	@touch $@

# The main job on the embedded default: pairs, AGPO teacher, annotation, student, ONNX. Run it again to resume it.
demo: $(READY)
	$(BIN)/prefect run relevance-pipeline --preset sample

# What people run while they work: minutes. Whole flows, vLLM engines and kills are in test-all.
TEST_PROCESSES ?= 2
test: $(READY)
	$(BIN)/python -m pytest -m "not vllm and not e2e" --numprocesses $(TEST_PROCESSES) --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m "vllm or e2e"

# Both at the same time, a process each for two cores: each waits much of its time, for servers and engines that start.
test-all: $(READY)
	$(MAKE) --jobs=2 TEST_PROCESSES=1 test test-slow

check: $(READY)
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
