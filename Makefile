# Each target first makes .venv, or brings it up to date, and then does what its name says.
# Nothing has to be there but make and a Python with venv; the C++ engine is built where a compiler is found.

PYTHON ?= python3
FLAGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)

# The stamps are written last, so that an interrupted installation is taken up again, and they carry the
# interpreter's version, so that another PYTHON makes another .venv.
TOOLS := .venv/tools-$(VERSION)
PACKAGE := .venv/package-$(VERSION)

.DEFAULT_GOAL := help
.PHONY: help lab test check docs bench test-sanitize test-triton test-triton-sanitize clean
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 24
	@echo 'FLAGS=... goes on to the command: make lab FLAGS=--quick, make test FLAGS="-k moments".'
	@echo 'PYTHON=... chooses the interpreter: make test PYTHON=python3.12.'

lab: $(PACKAGE) ## train what is not trained yet, write the report and print its path
	@$(BIN)/evenorm lab run $(FLAGS)

test: $(PACKAGE) ## all tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --numprocesses auto --maxprocesses 8 --dist worksteal $(FLAGS)

check: $(PACKAGE) ## format, lint, types, and the rules of the house
	@$(BIN)/ruff format --check --quiet . || { echo 'evenorm: not formatted; run .venv/bin/ruff format'; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/python -m pytest --quiet tests/test_house.py
	@echo 'evenorm: format, lint, types and house are in order'

docs: $(PACKAGE) ## run every example, then build docs/_build/html
	@$(BIN)/python -m pytest --quiet tests/test_docs.py
	@$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env docs docs/_build/html
	@echo "evenorm: the pages are in $(CURDIR)/docs/_build/html/index.html"

bench: $(PACKAGE) ## check every case against float64, then time it against torch.nn
	@$(BIN)/evenorm bench $(FLAGS)

# All tests but those in which no kernel runs (pages, processes, sources); -k leaves out those of last digits, since with
# sanitizers the compiler fuses fewer products and sums.
SANITIZED_TESTS ?= $(filter-out $(addprefix tests/test_,%browser.py cli.py docs.py house.py lab% layer_training.py report%), \
	$(wildcard tests/test_*.py))

test-sanitize: $(PACKAGE) ## the tests of all that computes, the engine built with AddressSanitizer and UBSan
	@echo 'evenorm: building the engine with sanitizers into build/sanitized (minutes)'
	@EVENORM_ENGINE= EVENORM_SANITIZE=1 $(BIN)/python setup.py --quiet build \
		--build-lib build/sanitized/lib --build-temp build/sanitized/objects
	@export LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)"; \
		ASAN_OPTIONS=detect_leaks=0 EVENORM_RECYCLE=off $(BIN)/python -m pytest --quiet \
		--numprocesses auto --maxprocesses 8 --dist worksteal -k 'not as_exact_as' \
		--override-ini='pythonpath=build/sanitized/lib tests' $(SANITIZED_TESTS) $(FLAGS)

# Triton's wheel is large, and torch's CUDA wheels bring it: only these targets install it. The interpreter runs the
# kernels on the CPU; what they compile into is seen without it. Where there is a GPU, the same tests run there; an engine
# that does not work there is an error, not a reason to skip them all.
TRITON := .venv/triton-$(VERSION)

test-triton: $(PACKAGE) $(TRITON) ## the GPU engine: on a GPU, else by Triton's interpreter; and what it compiles into
	@gpu=$$($(BIN)/python -c 'import torch; print(torch.cuda.is_available())'); export OMP_NUM_THREADS=1; \
		if [ "$$gpu" = True ]; \
		then $(BIN)/python -c 'import sys; from evenorm.engines import triton; sys.exit(triton.available())' || exit 1; \
		else export EVENORM_ENGINE=triton TRITON_INTERPRET=1; fi; \
		$(BIN)/python -m pytest --quiet --numprocesses auto --maxprocesses 8 tests/test_triton.py $(FLAGS)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --numprocesses auto --maxprocesses 8 tests/test_triton_compile.py $(FLAGS)

# Not run yet, for want of a GPU; compute-sanitizer comes with the CUDA toolkit. Torch tries calls of the driver that may fail:
# errors of the API are no findings.
test-triton-sanitize: $(PACKAGE) $(TRITON) ## the GPU engine's tests under compute-sanitizer (needs a GPU)
	@command -v compute-sanitizer > /dev/null || { echo 'evenorm: compute-sanitizer is not here; it comes with the CUDA toolkit'; exit 2; }
	@for tool in memcheck racecheck; do PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool \
		--report-api-errors no --error-exitcode 1 \
		$(BIN)/python -m pytest --quiet tests/test_triton.py -k 'many_chunks or end_to_end' $(FLAGS) || exit 1; done

clean: ## remove .venv and all that was built; results/ stays
	@rm -rf .venv build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	@find src tests docs -name __pycache__ -prune -exec rm -rf {} +
	@find src -name '*.so' -delete -o -name _engine_missing.txt -delete

$(TOOLS): pyproject.toml constraints.txt
	@test -n "$(VERSION)" || { echo 'evenorm: $(PYTHON) does not run; name a Python 3.10 or newer: make PYTHON=/path/to/python'; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo \
		'evenorm: $(PYTHON) is Python $(VERSION), 3.10 or newer is required; choose one: make PYTHON=/path/to/python'; exit 2; }
	@echo 'evenorm: installing torch and the pinned tools into .venv (minutes the first time)'
	@$(BIN)/python -c 'import pip, sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(VERSION)")' 2>/dev/null \
		|| $(PYTHON) -m venv --clear .venv
	@$(PIP) install --constraint constraints.txt pip
	@$(PIP) install --constraint constraints.txt --group dev
	@touch $@

$(TRITON): $(TOOLS)
	@echo 'evenorm: installing triton into .venv (200 MB)'
	@$(PIP) install --constraint constraints.txt --group triton
	@touch $@

# No build isolation: the engine is compiled against the torch that is pinned. EVENORM_ENGINE=off, which switches
# it off for one run of the tests, must not leave it out of .venv for all others.
$(PACKAGE): $(TOOLS) $(wildcard setup.py MANIFEST.in src/evenorm/csrc/*)
	@echo 'evenorm: installing the package, with its engine where a compiler is found'
	@EVENORM_ENGINE= $(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[lab]'
	@touch $@
