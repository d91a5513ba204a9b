# Everything needs only Python 3.11, a C++ compiler and a package index. The venv and the data lie in the checkout,
# the mmcv wheel in ~/.cache/mdp_mmdet3d (built once per torch, Python and mmcv version).
VENV    ?= .venv
PYTHON  ?= python3.11
PY      := $(VENV)/bin/python
STAMP   := $(VENV)/.ready
LOG     := $(VENV)/setup.log
STEP    := bash tools/step.sh $(LOG)
export PIP_DISABLE_PIP_VERSION_CHECK = 1
NUSCENES_ROOT ?= data/nuscenes

.PHONY: setup prune prune-mini test test-numerics test-solver-versions test-fast lint docs clean
.DELETE_ON_ERROR:

setup: $(STAMP)

$(STAMP): requirements/lock.txt requirements/openmm.txt setup.py tools/build_mmcv.sh
	@echo "setting up $(VENV); what the steps print goes to $(LOG)"
	@$(PYTHON) -m venv $(VENV) && : > $(LOG)
	@$(STEP) "pip" $(PY) -m pip install 'pip<26'
	@$(STEP) "torch" $(PY) -m pip install $$(grep -E '^(torch|torchvision|setuptools|wheel|ninja|psutil|numpy)==' requirements/lock.txt)
	@$(STEP) "mmcv (built once per machine)" bash tools/build_mmcv.sh $(CURDIR)/$(PY)
	@$(STEP) "mmcv, installed" $(PY) -m pip install --no-deps "$$(bash tools/build_mmcv.sh $(CURDIR)/$(PY) 2>/dev/null)"
	@$(STEP) "locked requirements" $(PY) -m pip install -r requirements/lock.txt
	@$(STEP) "OpenMMLab, TensorRT-RTX" $(PY) -m pip install --no-deps -r requirements/openmm.txt
	@$(STEP) "mdp_mmdet3d" $(PY) -m pip install --no-deps --no-build-isolation -e .
	@touch $(STAMP)

# The miniature nuScenes stands in where the user has none.
$(NUSCENES_ROOT)/nuscenes_infos_val.pkl: | $(STAMP)
	@if test -d $(NUSCENES_ROOT)/v1.0-mini; then $(PY) tools/create_infos.py $(NUSCENES_ROOT); \
	else $(PY) tools/create_mini_nuscenes.py $(NUSCENES_ROOT); fi

prune: $(STAMP) $(NUSCENES_ROOT)/nuscenes_infos_val.pkl
	$(PY) tools/prune.py configs/streampetr_mdp.py --budget 0.55

# The demo: a trained small StreamPETR, with accuracy before pruning, after it and after fine-tuning.
data/mini_easy/nuscenes_infos_val.pkl: | $(STAMP)
	$(PY) tools/create_mini_nuscenes.py data/mini_easy --easy

prune-mini: $(STAMP) data/mini_easy/nuscenes_infos_val.pkl
	$(PY) tools/prune.py configs/streampetr_mini_mdp.py

# A file at a time on each of two workers; one thread each, as there are two processors.
TEST_WORKERS ?= 2
test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

# What compares engines, runs or recorded numbers, once more as the plainest processor computes, on one thread and two.
PLAIN := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41
test-numerics: $(STAMP)
	OMP_NUM_THREADS=1 $(PLAIN) $(PY) -m pytest -q -m numerics
	OMP_NUM_THREADS=2 $(PLAIN) $(PY) -m pytest -q -m "numerics and not slow"

# The solver alone with the oldest and the newest PySCIPOpt: numpy 2, no torch, in venvs of their own.
SOLVER_VENV  ?= .venv-solver
SCIP_OLDEST  := $(shell sed -n 's/.*"pyscipopt>=\([0-9.]*\)".*/\1/p' setup.py)
SOLVER_TESTS := tests/solver/test_solver_scip.py tests/solver/test_solver_negative.py tests/solver/test_solver_problem.py
$(SOLVER_VENV)-oldest/.ready: SCIP := pyscipopt==$(SCIP_OLDEST)
$(SOLVER_VENV)-newest/.ready: SCIP := pyscipopt>=$(SCIP_OLDEST)
$(SOLVER_VENV)-%/.ready: setup.py
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q --upgrade 'numpy>=2' '$(SCIP)' pytest pytest-timeout
	touch $@

test-solver-versions: $(SOLVER_VENV)-oldest/.ready $(SOLVER_VENV)-newest/.ready
	for venv in $(^D); do $$venv/bin/pip list 2>/dev/null | grep -iE '^(numpy|pyscipopt) ' && \
	$$venv/bin/python -m pytest -q --confcutdir tests/solver $(SOLVER_TESTS) || exit 1; done

test-fast: $(STAMP)
	$(PY) -m pytest -m "not slow"

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# The site, in a venv of its own (a minute, once); every warning is an error.
DOCS_VENV ?= .venv-docs
$(DOCS_VENV)/.ready: requirements/docs.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install -q -r requirements/docs.txt
	touch $@

docs: $(DOCS_VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) $(DOCS_VENV) $(SOLVER_VENV)-oldest $(SOLVER_VENV)-newest site build *.egg-info work_dirs .pytest_cache .mypy_cache .ruff_cache .hypothesis
