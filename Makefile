# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS := build/docs-venv/.ready

.PHONY: demo test test-all test-gpu bench-gpu smoke-gpu lint format house reference docs bench clean

demo: $(READY)
	$(BIN)/latentddae demo $(ARGS)

test: $(READY) # a file at a time in each of two processes; tests start ranks of their own
	$(BIN)/pytest -q -n 2 --dist loadfile -m "not slow" $(ARGS)

test-all: $(READY)
	$(BIN)/pytest -q $(ARGS)

test-gpu: $(READY) # on a machine with a GPU; the other tests see none
	$(BIN)/pytest -q -m gpu $(ARGS)

bench-gpu: $(READY) # rows go to benchmarks/results_gpu.json; ARGS="train-xl --budget 300"
	$(BIN)/python benchmarks/gpu.py $(ARGS)

smoke-gpu: $(READY) # both with tiny shapes on the CPU, to try the tests and benchmarks themselves
	SMOKE=1 $(BIN)/pytest -q tests/gpu
	SMOKE=1 $(BIN)/python benchmarks/gpu.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

house: $(READY) # what the house limits, counted; ARGS=-v lists every offender
	$(BIN)/python tests/house.py $(ARGS)

reference: $(READY) # docs/reference and the listings of docs/data.md from the code
	$(BIN)/python docs/generate_reference.py
	$(BIN)/python docs/generate_listings.py

docs: $(DOCS) # the site, into build/site; a broken link is an error
	$(dir $(DOCS))bin/zensical build --strict --clean

bench: $(READY)
	@for script in $(filter-out benchmarks/harness.py benchmarks/plain_dit.py benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do \
		echo "== $$script"; $(BIN)/python $$script || exit 1; done

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --editable '.[dev,demo]'
	touch $@

# A venv of its own: the site generator needs nothing of the package, and the package nothing of it.
$(DOCS): pyproject.toml
	$(PYTHON) -m venv $(dir $(DOCS))
	$(dir $(DOCS))bin/python -m pip install -qq "$$($(PYTHON) -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')"
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info .cache .pytest_cache .ruff_cache .mypy_cache
