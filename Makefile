# Everything a newcomer needs, on a machine with nothing but Python 3.11+ and make.
# All paths are relative, so the folder may have any name, spaces included.

PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
OLDEST := .venv-oldest
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-clients test-oldest test-pythons soak check clients docs bench-accuracy bench-executors bench-grpc bench-kernels bench-learning bench-loading bench-loop bench-pythons bench-service bench-serving bench-sources bench-training clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed ## train a classifier of handwritten digits from image files, and try it
	@$(VENV)/bin/asynctrain demo

test: $(VENV)/.installed-dev ## run the test suite
	$(RUN) -m pytest

test-oldest: $(OLDEST)/.installed ## run the test suite on the oldest supported release of each dependency
	$(OLDEST)/bin/python -m pytest $(TESTS)

test-pythons: $(RUN) ## run the test suite on each other supported Python that is found here (TESTS=tests/nn: a part of it)
	@$(RUN) scripts/pythons.py $(TESTS)

soak: $(VENV)/.installed-dev ## run the long tests, in at most an hour (SOAK=quick: in some minutes)
	SOAK='$(SOAK)' $(RUN) -m pytest -m soak -rP
	test '$(SOAK)' = quick || $(RUN) -m pytest -m one_loop --other-loop

clients: ## install what the example clients in Node and Go need
	@sh scripts/install_clients.sh

test-clients: $(VENV)/.installed-dev clients ## run the example clients in Node and Go against the service
	$(RUN) -m pytest -m soak -rP tests/clients

check: $(VENV)/.installed-dev ## lint, formatting and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

docs: $(VENV)/.installed-docs ## build the documentation into site/, strictly
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet
	@echo "the documentation is in site/index.html"

bench-accuracy: $(VENV)/.installed-bench $(PEERS)/.installed ## compare what the trainings of bench-training reach, over many seeds
	$(RUN) -m benchmarks.training --accuracy

bench-executors: $(VENV)/.installed-dev ## measure what it costs to compute in other processes
	$(RUN) -m benchmarks.executors

bench-grpc: $(VENV)/.installed-bench ## measure what gRPC costs workers, and how fast the training service takes images in
	$(RUN) -m benchmarks.grpc

bench-kernels: $(VENV)/.installed-bench $(PEERS)/.installed ## time training steps and predictions beside PyTorch, JAX and others
	$(RUN) -m benchmarks.kernels

bench-learning: $(VENV)/.installed-bench $(PEERS)/.installed ## train on digits and photos, side by side with PyTorch (wants ASYNCTRAIN_DATA)
	$(RUN) -m benchmarks.learning

bench-loading: $(VENV)/.installed-bench $(PEERS)/.installed ## load images side by side with PyTorch's DataLoader and SPDL
	$(RUN) -m benchmarks.loading

bench-loop: $(VENV)/.installed-dev $(PEERS)/.installed ## measure how late a heartbeat in the same event loop gets while training
	$(RUN) -m benchmarks.loop

bench-pythons: $(VENV)/.installed-dev ## measure how decoding and training scale on each Python that test-pythons has found
	$(RUN) -m benchmarks.pythons

bench-service: $(VENV)/.installed-dev $(PEERS)/.installed ## put a web service that trains beside the same one on PyTorch
	$(RUN) -m benchmarks.service

bench-serving: $(VENV)/.installed-dev ## measure what twenty predictions a second cost the training they are made beside
	$(RUN) -m benchmarks.serving

bench-sources: $(VENV)/.installed-dev ## measure how near the loader comes to the rate of slow sources
	$(RUN) -m benchmarks.sources

bench-training: $(VENV)/.installed-bench $(PEERS)/.installed ## train from image files, in whole processes, side by side with PyTorch (wants ASYNCTRAIN_DATA)
	$(RUN) -m benchmarks.training

clean: ## remove the environment and the caches; runs/ stays
	rm -rf $(VENV) $(VENV)-* build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -type d -name __pycache__ -prune -exec rm -rf {} +

# The environment. A stamp is newer than pyproject.toml once what that asks for is installed.

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "asynctrain needs Python 3.11 or newer, and $(PYTHON) is %d.%d: call make with PYTHON=python3.12, say" % sys.version_info[:2])'
	@echo "creating $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade 'pip>=25.1' # the first that knows --group

$(VENV)/.installed: pyproject.toml | $(RUN)
	@echo "installing asynctrain into $(VENV) ..."
	@$(PIP) --editable '.[cli]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(RUN)
	@echo "installing asynctrain and its development tools into $(VENV) ..."
	@$(PIP) --editable '.[cli]' --group dev
	@touch $@ $(VENV)/.installed

$(OLDEST)/.installed: pyproject.toml scripts/oldest.py | $(RUN)
	@echo "installing the oldest supported releases into $(OLDEST) ..."
	@$(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(RUN) scripts/oldest.py > $(OLDEST)/constraints.txt
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt \
		--editable '.[cli]' --group dev
	@touch $@

$(VENV)/.installed-docs: pyproject.toml $(VENV)/.installed-dev
	@echo "installing what the documentation is built with ..."
	@$(PIP) --group docs
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed-dev
	@echo "installing what the benchmarks need besides ..."
	@$(PIP) --editable '.[fast,plot]'
	@touch $@

# What the benchmarks compare with has an environment of its own; where it cannot be had, they say what they leave out.
$(PEERS)/.installed: benchmarks/peers.txt
	@echo "installing what the benchmarks compare with into $(PEERS) ..."
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers.txt && touch $@ \
		|| echo "some peers could not be installed; the benchmarks leave them out"
