# Everything runs in a virtual environment of its own; the only needs are make and Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-extras test-long slow lint format docs notebooks notebooks-check bench clean

demo: $(VENV)/package
	$(BIN)/ancer-jax demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

# The tests that `make test` skips, because they need more than it installs: PyTorch, pictures, what reads notebooks.
test-extras: $(VENV)/extras
	NO_SKIPS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" tests/models/test_torch_import.py tests/test_torch.py tests/cli/test_networks.py tests/test_notebooks.py $(foreach page,torch tools,"tests/test_layers.py::test_the_examples_of_the_guides_run[$(page).md]")

# Of the slow tests, those of several processes, and in small all benchmarks that need nothing fetched.
test-long: $(VENV)/installed
	$(BIN)/python -m pytest -m slow tests/test_multihost.py
	$(BIN)/python -m pytest -n 2 -m slow tests/test_benchmarks.py

# Small versions of the large comparisons; minutes. The last installs PyTorch, and needs Python 3.11.
bench: $(VENV)/package
	$(BIN)/python -m benchmarks run cifar10 fashion-mnist-subset --small
	$(BIN)/python -m benchmarks run gpu --small
	$(BIN)/python -m benchmarks run peers --small

slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/extras
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m benchmarks render --check

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, into site/, without the network; the variable silences an advertisement.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Runs the notebooks from their text and stores them with their outputs.
notebooks: $(VENV)/notebooks
	$(BIN)/python notebooks/execute.py

# Only runs them: the stored ones stay as they are.
notebooks-check: $(VENV)/notebooks
	$(BIN)/python notebooks/execute.py --check

INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

$(VENV)/package: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) .
	touch $@

$(VENV)/installed: $(VENV)/package
	$(INSTALL) ".[dev]"
	touch $@

$(VENV)/notebooks: $(VENV)/package
	$(INSTALL) ".[notebooks]"
	touch $@

# What some tests skip without: PyTorch to compare with, real weights and pictures, what reads notebooks.
$(VENV)/extras: $(VENV)/installed
	$(INSTALL) ".[dev,torchax,pictures,notebooks]"
	touch $@

$(VENV)/docs: $(VENV)/package
	$(INSTALL) ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) .venv-test demo-l1 demo-l2 site
