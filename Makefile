# Two commands do everything: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# Another wheel index for torch, such as PyTorch's CPU one: make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
BIN := $(VENV)/bin
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
.PHONY: quickstart test test-all lint docs clean

quickstart: $(VENV)/installed  ## SFT, reward model and ReMax on embedded data; about five minutes
	$(BIN)/python scripts/quickstart.py

test: $(VENV)/installed  ## the first tier and the doctests: no network, under ten CPU minutes
	$(BIN)/pytest -n 2 --dist loadfile -m "not long"

test-all: $(VENV)/installed  ## both tiers; PARTS="-k word" runs a part
	$(BIN)/pytest $(PARTS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed  ## the pages as a site in build/site; a warning is an error
	$(BIN)/python -m pip install --quiet $(INDEX) --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(INDEX) --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info
