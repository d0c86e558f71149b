# make collapse: watch FGSM training collapse. make demo: two trained networks under attack, then SLAT live.
# make test: lint and tests. make check-results: the numbers, links, commands and code of README and docs.
# All set up .venv on first use; PYTHON=python3.12 make demo takes another interpreter.
PYTHON ?= python3
PY = .venv/bin/python
# Threads that wait sleep: next to a busy process, spinning ones take many times as long. Costs 9 % on a quiet machine.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: collapse demo test check-results clean

# Other runs: make collapse METHODS="fgsm slat" DROPOUT=0.3 SEED=1
METHODS = fgsm n_fgsm
DROPOUT = 0
SEED = 0
FIRST = $(firstword $(METHODS))
OTHERS = $(filter-out $(FIRST),$(METHODS))
# In float32, so that a machine with bfloat16 shows the same. One thread each, side by side.
TRAIN = OMP_NUM_THREADS=1 $(PY) train_$$method.py --out runs/collapse/$$method --overwrite --device cpu --precision fp32 \
	--dataset data/cifar10_tiny.npz --depth 10 --width 1 --eps 16 --dropout $(DROPOUT) --batch-size 32 --epochs 12 \
	--monitor 100 --seed $(SEED)

collapse: .venv/plot
	@mkdir -p runs/collapse
	@pids=; trap 'kill $$pids 2>/dev/null; exit 130' INT; \
		for method in $(OTHERS); do $(TRAIN) > runs/collapse/$$method.log 2>&1 & pids="$$pids $$!"; done; \
		method=$(FIRST); $(TRAIN) || { kill $$pids 2>/dev/null; exit 1; }; wait; for method in $(OTHERS); do echo; grep -v "img/s" runs/collapse/$$method.log; done
	@echo; $(PY) -m paper.figures curves $(METHODS:%=runs/collapse/%) --out runs/collapse/curves

demo: .venv/run
	@$(PY) -m paper.demo
	@echo; echo "Now SLAT, live: a small network, 2,000 images, eps 8/255, for about a minute."; echo
	@$(PY) train_slat.py --dataset data/cifar10_tiny.npz --depth 10 --width 2 --epochs 14 --batch-size 64 --lr-max 0.1 \
		--eps 8 --layers 0,conv1,conv2 --monitor 100 --out runs/demo --overwrite
	@echo; echo "And the attack on it:"; echo
	@$(PY) eval_attacks.py runs/demo --attack fgsm,pgd --eps 8 --n 100 \
		--json runs/demo/eval.json --save-adv runs/demo/adv.npz
	@$(PY) -m paper.demo runs/demo
	@echo; echo "2,000 images are too few to learn CIFAR-10. The complete data set, for a GPU:"
	@echo "    python train_slat.py --eps 8 --layers 0,conv1,conv2"

test: .venv/dev
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .
	@$(PY) -m pytest -q -n auto

check-results: .venv/dev
	@$(PY) -m pytest -q -n auto tests/check_*.py

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
		|| { echo "make: install Python 3.10 or newer ($(PYTHON) is missing or older), or name one: PYTHON=python3.12 make"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "make: $(PYTHON) lacks venv or pip: install them (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@$(PYTHON) -m venv .venv

.venv/run: .venv/bin/python requirements.txt
	@echo "installing torch, torchvision and numpy into .venv: once, a minute or more, up to 6 GB"
	@$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt && touch $@

.venv/plot: .venv/run
	@$(PY) -m pip install -q --disable-pip-version-check matplotlib && touch $@

.venv/dev: .venv/run requirements-dev.txt
	@echo "installing the tests' tools into .venv"
	@$(PY) -m pip install -q --disable-pip-version-check -r requirements-dev.txt && touch $@

clean:
	rm -rf .venv runs/demo runs/collapse
