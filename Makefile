# `make demo` and `make test` need nothing but Python 3.11 or newer and make: both set up their environment first.
VENV ?= .venv
SYSTEM_PYTHON ?= python3
PEERS_VENV ?= .peers-venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: help setup demo wheel test test-slow test-java test-gpu test-peers peers-env lint types imports check

help:
	@echo "make setup    install into $(VENV) (choose another with VENV=DIR, another Python with SYSTEM_PYTHON=PATH)"
	@echo "make demo     caption, classify and find the photographs in demo/photos; draws demo/output/contact_sheet.png"
	@echo "make wheel    build the wheel in dist/"
	@echo "make test     all tests that need no GPU, no Java and no other projects"
	@echo "make test-peers  ours against other projects' models, in an environment of its own ($(PEERS_VENV))"
	@echo "make test-slow  those that take minutes each"
	@echo "make check    make test, and also lint, types and imports"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(SYSTEM_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make $(MAKECMDGOALS) SYSTEM_PYTHON=PATH" >&2; exit 1; }
	$(SYSTEM_PYTHON) -m venv $(VENV)
	@echo '*' > $(VENV)/.gitignore
	$(PYTHON) -m pip install --disable-pip-version-check --no-input --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(PYTHON) demo/demo.py

# What an earlier build left would get into the wheel.
wheel:
	rm -rf build
	$(SYSTEM_PYTHON) -m pip wheel --disable-pip-version-check --no-input --quiet --no-deps --wheel-dir dist .

test: setup
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not java and not peers and not gpu and not slow"

# Minutes each: full-size networks, many kills, a simulated object store.
test-slow: setup
	$(PYTHON) -m pip install --disable-pip-version-check --quiet -c constraints.txt "moto[s3,server]>=5" "s3fs>=2024.6"
	$(PYTHON) -m pytest -m "slow and not java and not peers and not gpu"

# What only a CUDA device can show.
test-gpu: setup
	$(PYTHON) -m pytest -m "gpu"

# METEOR, and our caption metrics against pycocoevalcap's.
test-java: setup
	$(PYTHON) -m pip install --disable-pip-version-check --no-input --quiet -c constraints.txt -e '.[coco-metrics]'
	$(PYTHON) -m pytest -m "java and not peers and not gpu" $$(grep -rl --include='test_*.py' 'mark\.java' tests)

# Other projects' models against ours, in an environment of their own, with other versions of what all other tests import.
test-peers: $(PEERS_VENV)/.installed
	$(PEERS_VENV)/bin/python -m pytest -n 2 -m "peers and not java and not gpu" $$(grep -rl --include='test_*.py' 'mark\.peers' tests)

peers-env: $(PEERS_VENV)/.installed

$(PEERS_VENV)/.installed: $(STAMP) scripts/make_peers_env.sh
	rm -rf $(PEERS_VENV)
	scripts/make_peers_env.sh $(PEERS_VENV) $(PYTHON)
	@touch $@

lint: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

types: setup
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV)/bin/pyright --pythonpath $(PYTHON)

imports: setup
	$(VENV)/bin/lint-imports

check: test lint types imports
