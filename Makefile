PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DATABASE := outputs/mlflow/mlflow.db

# Two workers with a thread each: more would wait for each other. Files begin in their order, the long
# ones not last. Freed memory is kept: to give it back and to have it cleared again is a tenth of the time.
KEPT := MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=1000000000
PYTESTS := OMP_NUM_THREADS=1 $(KEPT) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20

.PHONY: demo test test-all lint bench ui clean conf/README.md

demo: $(INSTALLED)
	$(BIN)/python -m pipeline

test: $(INSTALLED)
	$(PYTESTS) -m "not real and not slow" $(PYTEST)

test-all: $(INSTALLED)
	$(PYTESTS) $(PYTEST)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks

conf/README.md: $(INSTALLED)
	$(BIN)/python conf/document.py

ui: $(INSTALLED)
	@mkdir -p outputs/mlflow
	@echo "sweeps: http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey=runs"
	@echo "charts: http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey=energy"
	-@$(BIN)/python -m pipeline relocate
	MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
	  $(BIN)/mlflow ui --backend-store-uri sqlite:///$(DATABASE) \
	  --default-artifact-root outputs/mlflow/artifacts --workers 1

# Exact versions from constraints.txt; torch first, so that nothing else chooses its build.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .[dev,joblib]
	@touch $(INSTALLED)

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache
