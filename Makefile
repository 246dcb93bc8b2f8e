# Everything a developer runs. `make setup` first; the rest uses its .venv.
PYTHON ?= python3
.NOTPARALLEL:
BIN := .venv/bin
# A file's tests share what they start, so they stay in one worker.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
H100 := benchmarks/results/gpu/2026-11-26-h100-kernels/2-timing.json

.PHONY: help setup test deployments fast unit lint docs cuda-path soak conformance \
	other-vllm \
	bench ab ab-quick sub-block policies aot traffic roofline bench-attention gpu-bundle \
	gpu-fit report-picture lock clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 18

setup:  ## Create .venv and .models (Python 3.11; a few minutes, 6 GB)
	@$(PYTHON) tools/setup_env.py

lint:  ## ruff, ruff format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: export NO_MKDOCS_2_WARNING = 1
docs:  ## Write the generated tables anew, build docs/ into build/site
	$(BIN)/cog -r --verbosity=1 -I tools docs/*.md
	$(BIN)/mkdocs build --strict --quiet

fast:  ## The tests of tree and order alone (half a minute)
	$(BIN)/pytest -q $(PARALLEL) tests/tree tests/policy vllm_radix/tree

unit: lint  ## Linters and the tests that start no engine, interpret no kernel
	$(BIN)/pytest -q $(PARALLEL) \
	  -m "not engine and not serve and not interpreted and not cuda_path"

test: lint  ## Everything CI runs
	$(BIN)/pytest -q $(PARALLEL) -m "not slow"

deployments:  ## The slow tests: routers, Ray, a sweep, more toys (35 minutes)
	$(BIN)/python tools/ray_env.py
	$(BIN)/pytest -q -m slow

cuda-path:  ## The tests of vLLM's CUDA path, on a pretended GPU (8 minutes)
	$(BIN)/pytest -q -m cuda_path

soak bench: export PYTHONPATH := tests:$(PYTHONPATH)
soak bench: export VLLM_LOGGING_LEVEL = ERROR
soak:  ## A million random operations, every invariant after each (15 minutes)
	$(BIN)/python tests/soak.py $(OPERATIONS)

# VLLM=0.33.0 takes another version than the installed one, as far as it is Python.
conformance:  ## vLLM's own tests, of VLLM, stock against ours (5 minutes)
	$(BIN)/python tests/conformance/run.py $(if $(VLLM),--vllm $(VLLM))

other-vllm: VLLM ?= 0.33.0
other-vllm:  ## The tests that start no engine, over the Python of VLLM (8 minutes)
	$(BIN)/python tests/conformance/other_vllm.py $(VLLM) $(PARALLEL)

bench:  ## What cache, scheduler and planner cost the host, beside vLLM's (5 minutes)
	$(BIN)/pytest -q -s benchmarks/micro/tree.py --benchmark-quiet --benchmark-disable-gc
	$(BIN)/python -m vllm_radix_bench.micro.scheduler
	$(BIN)/python -m vllm_radix_bench.micro.counting
	$(BIN)/python -m vllm_radix_bench.micro.ordering
	$(BIN)/python -m vllm_radix_bench.micro.record
	$(BIN)/python -m vllm_radix_bench.micro.attention_plan

policies: export VLLM_LOGGING_LEVEL = ERROR
policies:  ## Every order on every load, without a model; tables and plot (40 minutes)
	$(BIN)/python -m vllm_radix_bench.study.small
	$(BIN)/python -m vllm_radix_bench.study.large

aot:  ## Compile the attention kernels for every GPU, compare with kernels/aot.json
	$(BIN)/python tools/aot.py

traffic: export VLLM_LOGGING_LEVEL = ERROR
traffic:  ## Bytes that attention kernels ask for, counted; plot (5 minutes)
	@mkdir -p results
	$(BIN)/python -m vllm_radix_bench.attention.traffic --plot results/traffic.png

roofline:  ## What grouped attention should gain on an H100: a model; plot
	@mkdir -p results
	$(BIN)/python -m vllm_radix_bench.attention.roofline --plot results/roofline.png

bench-attention:  ## Grouped attention beside others, on a GPU (--interpret elsewhere)
	$(BIN)/python -m vllm_radix_bench.attention $(ARGUMENTS)

gpu-bundle:  ## Pack .gpu for a GPU machine without vLLM; see tools/gpu/README.md
	$(BIN)/python tools/gpu/bundle.py

gpu-fit:  ## What the cost model says of the H100's times, and what fits them best
	$(BIN)/python tools/gpu/fit_cost.py $(H100)

ab:  ## A/B of stock vLLM against radix on this machine (under 15 minutes)
	$(BIN)/vllm-radix ab --offline

ab-quick:  ## The same in under 3 minutes
	$(BIN)/vllm-radix ab --offline --quick

sub-block:  ## Hits inside blocks of 32 and 128, against block boundaries (3 minutes)
	@for size in 32 128; do for on in true false; do \
	  echo "== blocks of $$size, sub_block=$$on"; \
	  $(BIN)/vllm-radix ab --offline --no-texts --repeats 1 --pressure 4 \
	    --workloads chat agents \
	    --block-size $$size --blocks $$((4096 / $$size)) \
	    --radix "{\"sub_block\": $$on}" --output results/sub-block-$$size-$$on.json \
	    || exit 1; done; done

report-picture:  ## A picture of PAGE, a report.html, as PICTURE, a PNG
	$(BIN)/python tools/report_picture.py $(PAGE) $(PICTURE)

lock:  ## Resolve tools/lock.in again
	$(BIN)/python tools/lock.py

clean:  ## Remove what tests and benchmarks left (keeps .venv and .models)
	rm -rf build results .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info \
	  .gpu .gpu-path
