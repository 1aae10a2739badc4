# Everything runs in .venv, which the first call makes, or in the interpreter that PYTHON= names.

SYSTEM_PYTHON ?= python3
PYTHON ?=
ARGS ?=

# A set-up is remembered for this folder and this interpreter: an environment that was copied with
# the folder would still import the package from the old place.
KEY := $(shell printf '%s' '$(CURDIR) $(PYTHON)' | cksum | cut -d ' ' -f 1)

ifeq ($(strip $(PYTHON)),)
PY := .venv/bin/python
STAMP := .venv/.setup-$(KEY)
# Every version is pinned, those that build fvcore and other source packages included: pip does not
# apply -c to the isolated environments that it builds in. It reads one variable of these two
# there, depending on its age. The paths are relative, because pip splits them at spaces.
CONSTRAINTS := constraints.txt
PIP := PIP_CONSTRAINT=$(CONSTRAINTS) PIP_BUILD_CONSTRAINT=$(CONSTRAINTS) $(PY) -m pip
else
PY := $(PYTHON)
STAMP := .cache/setup-$(KEY)
# What this interpreter has keeps its version; only what is missing is added.
CONSTRAINTS := .cache/installed-$(KEY).txt
PIP := $(PY) -m pip
endif

SETUP_INPUTS := setup.cfg pyproject.toml constraints.txt tools/install_detectron2.py

.DEFAULT_GOAL := help
.PHONY: help setup demo test docs lint clean
.DELETE_ON_ERROR:

help:
	@echo 'make setup   make .venv and install into it: PyTorch, Detectron2, this package, its tests, docs and deployment runtimes'
	@echo '             (about 3 GB to download, 6 GB on disk; the targets below do it if needed)'
	@echo 'make demo    see distillation at work on a small generated dataset, on a CPU'
	@echo 'make test    run the tests'
	@echo 'make docs    build the docs site into site/: these pages, and a reference of every public function; a dead link fails it'
	@echo 'make lint    check style and formatting with ruff'
	@echo 'make clean   remove caches, build files and site/; runs, datasets and .venv stay'
	@echo
	@echo 'ARGS=...            is handed on:   make test ARGS="-k losses -x"'
	@echo 'PYTHON=...          uses that interpreter as it is, instead of .venv: only packages that it'
	@echo '                    lacks are installed into it, also your own PyTorch or Detectron2 stays.'
	@echo '                                    make test PYTHON=/opt/conda/bin/python'
	@echo 'SYSTEM_PYTHON=...   makes .venv:    make setup SYSTEM_PYTHON=python3.12'

setup: $(STAMP)

# The stamp is the last thing written: a set-up that was interrupted is gone through again, in
# which pip skips what is complete.
$(STAMP): $(SETUP_INPUTS)
ifeq ($(strip $(PYTHON)),)
	@$(SYSTEM_PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 10) <= v < (3, 14) \
	else "make setup: $(SYSTEM_PYTHON) is Python %d.%d, but 3.10 to 3.13 is needed; name another with SYSTEM_PYTHON=." % v[:2])'
	@$(PY) -m pip --version >/dev/null 2>&1 || $(SYSTEM_PYTHON) -m venv .venv
else
	@command -v '$(PY)' >/dev/null || { echo "make setup: PYTHON=$(PY) is not an interpreter that can be run; give the path of one." >&2; exit 1; }
	@mkdir -p .cache
	@$(PY) -m pip list --format=freeze --exclude era-detectron2 >$(CONSTRAINTS)
endif
	@echo '== setup 1/3: PyTorch, a download of about 3 GB where it is missing'
	@$(PIP) install --disable-pip-version-check -c $(CONSTRAINTS) torch torchvision
	@echo '== setup 2/3: Detectron2 and what it needs'
	@$(subst -m pip,tools/install_detectron2.py,$(PIP)) --constraint $(CONSTRAINTS)
	@echo '== setup 3/3: this package, its tests, docs and deployment runtimes'
	@$(PIP) install --disable-pip-version-check --quiet -c $(CONSTRAINTS) -e '.[dev,deploy,docs,wandb,mlflow]'
	@$(PY) -W ignore -c 'import torch, torchvision, cv2, pycocotools.mask, pytest, detectron2.model_zoo' || \
	{ echo 'make setup: an installed package fails to import (see above); remove .venv, if you use it, and run make setup again.' >&2; exit 1; }
	@mkdir -p $(@D) && touch $@
	@echo '== setup done'

demo: setup
	@$(PY) tools/demo.py $(ARGS)

# All tests in as many processes as there are cores, at most four: each takes about 1.5 GB. A file stays in one process, for
# what its tests build together. With ARGS pytest is called as they say.
test: setup
	@$(PY) -m pytest $(or $(ARGS),-n auto --maxprocesses 4 --dist loadfile)

# Every warning fails it (mkdocs.yml). The variable silences an advertisement of the theme's.
docs: setup
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs --quiet build
	@echo 'Open site/index.html; the search needs a server: $(PY) -m http.server --directory site'

lint: setup
	@$(PY) -m ruff check projects tools tests configs/lazy
	@$(PY) -m ruff format --check projects tools tests configs/lazy

clean:
	@rm -rf .cache .pytest_cache .ruff_cache build dist site projects/ERA/build
	@find projects tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@find projects -name '*.egg-info' -type d -prune -exec rm -rf {} +
	@echo 'Removed caches and build files. Kept: output/ (your runs), datasets/ and .venv;'
	@echo 'remove those by hand if you want them gone.'
