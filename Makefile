# demo: the two jobs with the shipped models; test: the tests; lint: the linters. All in .venv, made when missing.
PYTHON ?= python3
RUN := .venv/bin


.PHONY: demo test lint bench clean

demo: .venv/installed
	$(RUN)/python examples/demo.py

test: .venv/tested
	$(RUN)/python -m pytest -q

lint: .venv/tested
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

bench: .venv/tested
	cd benchmarks && ../$(RUN)/python kernels_cpu.py && ../$(RUN)/python fasta.py && ../$(RUN)/python classify.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(RUN)/python -m pip install -qq --disable-pip-version-check --editable .
	touch $@

.venv/tested: pyproject.toml | .venv/bin/python
	$(RUN)/python -m pip install -qq --disable-pip-version-check --editable ".[test]"
	touch $@ .venv/installed

clean:
	rm -rf .venv demo build *.egg-info
