# One command per habit. Needs Python 3.11 or newer (with venv), make and git; everything else goes into .venv.

PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
PIP     := $(BIN)/python -m pip --quiet --disable-pip-version-check
SOURCES := src tests bundled $(wildcard benchmarks docs)

.DEFAULT_GOAL := help
.PHONY: help install demo demo-video test check format bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

install: $(STAMP)  ## make .venv with everything that the demo and the tests need

# The stamp makes a second `make install` free, and a changed pyproject or constraints file redo it.
$(STAMP): pyproject.toml constraints.txt bundled/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "ditq needs Python 3.11 or newer; try: make install PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		echo "making $(VENV) with $$($(PYTHON) --version)"; \
		$(PYTHON) -m venv --clear $(VENV) || { \
			echo "python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; }
	@echo "installing torch and the other dependencies, about 1.5 GB; minutes the first time"
	@$(PIP) install -c constraints.txt torch==2.13.0
	@$(PIP) install -c constraints.txt -e ./bundled -e '.[demo,metrics,report,search,openvino,dev]'
	@touch $@
	@echo "installed; activate with: . $(BIN)/activate"

demo: install  ## quantize a bundled model, generate pictures, write the report
	@$(BIN)/ditq demo

demo-video: install  ## the same with a bundled model of videos: one animation, side by side
	@$(BIN)/ditq demo --video

# One thread for each worker: two torch processes with two threads each are ten times slower on two cores.
test: install  ## run the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

check: install  ## format, lint, types
	@echo "ruff format" && $(BIN)/ruff format --check --quiet $(SOURCES)
	@echo "ruff check" && $(BIN)/ruff check --quiet $(SOURCES)
	@echo "mypy" && $(BIN)/mypy

format: install  ## format the code and fix what ruff can fix
	@$(BIN)/ruff format $(SOURCES)
	@$(BIN)/ruff check --fix $(SOURCES)

bench: install  ## run the CPU and quality benchmarks
	@set -e; for script in benchmarks/cpu/linear.py benchmarks/cpu/pictures.py benchmarks/quality/text_to_image.py; do \
		echo "== $$script"; $(BIN)/python $$script; done

clean:  ## remove .venv, caches and build outputs
	@rm -rf $(VENV) dist build bundled/dist ditq-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests benchmarks bundled -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
