# Needs Python 3.11 or newer: `make PYTHON=python3.12 demo` where python3 is older. On a CUDA machine the same pins
# install torch's CUDA build.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
FIRST := .venv-2.11
NEWEST := .venv-2.15
# Two processes fill two cores; torch's own threads would wait for each other there.
pytest = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n 2 --dist loadfile -m
KERNEL_PROOFS := $(addprefix tests/test_,activations.py linear.py chain.py warm_launch.py bias_activation.py elementwise.py gated.py softmax.py cross_entropy.py class_losses.py class_shards.py bce.py multilabel.py binary_losses.py conv.py conv_ranks.py training_tiny.py training_single.py training_layers.py persistent.py codegen.py launch.py)

.PHONY: demo test test-exhaustive test-oldest test-first test-newest test-distributed contract mutants soak fuzz lint lock bench bench-gpu carry docs pictures

demo: $(VENV)/ready
	$(VENV)/bin/python -m fusedact compare mnist-mlp --out runs/demo

test: $(VENV)/ready
	$(call pytest,$(VENV)) 'not exhaustive and not distributed'

test-exhaustive: $(VENV)/ready
	$(call pytest,$(VENV)) exhaustive

test-oldest: $(OLDEST)/ready
	$(call pytest,$(OLDEST)) 'not exhaustive' $(KERNEL_PROOFS)

test-first: $(FIRST)/ready
	$(call pytest,$(FIRST)) 'not exhaustive and not distributed' --ignore=tests/test_bench.py

test-newest: $(NEWEST)/ready
	$(call pytest,$(NEWEST)) 'not exhaustive and not distributed' --ignore=tests/test_bench.py

# All that torchrun starts, on 2 and 4 processes of this machine, and how far each is from one process.
test-distributed: $(VENV)/ready
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/test_distributed.py tests/test_torchrun.py

contract: $(VENV)/ready
	OMP_NUM_THREADS=1 $(VENV)/bin/python tools/contract.py -n 2 --dist loadfile $(ARGS)

# Training through each engine for so long, in a process each; fails where memory or anything else of them grows.
MINUTES := 30
soak: $(VENV)/ready
	$(VENV)/bin/python tools/soak.py --minutes $(MINUTES) $(ARGS)

# In as many processes as there are cores; `make fuzz HOURS=8` or `SECONDS=60`, `ARGS='--only softmax,csv'` chooses.
HOURS ?= 0
SECONDS ?= 600
fuzz: $(VENV)/ready
	OMP_NUM_THREADS=1 $(VENV)/bin/python tools/fuzz.py --hours $(HOURS) --seconds $(SECONDS) $(ARGS)

# Half an hour and more; cut, it goes on where it was.
mutants: $(VENV)/ready
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[mutants]"
	$(VENV)/bin/python tools/mutants.py $(ARGS)

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python tools/audit.py

# After a change of a pin: hashes.txt, hashes-oldest.txt and THIRD_PARTY.md again.
lock: $(VENV)/ready
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[lock]"
	$(VENV)/bin/python tools/lock.py
	$(VENV)/bin/python tools/licences.py

# Of these a CPU's are measured in one thread; `make bench ARGS=--smoke` tries them, `ARGS='-k softmax'` chooses.
bench: $(VENV)/ready
	mkdir -p runs
	$(VENV)/bin/python -m pytest bench --benchmark-json=runs/bench.json $(ARGS)

bench-gpu: $(VENV)/ready
	$(VENV)/bin/python bench/gpu.py $(ARGS)

# For a GPU machine that has PyTorch, Triton and pytest but no network: what its tests ask for besides, peers, the MNIST.
CARRIED := typer pydantic pydantic-core annotated-types typing-inspection expecttest liger-kernel cut-cross-entropy
MNIST ?= ../shared/data/mnist
carry: $(VENV)/ready
	$(VENV)/bin/python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
		--platform manylinux2014_x86_64 --constraint constraints.txt --dest .carry $(CARRIED)
	cp -r $(MNIST) .carry/

# Warnings are errors. The variable silences the theme's notice of its maintenance, which mkdocs itself does not count.
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

# Those of docs/images that show the package alone; tests/test_pictures.py finds one that no longer does.
pictures: $(VENV)/ready
	$(VENV)/bin/python -m fusedact plot activations --out runs/pictures --dpi 100
	cp runs/pictures/activations.png docs/images
	$(VENV)/bin/python -m fusedact plot losses --out docs/images --dpi 100
	$(VENV)/bin/python -m fusedact plot xor --device cpu --out docs/images
	$(VENV)/bin/python -m bench.scale --picture

# Each environment is made once, and again when what it is made from changes.
define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "fusedact needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)" >&2; \
		echo "name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "making $(@D): torch, Triton and the tools, which takes minutes where torch is not cached"
	$(PYTHON) -m venv $(@D)
endef

# A torch of the index, with what it asks for itself, among those pins.
define install_torch
	$(make_venv)
	grep -vE '^(torch|triton|setuptools)==' $(2) >$(@D)/others.txt
	$(@D)/bin/python -m pip install --quiet "setuptools>=77"
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/others.txt torch==$(1) --no-build-isolation --editable ".[gpu,cli,dev,models]"
	touch $@
endef

$(FIRST)/ready: pyproject.toml constraints-oldest.txt
	$(call install_torch,2.11.0,constraints-oldest.txt)

$(NEWEST)/ready: pyproject.toml constraints.txt
	$(call install_torch,2.15.0,constraints.txt)

# What is pinned comes first, each file checked against its hashes; then ourselves and torch, which hashes.txt leaves out.
$(VENV)/ready: pyproject.toml constraints.txt hashes.txt
	$(make_venv)
	$(VENV)/bin/python -m pip install --quiet --require-hashes --no-deps --requirement hashes.txt
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[gpu,cli,dev,models,docs,audit]"
	touch $@

# Triton's again at the end: a CUDA build of torch asks for the Triton that it came with.
$(OLDEST)/ready: pyproject.toml constraints-oldest.txt hashes-oldest.txt
	$(make_venv)
	grep -v ^triton== constraints-oldest.txt >$(OLDEST)/others.txt
	$(OLDEST)/bin/python -m pip install --quiet --require-hashes --no-deps --requirement hashes-oldest.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/others.txt --no-build-isolation --editable ".[cli,dev]"
	$(OLDEST)/bin/python -m pip install --quiet --require-hashes --no-deps --requirement hashes-oldest.txt
	touch $@
