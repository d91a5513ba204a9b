# Everything needs only Python 3.11, a C++ compiler and a package index. The venv and the data lie in the checkout,
# the mmcv wheel in ~/.cache/mdp_mmdet3d (built once per torch, Python and mmcv version).
VENV    ?= .venv
PYTHON  ?= python3.11
PY      := $(VENV)/bin/python
STAMP   := $(VENV)/.ready
NUSCENES_ROOT ?= data/nuscenes

.PHONY: setup prune prune-mini test test-fast lint clean
.DELETE_ON_ERROR:

setup: $(STAMP)

$(STAMP): requirements/lock.txt requirements/openmm.txt setup.py tools/build_mmcv.sh
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check 'pip<26'
	@echo "== torch"
	$(PY) -m pip install $$(grep -E '^(torch|torchvision|setuptools|wheel|ninja|psutil|numpy)==' requirements/lock.txt)
	@echo "== mmcv"
	wheel=$$(bash tools/build_mmcv.sh $(CURDIR)/$(PY)) && $(PY) -m pip install --no-deps "$$wheel"
	@echo "== locked requirements"
	$(PY) -m pip install -r requirements/lock.txt
	$(PY) -m pip install --no-deps -r requirements/openmm.txt
	$(PY) -m pip install --no-deps --no-build-isolation -e .
	touch $(STAMP)

# The miniature nuScenes stands in where the user has none.
$(NUSCENES_ROOT)/nuscenes_infos_val.pkl: | $(STAMP)
	if test -d $(NUSCENES_ROOT)/v1.0-mini; then $(PY) tools/create_infos.py $(NUSCENES_ROOT); \
	else $(PY) tools/create_mini_nuscenes.py $(NUSCENES_ROOT); fi

prune: $(STAMP) $(NUSCENES_ROOT)/nuscenes_infos_val.pkl
	$(PY) tools/prune.py configs/streampetr_mdp.py --budget 0.55

# The demo: a trained small StreamPETR, with accuracy before pruning, after it and after fine-tuning.
data/mini_easy/nuscenes_infos_val.pkl: | $(STAMP)
	$(PY) tools/create_mini_nuscenes.py data/mini_easy --easy

prune-mini: $(STAMP) data/mini_easy/nuscenes_infos_val.pkl
	$(PY) tools/prune.py configs/streampetr_mini_mdp.py

test: $(STAMP)
	$(PY) -m pytest

test-fast: $(STAMP)
	$(PY) -m pytest -m "not slow"

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf $(VENV) build *.egg-info work_dirs .pytest_cache .mypy_cache .ruff_cache .hypothesis
