# `make demo` and `make test` need only Python 3.10+ and pip: they make .venv and install into it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# One distribution per framework, each with tests and settings of its own.
INTEGRATIONS := llama-index-llms-blockrag langchain-blockrag blockrag-haystack

.PHONY: demo test test-core test-integrations test-oldest test-long reliability lint format bench docs clean
.DEFAULT_GOAL := demo

# Installed once; again only when what is to be installed has changed.
$(VENV)/.runtime: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing blockrag into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime $(INTEGRATIONS:%=integrations/%/pyproject.toml)
	@echo "Installing the development tools and the integrations into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]" \
		$(INTEGRATIONS:%=-e "./integrations/%[dev]")
	@touch $@

# The oldest framework releases that are allowed, beside the newest ones and found before them.
$(VENV)/.oldest: integrations/oldest.txt $(VENV)/.dev
	@echo "Installing the oldest supported frameworks into $(VENV)/oldest ..."
	@rm -rf $(VENV)/oldest
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/oldest -r integrations/oldest.txt
	@touch $@

demo: $(VENV)/.runtime
	@$(BIN)/blockrag demo

test: test-core test-integrations

test-core: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov=blockrag --cov-report=term --cov-fail-under=95

test-integrations: $(VENV)/.dev
	@set -e; for name in $(INTEGRATIONS); do echo "== $$name"; \
		(cd integrations/$$name && ../../$(BIN)/python -m pytest -q -n 2 --dist loadfile); done

test-oldest: $(VENV)/.oldest
	@set -e; for name in $(INTEGRATIONS); do echo "== $$name, oldest supported framework"; \
		(cd integrations/$$name && PYTHONPATH=../../$(VENV)/oldest ../../$(BIN)/python -m pytest -q -n 2 --dist loadfile); done

test-long: $(VENV)/.dev
	$(BIN)/python -m pytest -m "long"

# Hours: kills, flips, cuts, full disks and fuzzing by the thousand. The table names what was tried and what came of it.
reliability: $(VENV)/.dev
	$(BIN)/python -m pytest tests/reliability -n 2 --dist loadfile --reliability=long \
		--reliability-results=benchmarks/results/reliability-cpu

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@set -e; for name in $(INTEGRATIONS); do echo "mypy: $$name"; (cd integrations/$$name && ../../$(BIN)/mypy); done

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/blockrag bench all

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache
