# Two commands matter: make demo and make test. Each installs what it needs into .venv.
# make docs builds the pages of docs/ into site/; make reference writes those of docs/reference that follow from the code.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_DIR ?= runs/demo
STAMP := $(VENV)/.installed

.PHONY: setup demo test slurm check gpu gpu-dry reference docs screenshots wheel clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]" setuptools-scm wheel
	# The tests compare entity F1 with seqeval. Its setup.py needs setuptools-scm to be installed before.
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation --no-deps seqeval
	touch $@

demo: $(STAMP)
	$(BIN)/ptft pipeline demo --out $(DEMO_DIR) --launch cpu --processes 2
	$(BIN)/ptft generate $(DEMO_DIR)/ppo --prompt "What does os.path.join do?" --max-new-tokens 24

# Each process would compile all modules again.
unexport PYTHONDONTWRITEBYTECODE

# Three processes of one thread fill two cores, because tests of Slurm mostly wait. Tests that share a module's fixture
# stay together (tests/conftest.py, which also says which begin). PYTEST_ARGS="-n 0 tests/FILE.py" runs one file without
# the start of further processes.
test: $(STAMP) slurm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadgroup --no-loadscope-reorder $(PYTEST_ARGS)

# tests/slurm start a private cluster, and are skipped where its programs cannot be had. Installed are Debian's
# packages; they start no cluster by themselves.
slurm:
	@PATH="$$PATH:/usr/sbin:/sbin"; \
	have() { for name in "$$@"; do command -v "$$name" > /dev/null || return 1; done; }; \
	if have slurmctld slurmd sbatch munged shellcheck || ! have apt-get; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ]; then root="env"; elif have sudo && sudo -n true 2> /dev/null; then root="sudo env"; \
	else exit 0; fi; \
	echo "installing slurm-wlm, munge and shellcheck for tests of Slurm jobs"; \
	apt="$$root DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -qq -o DPkg::Lock::Timeout=60"; \
	{ $$apt update; $$apt install -y --no-install-recommends slurm-wlm munge shellcheck; } > /dev/null 2>&1 \
	|| echo "not installed: tests/slurm will be skipped"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# All that only a GPU can show, in at most 25 minutes on one card: writes docs/gpu.md and docs/gpu.json.
gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py --out docs

# The same at toy size on the CPU, which says nothing about a GPU; tests/test_gpu_dry.py runs it too.
gpu-dry: $(STAMP)
	$(BIN)/python benchmarks/gpu.py --dry --out build/gpu-dry

reference: $(STAMP)
	PYTHONPATH=docs $(BIN)/python -m reference_pages

docs: reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html, or serve it: python3 -m http.server -d site"

# Pictures of a real run for README.md. Needs Chromium; RUN=DIR takes a finished run instead of training one.
screenshots: $(STAMP)
	PYTHONPATH=docs $(BIN)/python -m reference_pages.screenshots $(RUN)

wheel: $(STAMP)
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
