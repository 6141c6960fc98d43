PYTHON ?= python3
SETUP = $(PYTHON) tools/setup_env.py
SOURCES = $(wildcard csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/include/xaifast/*.h)

.PHONY: setup demo test lint bench gpu-check wheel clean

setup:
	@$(SETUP) > /dev/null

demo:
	@python=$$($(SETUP) demo) && "$$python" examples/demo.py

lint:
	@python=$$($(SETUP) test) && "$$python" -m ruff check . && "$$python" -m ruff format --check . \
	  && "$${python%/*}/clang-format" --dry-run --Werror $(SOURCES)

# The Triton interpreter is chosen when kernels are first imported, so its tests have a process of their own.
test: lint
	@python=$$($(SETUP) test) && "$$python" -m pytest && TRITON_INTERPRET=1 "$$python" -m pytest tests/kernels

bench:
	@python=$$($(SETUP) bench) && "$$python" bench/bench_jobs.py

gpu-check:
	@python=$$($(SETUP) test) && "$$python" -m pytest -m gpu

wheel:
	@python=$$($(SETUP)) && "$$python" -m pip install --quiet build && "$$python" -m build

clean:
	rm -rf build dist
