# make speedrun: set up, build shards from the Python sources on this machine, train Muon and AdamW, write the report.
# make check: format, lint, the import rule and the fastest tests, one to two minutes.  make test: the whole suite.
# MODEL= TOKENS= DATA= SEED= override what speedrun does.
# make readme-figures: every text with figures again, from runs/records.

PYTHON ?= python3
PY := .venv/bin/python
SEED ?= 0

FAST := layout docs model optim metrics newton_schulz symmetric cross_entropy relu2_mlp grouped_matmul step moe data \
  packing ptx inspection stats plots suites spectra

.PHONY: speedrun check test setup lint bench readme-figures clean
.DEFAULT_GOAL := speedrun

setup: .venv/.installed

.venv/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is too old: Python 3.11 or newer is needed, say which with make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# On a GPU the 88M model on every Python source here, without one the nano model on the standard library.
speedrun: setup
	@set -e; \
	gpus=$$($(PY) -c 'import torch; print(torch.cuda.device_count())'); \
	if [ $$gpus -gt 0 ]; then model=88m scope=all vocab=49152 tokens=2015232; \
	else model=nano scope=stdlib vocab=4096 tokens=1e6; fi; \
	ranks=1; while [ $$((2 * ranks)) -le $$gpus ] && [ $$ranks -lt 8 ]; do ranks=$$((2 * ranks)); done; \
	if [ $$ranks -gt 1 ]; then run="$(PY) -m torch.distributed.run --standalone --nproc_per_node=$$ranks"; \
	else run=$(PY); fi; \
	data="$(DATA)"; \
	if [ -z "$$data" ]; then data=shards/embedded-$$vocab; \
	  [ -d $$data ] || $(PY) data.py embedded --scope $$scope --vocab-size $$vocab --out $$data; fi; \
	name=speedrun-$$(date -u +%Y%m%dT%H%M%SZ); \
	for optimizer in muon adamw; do \
	  echo "== $$optimizer"; \
	  $$run train.py --model $(or $(MODEL),$$model) --optimizer $$optimizer --data "$$data" \
	    --tokens $(or $(TOKENS),$$tokens) --seed $(SEED) --name $$name-$$optimizer --no-plots; \
	  grep -q '"status": "finished"' runs/$$name-$$optimizer/summary.json || \
	    { echo "$$name-$$optimizer was stopped, so there is nothing to compare yet" >&2; exit 1; }; \
	done; \
	echo "== report"; \
	$(PY) report.py runs/$$name-muon runs/$$name-adamw --out runs/$$name

# The kernels' own tests run a second time in Triton's interpreter, a process of its own because it replaces every kernel.
# Two tests at a time, each on one thread.
test: export OMP_NUM_THREADS = 1
test: setup
	TRITON_INTERPRET=1 $(PY) -m pytest -n 2 --dist worksteal tests/test_symmetric.py tests/test_small.py tests/test_muon_kernels.py tests/test_cross_entropy.py \
	  tests/test_relu2_mlp.py tests/test_grouped_matmul.py
	$(PY) -m pytest -n 2 --dist worksteal

check: export OMP_NUM_THREADS = 1
check: lint
	$(PY) -m pytest -n 2 --dist worksteal $(FAST:%=tests/test_%.py)

lint: setup
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

bench: setup
	$(PY) -m pytest bench --benchmark-only

readme-figures: setup
	$(PY) -m bench.record figures

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache .benchmarks .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
