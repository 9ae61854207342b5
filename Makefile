# Targets create their own environments: `make demo` and `make test` on a fresh clone need only python3 (3.11+) and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-all test-compilers test-oldest lint lint-workflows format docs bench audit clean

# Compiled programs are cached, so that a second `make demo` or `make test` does not compile them again. The benchmarks
# time compilation, so they do not use the cache. `make clean` removes it.
demo test test-slow test-all test-compilers test-oldest: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

# So is bytecode, also where the environment forbids it, as in many containers: every test process and every program
# that a test starts would compile the sources again, and pytest would rewrite the assertions of all tests again.
demo test test-slow test-all test-compilers test-oldest: export PYTHONDONTWRITEBYTECODE :=

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jprune needs Python 3.11 or newer; try: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[experiments]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo  ## train, prune and audit 30 replicates on real digits; writes runs/demo/report.html
	$(BIN)/python -m experiments.recall_distortion --preset demo

test: $(VENV)/.dev  ## run the tests in two processes, without the slow ones
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# The slow suites compile with XLA's own settings, as users do; the others compile quickly (see tests/conftest.py).
test-slow: $(VENV)/.dev
	XLA_FLAGS= $(BIN)/python -m pytest -n 2 --dist worksteal -m slow

test-all: test test-slow test-compilers  ## run all tests: also the slow ones (sweeps, fuzzing, killed runs, a browser) and test-compilers

$(VENV)-compilers/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m venv $(VENV)-compilers
	$(VENV)-compilers/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test,compilers]'
	$(VENV)-compilers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps nvidia-cuda-nvcc-cu12 \
	  $$($(VENV)-compilers/bin/python -c 'import jax; print(f"jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}")')
	touch $@

# The compilers run on the CPU and compile ahead of time for a described device; no GPU or TPU is used.
test-compilers: $(VENV)-compilers/.test  ## compile for H100 and TPU v5e and check the programs, in .venv-compilers
	XLA_FLAGS= JAX_PLATFORMS=cpu $(VENV)-compilers/bin/python -m pytest -n 2 tests/compilers

$(VENV)-oldest/.test: pyproject.toml tests/oldest.py | $(BIN)/python
	$(BIN)/python -m venv $(VENV)-oldest
	$(BIN)/python tests/oldest.py > $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(VENV)-oldest/constraints.txt --editable '.[test]'
	touch $@

test-oldest: $(VENV)-oldest/.test  ## run the tests with the oldest versions that pyproject.toml allows, in .venv-oldest
	$(VENV)-oldest/bin/python -m pytest -n 2 --dist worksteal -m "not slow"

lint: $(VENV)/.dev lint-workflows  ## check format, lint, types and the workflow files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

lint-workflows: $(VENV)/.dev
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/feature.yml
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.citation-file-format CITATION.cff
	@$(BIN)/pre-commit validate-config
	$(BIN)/zizmor --offline --quiet .github

docs: $(VENV)/.dev  ## build the documentation in site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

$(VENV)/.bench: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	touch $@ $(VENV)/.demo

bench: $(VENV)/.bench  ## run every benchmark and its peer, under 20 minutes; writes benchmarks/results.md
	$(BIN)/python -m benchmarks

$(VENV)-audit/.done: | $(BIN)/python
	$(BIN)/python -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit pip-licenses
	touch $@

# If its service cannot be reached, pip-audit crashes, or finds no packages and reports no vulnerabilities.
audit: $(VENV)/.dev $(VENV)-audit/.done  ## list the licenses of the installed packages, and their known vulnerabilities if the service can be reached
	$(VENV)-audit/bin/pip-licenses --python $(BIN)/python --order license
	@packages=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	found=$$($(VENV)-audit/bin/pip-audit --progress-spinner off --path "$$packages" 2>&1); status=$$?; \
	if echo "$$found" | grep -q -e '^jax .*could not be audited' -e 'ConnectionError' -e 'ServiceError'; then \
	  echo 'pip-audit: the vulnerability service cannot be reached, so nothing was checked'; \
	else echo "$$found"; exit $$status; fi

format: $(VENV)/.dev  ## format the sources and apply the linter's automatic fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the virtual environments and caches, but not runs/
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-compilers $(VENV)-audit .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
