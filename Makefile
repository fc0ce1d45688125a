# demo: the two jobs with the shipped models; test: the tests; lint: the linters; notebooks: executes them all; bench:
# timings. test-gpu and bench-gpu: those that need an NVIDIA GPU. All in .venv, made when missing.
PYTHON ?= python3
RUN := .venv/bin


.PHONY: demo test test-gpu lint notebooks bench bench-gpu clean

demo: .venv/installed
	$(RUN)/python examples/demo.py

test: .venv/tested  # models so small only lose by a second thread
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -q -n auto --dist loadfile

test-gpu: .venv/tested
	$(RUN)/python -m pytest -q -m gpu -n 8 --dist loadgroup

lint: .venv/tested
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

notebooks: .venv/tested
	for notebook in notebooks/*.ipynb; do $(RUN)/jupyter-execute --inplace $$notebook || exit; done

bench: .venv/tested
	cd benchmarks && ../$(RUN)/python kernels_cpu.py && ../$(RUN)/python fasta.py && ../$(RUN)/python classify.py

bench-gpu: .venv/tested
	for op in ssd selective_scan causal_conv1d rms_norm layers decode; do $(RUN)/python benchmarks/$$op.py || exit; done

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
