# make demo    a trained LLaVA, exported and asked about a picture
# make test    the tests           make lint    ruff and mypy
# make bench   speed and quality   make clean   forget what was built (the virtual environment stays)
#
# The first target that needs it makes .venv and installs the package with its pinned dependencies. It is reused until
# pyproject.toml or constraints.txt changes. Another Python: make test PYTHON=python3.12
# llama.cpp is compiled; a wheel that fits this machine saves the time: make LLAMA_WHEEL=llama_cpp_python-....whl

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed-$(firstword $(shell cat pyproject.toml constraints.txt | cksum))
PIP := $(BIN)/python -m pip --disable-pip-version-check
BUNDLE := build/demo/llava.bundle

# GCC 12 compiles llama.cpp's AMX code wrongly without these (docs/troubleshooting.md); other compilers do not know them.
ifeq ($(shell uname -sm),Linux x86_64)
LLAMA_FLAGS := CXXFLAGS="$(CXXFLAGS) -fno-tree-dse -fno-dse"
endif

COMMA := ,

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -m "not alone"
	$(BIN)/python -m pytest -m alone -n 0

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mllm_edge examples benchmarks

bench: $(BUNDLE)/bundle.json
	$(BIN)/mllm-edge bench $(BUNDLE)
	$(BIN)/python benchmarks/llava_quality.py $(BUNDLE)

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find mllm_edge tests examples benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

$(BUNDLE)/bundle.json: | $(STAMP)
	$(BIN)/mllm-edge export llava --target cpu --out $(BUNDLE)

# llama.cpp is compiled here, never taken from a cache: a build without the flags may lie there.
$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' || \
	  { echo "error: $(PYTHON) is not Python 3.10 to 3.14; name one: make PYTHON=python3.12" >&2; exit 2; }
	@command -v c++ >/dev/null || { echo "error: there is no C++ compiler; install g++ (Debian, Ubuntu: apt install g++)" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import llama_cpp' 2>/dev/null || { \
	  echo; echo "$(if $(LLAMA_WHEEL),Installing $(LLAMA_WHEEL).,Compiling llama.cpp$(COMMA) once: 5 to 10 minutes on 2 cores.)"; echo; }
	@$(LLAMA_FLAGS) $(PIP) install -q -c constraints.txt \
	  $(or $(LLAMA_WHEEL),--no-cache-dir --no-binary llama-cpp-python llama-cpp-python) & pid=$$!; \
	  minutes=0; while sleep 60 >/dev/null 2>&1 && kill -0 $$pid 2>/dev/null; do \
	    minutes=$$((minutes + 1)); echo "still compiling llama.cpp: $$minutes min"; done & said=$$!; \
	  wait $$pid; code=$$?; kill $$said 2>/dev/null; exit $$code
	@echo; echo "Installing PyTorch, ONNX Runtime and the rest: 1 to 3 minutes, more on a slow connection."; echo
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	rm -f $(VENV)/installed-*
	touch $@
