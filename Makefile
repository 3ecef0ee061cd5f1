# Every target sets itself up in .venv; PYTHON picks the interpreter it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TOOLS := .venv-tools
PROSE := $(VENV)/.prose

.PHONY: demo test lint mutate bench demo-pair quality reproduce docs dist sbom audit clean

demo: $(READY)
	$(BIN)/python bench/demo.py

test: $(READY) lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -p no:benchmark

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Changes lines one at a time and looks whether a test notices; about half an hour, less where outcomes are kept.
mutate: $(READY)
	$(BIN)/python bench/mutate.py

bench: $(READY)
	$(BIN)/python bench/startup.py
	$(BIN)/python bench/attention.py
	$(BIN)/python bench/transfer.py
	$(BIN)/python bench/pair.py
	$(BIN)/python bench/aot.py
	$(BIN)/python bench/roofline.py
	$(BIN)/python -m pip install --quiet --no-deps --target .cache/peers pytorch-cka==1.1.3 torch-cka==0.21 airllm==4.0.0
	PEERS=.cache/peers $(BIN)/python -m pytest bench/test_kernels_cpu.py
	$(BIN)/python bench/loader.py
	$(BIN)/python bench/streaming.py
	$(BIN)/python bench/big.py
	$(BIN)/python bench/distill_memory.py

# Trains the two demo models, the adapter and the baselines again, about an hour on two cores.
demo-pair: $(PROSE)
	$(BIN)/python bench/demo_pair.py

# Several processes may run it at once on one work folder.
quality: $(PROSE)
	$(BIN)/python bench/quality.py

# Takes its pairs and baselines from the same folder as `quality`; several processes may run it at once.
reproduce: $(PROSE)
	$(BIN)/python bench/reproduce.py

# The documentation, in build/site; strict: a broken link or reference fails.
docs: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[docs]"
	PYTHONPATH=.:kernels/torch-ext $(BIN)/python -m mkdocs build --strict

# What is published: a source distribution, and the wheel that it builds.
dist: $(READY)
	rm -rf dist
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation -w dist dist/*.tar.gz

# What a release is made from and tested with, as CycloneDX; the tools have an environment of their own.
sbom: $(READY) $(TOOLS)/.ready
	mkdir -p dist
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o dist/sbom.cdx.json $(BIN)/python

# Known vulnerabilities of the installed packages; needs the advisories of PyPI.
audit: $(READY) $(TOOLS)/.ready
	$(BIN)/python -m pip check
	$(TOOLS)/bin/pip-audit --strict --path "$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")"

# The general text of the pairs is the prose of installed packages; this one is not needed otherwise.
$(PROSE): $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt einops
	touch $@

$(TOOLS)/.ready:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet cyclonedx-bom==7.5.0 pip-audit==2.10.1
	touch $@

# With LOCKED=1 every file is checked against its hash (Linux x86-64, CPython 3.11).
$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed; set PYTHON=...')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifdef LOCKED
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r requirements-locked.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
else
	$(BIN)/python -m pip install --quiet -c constraints.txt "setuptools>=77"
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[test,triton,plot]"
endif
	touch $(READY)

clean:
	rm -rf $(VENV) $(TOOLS) .cache build dist demo-out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
