# make demo: from a fresh clone to a trained network.  make test: the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TWO := -n 2 --dist loadfile    # files of tests at a time: most of it waits for imports
MEMBERS := resnet18 googlenet shufflenet_v2_x1_0
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo flowers ablate ensemble bench results pictures screenshots test test-quick test-sweeps test-faults setup lint clean

demo: $(VENV)/demo
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml train.py --config recipes/digits.yaml
	$(BIN)/python predict.py runs/digits --dataset digits --split test
	$(BIN)/python gradcam.py runs/digits --max_images 8 --method layercam --layer layers.1.1
	@echo
	@echo "The report is runs/digits/report.html. To go on with a folder of your own photos, a folder a class:"
	@echo "  $(BIN)/python finetune.py --strategy auto --dataset PHOTOS --run_name photos --val_fraction 0.2"
	@echo "  $(BIN)/python predict.py runs/photos NEW_PHOTO.jpg"
	@echo "  $(BIN)/python gradcam.py runs/photos --images NEW_PHOTO.jpg"

flowers: $(VENV)/demo    # feature extraction, staged, full, from scratch, over seeds: wants a GPU
	$(BIN)/python benchmarks/transfer.py

ablate: $(VENV)/demo     # crop and flip, plus each trick, over seeds: wants a GPU
	$(BIN)/python benchmarks/ablate.py

ensemble: $(VENV)/demo   # three architectures on the digits, combined
	for model in $(MEMBERS); do \
	  $(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml train.py \
	    --config recipes/digits.yaml --model $$model --run_name digits-$$model \
	    --val_fraction 0.1 --batch_size 32 --epochs 12 --lr 0.05 --mixup_alpha 0 || exit 1; \
	done
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml ensemble_eval.py \
	  $(MEMBERS:%=runs/digits-%) --run_name digits-ensemble

pictures: setup          # the README's picture, from photographs of scikit-image
	$(BIN)/python benchmarks/pictures.py

screenshots:             # report.html of RUN=runs/x in Debian's Chromium: wide, and as a phone
	for width in 1200 400; do \
	  chromium --headless --no-sandbox --hide-scrollbars --window-size=$$width,4200 \
	    --screenshot=$(abspath $(RUN))-$$width.png file://$(abspath $(RUN))/report.html || exit 1; \
	done

bench: setup             # ours against the peers, long: DATA=folder, QUICK=1, JSON=1 (to benchmarks/results)
	$(BIN)/python benchmarks/bench.py $(if $(DATA),--data $(DATA)) $(if $(QUICK),--quick) $(if $(JSON),--json)

results:                 # docs/results.md from benchmarks/results
	$(PYTHON) benchmarks/results.py

test: setup              # all but the sweeps: what CI runs
	$(BIN)/python -m pytest $(TWO)

test-quick: setup        # while you work: what is not marked slow
	$(BIN)/python -m pytest $(TWO) -m "not slow"

test-sweeps: setup       # every network, every command of the README, every fault
	$(BIN)/python -m pytest $(TWO) -m sweep

test-faults: setup       # tests/faults alone: kill it anywhere, damage anything
	$(BIN)/python -m pytest $(TWO) -m faults

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: $(VENV)/dev

$(VENV)/demo: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing requirements.txt into $(VENV) (about a minute, 5 GB with torch's CUDA libraries)"
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/dev: $(VENV)/demo requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $@

clean:                   # what was built and cached; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
