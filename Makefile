# The two commands of the README, and what they need. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DONE := $(VENV)/.done

.PHONY: help setup train test test-tpu lint figures site lock clean
help:
	@echo "make train   set up and train the language model of experiments/lm.py"
	@echo "make test    set up and run all tests"
	@echo "make test-tpu  the same with the compiler of TPUs, which needs no TPU"
	@echo "make lint    set up and check format and lint"
	@echo "make figures  set up, draw all figures and write all generated pages anew"
	@echo "make site    set up and build the documentation into build/site"
	@echo "make lock    resolve requirements.lock and requirements-tpu.lock anew"
	@echo "make clean   remove the virtual environment and what was built"
	@echo "options: PYTHON=python3.12 VENV=.venv-3.12 TESTS='--thin tests/ops'"

setup: $(DONE)

$(DONE): pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip sync --quiet --python $(BIN)/python requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	touch $@

train: $(DONE)
	$(BIN)/jaxformers train experiments/lm.py

test: $(DONE)
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup $(TESTS)

# An environment of its own: with that compiler installed, JAX looks for TPUs.
test-tpu:
	$(MAKE) setup VENV=$(VENV)-tpu
	$(VENV)-tpu/bin/uv pip install --quiet --python $(VENV)-tpu/bin/python \
	  -r requirements-tpu.lock
	$(VENV)-tpu/bin/python -m pytest -q tests/aot tests/ops/recurrence/test_tpu.py

lint: $(DONE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# From committed results alone.
figures: $(DONE)
	$(BIN)/python scripts/draw_figures.py
	$(BIN)/python scripts/build_catalogue.py
	$(BIN)/python scripts/weak_scaling.py --draw
	$(BIN)/python scripts/pod_reports.py --tables

site: $(DONE)
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -q -W --keep-going -b html docs build/site

lock:
	uv pip compile --universal --generate-hashes --no-header --quiet \
	  --python-version 3.11 --extra dev pyproject.toml -o requirements.lock
	echo 'jax[tpu]' | uv pip compile - --universal --generate-hashes --no-header \
	  --quiet --python-version 3.11 --constraint requirements.lock \
	  -o requirements-tpu.lock

clean:
	rm -rf $(VENV) build
