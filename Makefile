PYTHON ?= python3
SETUP = $(PYTHON) tools/setup_env.py
SOURCES = $(wildcard csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/include/xaifast/*.h)

.PHONY: setup demo test lint bench compare sanitize gpu-check wheel clean

setup:
	@$(SETUP) > /dev/null

demo:
	@python=$$($(SETUP) demo) && "$$python" examples/demo.py

lint:
	@python=$$($(SETUP) test) && "$$python" -m ruff check . && "$$python" -m ruff format --check . \
	  && "$${python%/*}/clang-format" --dry-run --Werror $(SOURCES)

# A process a core; threads that wait for others do not spin, for the cores are taken. The Triton interpreter is chosen
# when kernels are first imported, so its tests have processes of their own.
test: lint
	@python=$$($(SETUP) test) && export OMP_WAIT_POLICY=passive && "$$python" -m pytest -n auto \
	  && TRITON_INTERPRET=1 "$$python" -m pytest -n auto tests/kernels

# BENCH=--full measures what is committed; BENCH="--only operators" a part.
bench:
	@python=$$($(SETUP) bench test) && "$$python" bench/run.py $(BENCH)

# Against origin/main or HEAD~1; others: make compare COMMITS="v0.1 HEAD".
compare:
	@python=$$($(SETUP) bench) && "$$python" bench/compare.py $(COMMITS)

sanitize:
	@python=$$($(SETUP) test) && "$$python" tools/sanitize.py && "$$python" tools/sanitize.py --prove

# On a machine with a CUDA device, without a network; GPU_CHECK="--out DIR" says where logs and CSV go.
gpu-check:
	@python=.venv/bin/python; [ -x $$python ] || python=$(PYTHON); $$python tools/gpu_check.py $(GPU_CHECK)

wheel:
	@$(PYTHON) tools/build_wheels.py

clean:
	rm -rf build dist
