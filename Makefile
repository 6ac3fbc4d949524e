# Everything a fresh machine needs: Python 3.11 or newer and make.
PYTHON ?= python3
BIN := .venv/bin
PROTOS := $(shell find protos -name '*.proto')

# The tests start many processes on few cores: a thread of torch that waits must not spin.
export OMP_WAIT_POLICY := PASSIVE
# Databases under test sync every commit to disk; a file system in memory, where there is a large one that lets
# scripts run, takes that wait away.
ROOMY := $(shell grep -qs ' /dev/shm .*noexec' /proc/mounts || df --output=avail -k /dev/shm 2>/dev/null | awk 'NR == 2 && $$1 > 4000000 {print "/dev/shm"}')

# How many tests run at a time.
WORKERS ?= 2

.PHONY: install demo test soak compose-test up down bench check lint types protos docs protos-check typescript clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[services,torch,dev]'
	touch $@

demo: install
	$(BIN)/tiltyard demo

# In the order of the folders: the long tests are in the first ones, and at the end no worker waits for another's.
test: install
	$(if $(ROOMY),PYTEST_DEBUG_TEMPROOT=$(ROOMY)) $(BIN)/python -m pytest -m "not soak and not compose" -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 15

soak: install
	$(BIN)/python -m pytest -m soak --timeout 7200

# The folder of an arena of containers, what it has beside compose.yaml (OVERLAYS="observability gpu"; left out: as the last
# time; none: nothing), and a folder of wheels for an engine that reaches no index.
ARENA ?= deploy/state
OVERLAYS ?=
WHEELS ?=

up: install
	$(BIN)/python -m deploy.arena $(ARENA) $(OVERLAYS:%=--overlay %) $(WHEELS:%=--wheels %)

down:
	ARENA=$(abspath $(ARENA)) deploy/arena down

compose-test: install
	$(BIN)/python -m pytest -m compose tests/compose -rs -x

bench: install
	$(BIN)/python -m benchmarks $(NAME)

# Stubs lie beside the code that imports them: protos/tiltyard/x/v1/y.proto becomes tiltyard/x/v1/y_pb2.py.
protos: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I protos \
	  --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. $(PROTOS)
	find tiltyard -path '*/v[12]' -type d -exec touch {}/__init__.py \;
	for d in type registry selector trainer validator inference; do touch tiltyard/$$d/__init__.py; done

# The reference, from the comments of the protos.
docs: install
	$(BIN)/python docs/reference.py

protos-check: protos docs
	git diff --exit-code --stat -- tiltyard docs/reference
	test -z "$$(git ls-files --others --exclude-standard tiltyard)"

lint: install
	$(BIN)/buf format -d --exit-code
	$(BIN)/buf lint
	if git describe --tags --abbrev=0 >/dev/null 2>&1; then \
	  $(BIN)/buf breaking --against ".git#tag=$$(git describe --tags --abbrev=0)"; fi
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

types: install
	$(BIN)/mypy

# The TypeScript client: its types, the shared vectors, and a whole task against an arena. Needs Node 20 and npm.
typescript: install
	cd clients/typescript && npm install --no-save --no-audit --no-fund && npm test

check: install protos-check lint types test

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
