# Everything runs in .venv, which the first target that needs it makes; constraints.txt pins what goes in.
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

OLDEST := .venv-oldest

.PHONY: demo test test-oldest lint bench bench-use bench-quick study docs wheel clean

demo: $(STAMP)  ## a few minutes: a calibrated and a unit-variance VAE on mnist-5k, then look at demo/
	$(PYTHON) -m examples.demo

test: $(STAMP) lint  ## linters, types, layers, then all tests, each file on a core
	$(PYTHON) -m pytest --numprocesses auto --dist loadfile

test-oldest:  ## all tests on Python 3.11 with the oldest dependencies that pyproject.toml allows
	python3.11 -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --constraint constraints-oldest.txt torch
	$(OLDEST)/bin/pip install --quiet --constraint constraints-oldest.txt --editable '.[test]'
	SCIPY_ARRAY_API=1 $(OLDEST)/bin/python -m pytest -W default --numprocesses auto --dist loadfile --ignore tests/test_studies_kept.py

constraints-oldest.txt: pyproject.toml  ## the lowest version of each direct dependency
	uv pip compile --quiet --resolution lowest-direct --python-version 3.11 --extra test --no-annotate \
		--no-emit-package sigma-vae --custom-compile-command 'make $@' --output-file $@ $<

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(PYTHON) -m benchmarks.house_rules

bench: $(STAMP)  ## speed on Fashion-MNIST beside pythae and the usual loop: hours on one core, goes on where it was stopped
	$(PYTHON) -m pip install --quiet --no-deps pythae==0.1.2
	$(PYTHON) -m pip install --quiet --constraint constraints.txt cloudpickle imageio pydantic scikit-learn scipy tqdm
	for part in plain images tiny elbo precision sooner; do $(PYTHON) -m benchmarks.speed --part $$part || exit 1; done

bench-use: $(STAMP)  ## what a user waits for: each command on seven data sets, against its budget; 15 minutes
	OMP_NUM_THREADS=1 $(PYTHON) -m benchmarks.use

AGAINST := HEAD
bench-quick: $(STAMP)  ## the working tree beside a commit (AGAINST=main), in five minutes
	$(PYTHON) -m benchmarks.quick --against $(AGAINST)

study: $(STAMP)  ## the smallest study: four runs on the digits, a table, a report
	$(VENV)/bin/sigma-vae study run smallest --out studies/smallest

docs: $(STAMP)  ## the documentation as a site, under site/
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(VENV)/bin/sphinx-build --fail-on-warning --quiet docs site

wheel: $(STAMP)  ## build the wheel, install it into an environment of its own without and with extras, and try it
	$(PYTHON) -m pip install --quiet --constraint constraints.txt build
	rm -rf dist
	$(PYTHON) -m build
	.ci/smoke dist/*.whl
	.ci/smoke dist/*.whl full

clean:
	rm -rf $(VENV) $(OLDEST) dist

# torch first and by its pinned version: an unpinned torch would fetch gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt torch
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[full,test]'
	touch $(STAMP)
