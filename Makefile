# Everything from a fresh machine with Python >= 3.10 and make:  make train  ·  make test
PYTHON := .venv/bin/python
STAMP := .venv/.installed
CODE := unbroken tests benchmarks train_gpt2_mod.py
# One more than two cores: a test that waits for a clock or a process leaves its core to another one.
WORKERS := 3

.PHONY: help train test test-fast test-matrix test-simulated-gpu lint format docs clean
.DEFAULT_GOAL := help

help:
	@echo "make train      train a small model for about a minute, killing and resuming it once"
	@echo "make test       run all tests"
	@echo "make test-fast  run those that start no process, and two short trainings: for the edit loop"
	@echo "make test-matrix  run them on other versions of Python and torch: VERSIONS='3.13:2.14 3.12:newest'"
	@echo "make test-simulated-gpu  train on simulated GPUs: torch's CUDA build in .venv-cuda, 8 GB"
	@echo "make lint       check style and types"
	@echo "make format     bring the code into the house's form"
	@echo "make docs       build the site of the documents into site/"
	@echo "make clean      remove the virtual environment and caches; your data/ and logs/ stay"

train: $(STAMP)
	@$(PYTHON) -m unbroken demo

test: $(STAMP)
	@$(PYTHON) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-fast: $(STAMP)
	@$(PYTHON) -m pytest -n $(WORKERS) --dist worksteal -m "fast or not slow" $(ARGS)

test-matrix: $(STAMP)
	@$(PYTHON) -m tests.matrix $(VERSIONS)

# PyPI's builds for Linux are those for CUDA; requirements.lock may have brought another.
test-simulated-gpu: $(STAMP)
	@test -x .venv-cuda/bin/pytest || { $(PYTHON) -m venv .venv-cuda && \
	    .venv-cuda/bin/python -m pip install -q "torch>=2.14" -e . pytest pytest-timeout pytest-xdist hypothesis; }
	@UNBROKEN_SIMULATED_GPU=1 .venv-cuda/bin/python -m pytest -n 2 tests/simulated_gpu $(ARGS)

lint: $(STAMP)
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

format: $(STAMP)
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .

docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict  # --quiet would hide the warnings from --strict as well

clean:
	rm -rf .venv .venv-cuda site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find unbroken tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is younger than the lock exactly when the environment is what the lock says: the second time is instant.
$(STAMP): requirements.lock
	@for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	    if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "error: no Python >= 3.10 was found as python3 or python3.x; install one and run make again" >&2; exit 2; \
	fi; \
	if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	    echo "making .venv with $$found"; \
	    $$found -m venv --clear .venv || { echo "error: $$found cannot make a virtual environment; install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }; \
	fi; \
	echo "installing what requirements.lock says (the first time: PyTorch, some minutes)"; \
	$(PYTHON) -m pip install $$([ -t 1 ] || echo -qq) --disable-pip-version-check -r requirements.lock || { echo "error: pip could not install requirements.lock; what it said stands above" >&2; exit 2; }
	@touch $@
