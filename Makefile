# Everything a newcomer or a CI machine runs. It needs python3 (3.11 or newer, with venv) and make; what else is
# needed is installed into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo calibrate-demo test pytest cover slow chaos attacks matrix fuzz stateful gpu gpu-kit browser ray lint format docs clean

help: ## Say what can be made
	@sed -n 's/^\([a-z][a-z-]*\):.*## /\1|/p' Makefile | while IFS='|' read -r name text; do \
		printf '  make %-15s %s\n' "$$name" "$$text"; done

# The environment is made again when what it is made from has changed.
$(INSTALLED): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " \
		+ sys.version.split()[0] + "; name one with: make PYTHON=python3.12")'
	@echo "installing into $(VENV); the first time this fetches PyTorch and takes minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## Export and build the shipped digits model, make digits with it
	$(BIN)/tc-deploy export calibration/digits -o engines/digits
	$(BIN)/tc-deploy build engines/digits
	$(BIN)/python examples/digits_demo.py

calibrate-demo: $(INSTALLED) ## Make the digits model's plan again (it is committed)
	$(BIN)/tc-deploy calibrate calibration/recipes/digits.toml -o calibration/digits

test: $(INSTALLED) ## Check the style, the types and the imports, and run the tests beside that
	@$(MAKE) --no-print-directory --keep-going --jobs 2 lint pytest

# A file's tests share bundles that take long to make, so a file stays in one process. As collected: sorted by their number
# of tests the few slow ones of search would come last, and leave the other process idle.
pytest: $(INSTALLED)
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# What only a GPU runs is left out, by the list in pyproject.toml.
cover: $(INSTALLED) ## Print which lines of tc_deploy the tests run, and which not
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --cov --cov-report term-missing:skip-covered

slow: $(INSTALLED) ## Run the tests that take long
	$(BIN)/pytest -m slow --hypothesis-profile thorough

chaos: $(INSTALLED) ## Kill every command where it writes, race it, fill its disk; KILLS=1000 for more
	RELIABILITY_RECORD=1 CHAOS_KILLS=$(or $(KILLS),300) $(BIN)/pytest -m chaos tests/chaos

attacks: $(INSTALLED) ## Flip, cut, swap and forge what a plan folder and a bundle hold
	RELIABILITY_RECORD=1 $(BIN)/pytest -m "" tests/attacks

matrix: $(INSTALLED) ## Give every option and argument of every command bad values
	RELIABILITY_RECORD=1 $(BIN)/pytest -m matrix tests/cli

# Without atheris hypothesis does the same, blindly. FUZZ_SECONDS is the time for each parser.
fuzz: $(INSTALLED) ## Feed every parser documents at random, a minute each
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[fuzz]' \
		|| echo "atheris does not install here: hypothesis makes the documents"
	RELIABILITY_RECORD=1 $(BIN)/pytest -m fuzz tests/fuzz

SEQUENCES ?= 2000
stateful: $(INSTALLED) ## Let runs stop, start and take turns at random, in SEQUENCES sequences
	RELIABILITY_RECORD=1 TC_DEPLOY_SEQUENCES=$(SEQUENCES) $(BIN)/pytest -s tests/test_diffusers_state.py

gpu-kit: $(INSTALLED) ## Pack what a bare machine with a GPU needs to measure there, into .gpu-kit
	PYTHONPATH=. $(BIN)/python tests/gpu/kit.py .gpu-kit $(if $(EMOJI),--emoji $(EMOJI))

gpu: $(INSTALLED) ## Run the tests that need an NVIDIA GPU
	$(BIN)/pytest -m gpu tests/gpu

# The system's own Chromium is taken where there is one; CONTRIBUTING.md says how to get it.
browser: $(INSTALLED) ## Run the tests that open the report in a browser
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[browser]'
	@test -n "$$BROWSER_PATH" || command -v chromium || command -v chromium-browser || command -v google-chrome \
		|| $(BIN)/playwright install chromium
	$(BIN)/pytest -m browser

# Some hundred MB, so it is no part of the environment until somebody asks for it.
ray: $(INSTALLED) ## Run the tests that need Ray: replicas that are killed, rows that are spread
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[ray]'
	$(BIN)/pytest -m ray tests/scale

lint: $(INSTALLED) ## Check the style, the types and the imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## Rewrite the code in the house style
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: $(INSTALLED) ## Write docs/cli.md from what the commands declare
	$(BIN)/python tests/cli/page.py

clean: ## Remove caches and the demo's engines, not the environment
	rm -rf engines/digits engines/digits-demo.png engines/digits-demo.json dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find tc_deploy tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
