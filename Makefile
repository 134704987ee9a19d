# make setup: .venv with pinned packages and the engine built    make demo: compile the example and make a video
# make check: format, lint, types, layering                       make test: check, then every test

PYTHON ?= python3.11
BIN := .venv/bin
SOURCES := compiler evaluate models passes runtime targets

.PHONY: setup demo check test format bench-streaming sanitize

setup: .venv/ready

# torch goes first and alone: another package that asks for it would bring gigabytes that nothing here uses.
.venv/ready: constraints.txt requirements.txt pyproject.toml $(wildcard CMakeLists.txt runtime/engine/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -r requirements.txt
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

demo: setup
	@start=$$(date +%s); \
	$(BIN)/movdc compile examples/tiny.yaml -o out/tiny && \
	$(BIN)/movdc run out/tiny --prompt "a red circle moving down on a black background" --seed 8 -o out/tiny.mp4 && \
	echo "demo took $$(( $$(date +%s) - start )) s: look at out/tiny.png and out/tiny.mp4"

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@mkdir -p build/types/movdc
	@for folder in $(SOURCES); do ln -sfn $(CURDIR)/$$folder build/types/movdc/$$folder; done
	MYPYPATH=build/types $(BIN)/mypy $(foreach folder,$(SOURCES),-p movdc.$(folder))

test: check
	@start=$$(date +%s); $(BIN)/python -m pytest -q tests && echo "tests took $$(( $$(date +%s) - start )) s"

# on demand: the engine's tests with it built for ThreadSanitizer, then for AddressSanitizer; about 15 minutes
sanitize: setup
	test -d out/tiny || $(BIN)/movdc compile examples/tiny.yaml -o out/tiny
	tests/sanitize/run thread out/tiny
	tests/sanitize/run address out/tiny

# on demand: the engine's modes and other runtimes within half of the weights, about 17 GB in build/streaming
bench-streaming: setup
	$(BIN)/pip install -q -c constraints.txt -r benchmarks/requirements.txt
	$(BIN)/python benchmarks/streaming.py
	$(BIN)/python benchmarks/streaming.py --budget-sweep

format:
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
