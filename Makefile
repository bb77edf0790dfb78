# Each target makes .venv first when it is missing or older than settings.ini.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
SHELL := bash
.PHONY: reproduce figures report test bench drift lint notebooks pytest faults audit lab docs

reproduce: .venv/.installed
	@$(BIN)/saferlhf reproduce $(if $(PROFILE),--profile $(PROFILE))

figures: .venv/.installed
	@$(BIN)/saferlhf figures $(if $(PROFILE),--profile $(PROFILE))

# One HTML file with every table and figure, in runs/.
report: .venv/.installed
	@$(BIN)/saferlhf report $(if $(PROFILE),--profile $(PROFILE)) $(if $(OUT),--out $(OUT))

bench: .venv/.installed
	@$(BIN)/python tools/bench.py

# JupyterLab in the project's folder, where the index finds its pictures.
lab: .venv/.installed
	@$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/index.ipynb

docs: .venv/.installed
	@$(BIN)/python tools/readme.py

# One phase after the other, the quick ones first; pytest's closing line is the last one.
test: .venv/.installed
	@$(MAKE) --no-print-directory drift && $(MAKE) --no-print-directory lint && $(MAKE) --no-print-directory notebooks && $(MAKE) --no-print-directory pytest

timed = echo "== $(1)"; start=$$SECONDS; $(2) && echo "== $(1): $$((SECONDS - start)) s"

drift: .venv/.installed
	@$(call timed,the package and the notebooks are what nbdev-export and nbdev-clean leave, $(BIN)/python tests/drift.py)

lint: .venv/.installed
	@$(call timed,ruff, $(BIN)/ruff check -q --output-format concise .)

notebooks: .venv/.installed
	@$(call timed,library notebooks, OMP_NUM_THREADS=1 $(BIN)/nbdev-test nbs --n-workers 2 --pause 0 --timing)

pytest: .venv/.installed
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Kills, full disks, damaged checkpoints, bad numbers and bad rows; half an hour to an hour. `make faults ONLY="kill rows"` runs a part.
faults: .venv/.installed
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python tests/faults/suite.py $(ONLY)

# Known weaknesses of the installed packages; asks the package index about each of them.
audit: .venv/.installed
	@$(BIN)/pip-audit --skip-editable --progress-spinner off

.venv/.installed: settings.ini setup.py pyproject.toml
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "saferlhf needs Python 3.11 or newer: install it, or name it with make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "== making .venv with $$($(PYTHON) --version); the packages take a minute or two"; start=$$SECONDS; \
	  $(PYTHON) -m venv .venv && $(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[all]' && \
	  touch $@ && echo "== .venv: $$((SECONDS - start)) s"
