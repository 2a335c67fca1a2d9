# Thin: what is more than one line stands in Python, and so does caching.
# `make` lists the targets; `make demo` is all that a fresh clone needs.

PYTHON ?= python3
MODEL  ?= demo
OUT    ?= engines
ORT    ?= cpu
# Also understood: PLAN TARGET PRECISION CALIB KEEP_FLOAT NAME WEIGHTS REVISION CONTEXT BUILD_MEMORY IMAGE_TOKENS CANVAS, DUMMY=1, OFFLINE=1; TESTS and GPU_PYTHON (of `make test`);
# DATA SAMPLES LOSE COST HOLDOUT CANDIDATES SELECTORS NO_ENTRY (of `make calibrate`, some of `make compare`);
# of `make setup`: PIP_OPTIONS, such as an index with a CPU build of torch; ORT=gpu, ONNX Runtime for an NVIDIA GPU.

VENV := .venv
BIN  := $(VENV)/bin
PICTURE  := demo/pictures/scene-3.png
QUESTION := In which corner is the red object?

IMAGES = $(if $(IMAGE_TOKENS),--image-tokens "$(IMAGE_TOKENS)") $(if $(CANVAS),--canvas "$(CANVAS)")

ENGINES = --model "$(MODEL)" --out "$(OUT)" \
	$(if $(PLAN),--plan "$(PLAN)") \
	$(if $(TARGET),--target "$(TARGET)") \
	$(if $(PRECISION),--precision "$(PRECISION)") \
	$(if $(CALIB),--calib "$(CALIB)") \
	$(foreach layer,$(KEEP_FLOAT),--keep-float "$(layer)") \
	$(if $(NAME),--name "$(NAME)") \
	$(if $(WEIGHTS),--weights "$(WEIGHTS)") \
	$(if $(REVISION),--revision "$(REVISION)") \
	$(foreach length,$(CONTEXT),--context "$(length)") \
	$(if $(BUILD_MEMORY),--build-memory "$(BUILD_MEMORY)") \
	$(IMAGES) \
	$(if $(filter-out 0 no false,$(DUMMY)),--dummy-weights) \
	$(if $(filter-out 0 no false,$(OFFLINE)),--offline)

CALIBRATE = "$(MODEL)" --out "$(OUT)" \
	$(if $(DATA),--data "$(DATA)") \
	$(if $(SAMPLES),--samples "$(SAMPLES)") \
	$(if $(PLAN),--plan "$(PLAN)") \
	$(if $(LOSE),--lose "$(LOSE)") \
	$(if $(COST),--cost "$(COST)") \
	$(if $(HOLDOUT),--holdout "$(HOLDOUT)") \
	$(if $(CANDIDATES),--candidates "$(CANDIDATES)") \
	$(if $(SELECTORS),--selectors "$(SELECTORS)") \
	$(IMAGES) \
	$(if $(filter-out 0 no false,$(NO_ENTRY)),--no-entry) \
	$(if $(PRECISION),--precision "$(PRECISION)") \
	$(if $(REVISION),--revision "$(REVISION)") \
	$(if $(filter-out 0 no false,$(DUMMY)),--dummy-weights) \
	$(if $(filter-out 0 no false,$(OFFLINE)),--offline)

.DEFAULT_GOAL := help
.PHONY: help setup demo engines calibrate profile compare tables test check docs types constraints clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(VENV)/.installed  ## make .venv with visistage and everything it needs

demo: setup  ## build the demo model and ask it about a picture
	@bundle=$$($(BIN)/visistage engines --model demo --out "$(OUT)") && \
	echo && echo '$(PICTURE)' && echo '$(QUESTION)' && \
	$(BIN)/visistage infer $(PICTURE) '$(QUESTION)' --bundle "$$bundle"

engines: setup  ## build a bundle: MODEL=llava-7b [PLAN TARGET PRECISION DUMMY OUT]
	@$(BIN)/visistage engines $(ENGINES)

# Unless OUT is typed, calibrations lie apart from engines.
calibrate: OUT = calibrations
calibrate: setup  ## choose a plan, measure ranges: MODEL=demo [DATA SAMPLES PLAN LOSE COST PRECISION OUT]
	@$(BIN)/visistage calibrate $(CALIBRATE)

profile: setup  ## time a bundle part by part: MODEL=llava-7b [PLAN TARGET PRECISION DUMMY OUT]
	@bundle=$$($(BIN)/visistage engines $(ENGINES)) && $(BIN)/visistage profile "$$bundle"

compare: setup  ## compare every way to prune at the same cost: MODEL=demo [DATA SAMPLES PLAN]
	@$(BIN)/visistage compare "$(MODEL)" $(if $(DATA),--data "$(DATA)") \
		$(if $(SAMPLES),--samples "$(SAMPLES)") $(if $(PLAN),--plan "$(PLAN)") \
		$(if $(REVISION),--revision "$(REVISION)") \
		$(if $(filter-out 0 no false,$(OFFLINE)),--offline)

# Hours on a busy machine mean nothing: an idle one, and nothing else meanwhile.
tables: setup  ## measure the demo models again, and write every table that rests on them
	$(BIN)/python -m visistage.bench.first_token
	$(BIN)/python -m visistage.bench.quantisation
	$(BIN)/python -m visistage.bench.back_ends --model demo
	set -e; for series in demo demo-576 easy-vqa; do \
		$(BIN)/python -m visistage.bench.accuracy --series $$series $(if $(SAMPLES),--samples "$(SAMPLES)"); \
		$(BIN)/python -m visistage.bench.compare --series $$series; \
	done
	$(BIN)/python -m visistage.bench.tables

# Each group gets processes of its own: compilers and back ends leave gigabytes in theirs. All groups share their traces.
FOLDERS := $(sort $(dir $(wildcard tests/*/test_*.py)))
ALONE   := tests/compile/ tests/graphs/ tests/runtime/
GROUPS   = $(ALONE) "$(filter-out $(ALONE),$(FOLDERS))" "tests/test_*.py"

test: setup  ## run the tests, or some: TESTS=tests/graphs/test_plan.py
	@rm -rf .cache/traces
	status=0; for group in $(if $(TESTS),"$(TESTS)",$(GROUPS)); do \
		VISISTAGE_GPU_PYTHON="$(GPU_PYTHON)" VISISTAGE_TRACES="$(CURDIR)/.cache/traces" \
		$(BIN)/python -m pytest -n auto --dist loadfile --max-worker-restart 0 $$group || status=1; \
	done; exit $$status

check: setup types  ## lint, formatting, types, layering and the wheel's contents
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q tests/test_layers.py tests/test_packaging.py

docs: setup  ## build the pages of docs/ as a site in .cache/site, without a network
	@mkdir -p .cache/types && ln -sfn ../.. .cache/types/visistage
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=.cache/types $(BIN)/python -m mkdocs build --strict --clean -q
	@echo .cache/site/index.html

types: setup  ## check types
	@mkdir -p .cache/types && ln -sfn ../.. .cache/types/visistage
	MYPYPATH=.cache/types $(BIN)/mypy -p visistage

# Local parts of versions (+cpu) name builds of one index, and go.
constraints: setup  ## pin what is installed, and was tested, in constraints-tested.txt
	@{ echo "# Installed where the tests passed: $$($(BIN)/python -c 'import platform as p; print(p.python_implementation(), p.python_version(), p.system(), p.machine())')."; \
	$(BIN)/python -m pip list --format=freeze --exclude-editable --exclude visistage --exclude pip | sed 's/+[^ ]*//'; } > constraints-tested.txt

clean:  ## remove what tests and checks leave; .venv and engines stay
	rm -rf build dist *.egg-info .cache/types .cache/traces .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

# torch first and pinned, so that nothing later pulls another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'visistage needs Python 3.10 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)'; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_OPTIONS) -c constraints.txt torch
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q $(PIP_OPTIONS) \
		-c constraints.txt -e '.[$(ORT),compile,openvino,rtx,serve,easy-vqa,dev]'
	@touch $@
