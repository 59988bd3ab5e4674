# One target per job; each sets up what it needs first. `make help` lists them.
#
#   TORCH=cpu|cu130|auto ...   take PyTorch from its own index, in the build of that name, instead of
#                              the default one; export it, so that every target sees the same

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.ONESHELL:
MAKEFLAGS += --no-print-directory

PYTHON ?= $(shell command -v python3.11 || command -v python3)
SEED ?= 1
DATA ?= $(INSTRUCTLOOP_DATA)
SUITE ?=
PORT ?= 9092
ARGS ?=

UV_VERSION := 0.13.8
UV := .uv/bin/uv
RUN := .venv/bin/python
CODE := contracts serving feedback training instructloop demo benchmarks
HELM := .helm/helm
HELM_VERSION := v3.18.4
KUBERNETES_VERSION := v1.34.4
MAVEN_COPY := org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies
READY := .venv/.ready$(if $(TORCH),-$(TORCH))
COMPILE = pip compile pyproject.toml --group dev --python-version 3.11 --no-annotate --no-header --quiet
PROTOC := $(RUN) -m grpc_tools.protoc -Iproto

.PHONY: help setup demo e2e kafka helm test chromium kafkajars kcat redis spark sqlite3 helmparts check format lint types imports schema proto docs lock bench bench-gpu clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## make the environment in .venv from requirements.lock
	@:

demo: setup ## one whole round on simulated people (SEED=1)
	@exec $(RUN) -m demo --seed $(SEED)

e2e: setup ## the same round on real rankings (DATA=folder)
	@[ -n "$(DATA)" ] || { echo "make e2e needs DATA=folder: see README, Real input" >&2; exit 2; }
	@exec .venv/bin/instructloop loop --config demo/e2e.toml --data "$(DATA)"

kafka: setup kafkajars ## run a Kafka broker on this machine until Ctrl-C (PORT=9092)
	@exec $(RUN) -m demo.broker $(PORT)

test: setup chromium kafkajars kcat redis spark sqlite3 helmparts ## every test, on a real vLLM engine, browser and Kafka too (ARGS="-k swap")
	@exec $(RUN) -m pytest $(ARGS)

helm: helmparts ## lint the chart in helm/ and render it with each of its examples
	@[ -x $(HELM) ] || { echo "make helm needs Go, with which it builds helm" >&2; exit 1; }
	@for values in helm/examples/*.yaml; do
	  $(HELM) lint --strict --quiet --kube-version $(KUBERNETES_VERSION) -f "$$values" helm
	  rendered=$$($(HELM) template instructloop helm --kube-version $(KUBERNETES_VERSION) -f "$$values")
	  echo "$$values: $$(grep -c '^kind:' <<<"$$rendered") objects"
	done

check: lint types imports schema ## format, lint, types, imports and event schema

format: setup ## rewrite the code in its format
	@.venv/bin/ruff format .
	@.venv/bin/ruff check --fix .

proto: setup ## generate contracts/v1 from proto/
	@$(PROTOC) --python_out=. --pyi_out=. proto/contracts/v1/events.proto

docs: setup ## generate docs/parity.md and the settings in docs/configuration.md
	@$(RUN) -m tests.docs.pages

lock: setup ## resolve requirements.lock anew from pyproject.toml
	@$(UV) $(COMPILE) --upgrade -o requirements.lock
	@$(MAKE) setup

bench: setup kafkajars ## measure one suite into benchmarks/results (SUITE=name; QUICK=1 for a short form)
	@exec $(RUN) -m benchmarks $(SUITE)

bench-gpu: ## measure kernels and training on a GPU
	@$(MAKE) bench SUITE=gpu

clean: ## remove what was made, but for runs/
	rm -rf .venv .uv .helm .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis test-artifacts
	find $(CODE) tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The parts of `make check`.

lint: setup
	@.venv/bin/ruff format --check --quiet . || { echo "not in format: run make format" >&2; exit 1; }
	@.venv/bin/ruff check .

types: setup
	@.venv/bin/mypy $(CODE) tests

imports: setup
	@found=$$(.venv/bin/lint-imports 2>&1) || { echo "$$found" >&2; exit 1; }
	tail -n 1 <<<"$$found"

# A change of the schema is compared with the commit that it is built on: where this branch left
# main or, on main itself, the commit before.
schema: setup
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT
	$(PROTOC) --python_out="$$fresh" --pyi_out="$$fresh" proto/contracts/v1/events.proto
	diff -rq "$$fresh/contracts/v1" contracts/v1 -x __init__.py -x __pycache__ || \
	  { echo "contracts/v1 is not what proto/ says: run make proto" >&2; exit 1; }
	.venv/bin/buf lint proto
	head=$$(git rev-parse -q --verify HEAD || true)
	base=$$(git merge-base HEAD origin/main 2>/dev/null || true)
	[ -n "$$base" ] && [ "$$base" != "$$head" ] || base=$$(git rev-parse -q --verify HEAD^ || true)
	if [ -n "$$base" ] && git cat-file -e "$$base:proto" 2>/dev/null; then
	  git archive "$$base" proto | tar -x -C "$$fresh"
	  .venv/bin/buf breaking proto --against "$$fresh/proto"
	else
	  echo "schema: no earlier commit to compare with"
	fi

# What the targets stand on.

$(READY): requirements.lock | .uv/$(UV_VERSION)
	@echo "setting up .venv (Python 3.11; downloads a few GB the first time)"
	@$(UV) venv --quiet --allow-existing --python 3.11 .venv
	@rm -f .venv/.ready*
	@$(if $(TORCH),$(UV) $(COMPILE) --torch-backend $(TORCH) -c requirements.lock -o .venv/requirements.txt)
	@$(UV) pip sync --python $(RUN) $(if $(TORCH),--torch-backend $(TORCH) .venv/requirements.txt,requirements.lock)
	@$(UV) pip install --quiet --python $(RUN) --no-deps --no-build-isolation --editable .
	@touch $@

.uv/$(UV_VERSION):
	@rm -rf .uv
	@$(PYTHON) -m venv .uv || { echo "no Python with venv: install python3.11 and python3.11-venv" >&2; exit 1; }
	@.uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@touch $@

# For the tests of the Playground, of Kafka, of limits over several replicas, of a backup and of the chart, and for `make kafka`. What cannot
# be had is gone without: its tests are skipped then, and fail where CI=true.
chromium kcat sqlite3:
	@command -v $@ >/dev/null || $(call apt,$@)

spark: setup
	@$(RUN) -c "import pyspark" 2>/dev/null || $(UV) pip install --quiet --python $(RUN) "pyspark==4.3.0" || \
	  echo "pyspark could not be installed; going on without"
	command -v java >/dev/null || $(call apt,openjdk-17-jre-headless)

redis:
	@command -v redis-server >/dev/null || $(call apt,redis-server)

# helm, built by Go (without optimising, which takes longer than it saves), and what a Kubernetes takes, from its own sources.
helmparts:
	@[ ! -x $(HELM) ] || exit 0
	command -v go >/dev/null || { echo "no Go to build helm; going on without"; exit 0; }
	echo "building helm $(HELM_VERSION)"
	mkdir -p .helm
	parts=$$(mktemp -d) && trap 'rm -rf "$$parts"' EXIT
	{ cd .helm && go mod download -json k8s.io/kubernetes@$(KUBERNETES_VERSION) >"$$parts/kubernetes.json" && \
	  cp -f "$$(sed -n 's/^\t"Dir": "\(.*\)",$$/\1/p' "$$parts/kubernetes.json")/api/openapi-spec/swagger.json" . && \
	  GOBIN="$$parts" go install -trimpath -ldflags "-s -w" -gcflags "all=-N -l" helm.sh/helm/v3/cmd/helm@$(HELM_VERSION) && \
	  mv "$$parts/helm" helm; } >"$$parts/log" 2>&1 || { tail -n 5 "$$parts/log"; echo "helm could not be built; going on without"; }

kafkajars: .kafka/classes.jsa

.kafka/classes.jsa: demo/kafka-pom.xml | $(READY)
	@rm -rf .kafka/jars
	command -v java >/dev/null || $(call apt,openjdk-17-jre-headless)
	command -v mvn >/dev/null || $(call apt,maven)
	if command -v java >/dev/null && command -v mvn >/dev/null; then
	  echo "fetching Kafka"
	  mvn -q -B -f $< $(MAVEN_COPY) -DoutputDirectory="$$PWD/.kafka/jars" >.kafka.log || \
	    { cat .kafka.log; rm -rf .kafka/jars; }
	  rm -f .kafka.log
	  if [ -d .kafka/jars ]; then $(RUN) -m demo.broker --archive; fi
	fi
	[ -d .kafka/jars ] || echo "Kafka could not be fetched (it needs java and mvn); going on without"

apt = { echo "installing $(1)"; export DEBIAN_FRONTEND=noninteractive; \
  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends $(1); } \
      </dev/null >/dev/null 2>&1; then :; else echo "$(1) could not be installed; going on without"; fi; }
