# Two commands set everything up on a fresh machine: `make compare` and `make test`.
PYTHON ?= python3
DATA ?= curves
EPOCHS ?= 6
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A test and the benchmark's K-FAC need them; curvlinops' own requirements would bring torchvision, which nothing here uses.
PEERS := curvlinops-for-pytorch einconv einops linear_operator opt_einsum scipy tqdm

.PHONY: compare test lint types docs clean help

# `make` alone explains.
help:
	@echo "make compare             train the deep autoencoder with every method on generated CURVES data, print table and plots"
	@echo "make compare DATA=mnist  the same on MNIST (also fashion-mnist, usps); EPOCHS=10 sets the length"
	@echo "make test                the test suite"
	@echo "make lint types          ruff and mypy"
	@echo "make docs                the documentation as a site in site/"

compare: $(READY)
	$(BIN)/locobench compare --data $(DATA) --epochs $(EPOCHS) $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# -E: a page changes with the docstrings that it shows, too.
docs: $(READY)
	$(BIN)/sphinx-build -E -q -W --keep-going -c docs . site

# torch first and pinned: with that version pip finds a CPU build; an open range may fetch gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps $(PEERS)
	touch $@

clean:
	rm -rf $(VENV) build dist site
