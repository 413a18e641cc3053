# ALL-PET. `make` lists the targets; each is one short command that also works by hand.
# Variables: DATA=folder (default: the built-in simulator), KIND=auto|sinogram|image, SCALE=laptop|gpu24;
#   finetune: TASK=low_dose|attenuation|delayed|separation|conversion|multi_task PAIRS=500, DATA= pairs of your own;
#   restore: TASK, DATA, MODEL=run or root; DOSE= (low_dose), DELAY= (delayed), TARGETS=FDG,PSMA, PROMPT=FDG:brain;
#     UPDATES= towards what was measured, ROI=mask file [LABEL=7] or BOX=left,right,lower,upper (mm), ATTENTION= to it,
#     METHOD=prior: stage 2 alone, for low_dose; SEED=;
#   sample: N=16, PROMPT=, MODEL=, VIEWS= BINS= COUNTS= of the sinograms, STEPS= of the sampler, SEED=;
#   held-out: RUN=, whose slices; memory: CONFIG="a.yaml b.yaml";
#   synthesise: TASK, PAIRS=50 real ones, N=450 generated ones; DATA= pairs of your own with DOSE= and PROMPT=; SEED=;
#   baseline: NAME=gan|score|one_channel; study: STUDY=few_shot|steps|compute|layers|baselines|downstream (TASK=);
#   evaluate: REAL= FAKE= TRAIN=folder or file, ENCODER=exported stage 1;
#   sweep: SWEEP=few_shot or a task, OFFLINE=1 without W&B even where there is an account;
#   ARGS="..." is appended to the command line, PYTHON=... makes the environment (gpu-check runs with it as it is),
#   PIP_ARGS="..." is appended to pip's.

PYTHON ?= python3
PIP_ARGS ?=
DATA ?=
KIND ?= auto
SCALE ?= laptop
TASK ?=
CONFIG ?=
PAIRS ?=
NAME ?=
STUDY ?=
SWEEP ?=
OFFLINE ?=
REAL ?=
FAKE ?=
TRAIN ?=
ENCODER ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
CHECK_PYTHON = $(if $(filter file,$(origin PYTHON)),$(BIN)/python,$(PYTHON))
SCALE_FILE := experiments/scale/$(SCALE).yaml
ifeq ($(wildcard $(SCALE_FILE)),)
$(error There is no $(SCALE_FILE): name a scale that there is, such as SCALE=laptop or SCALE=gpu24)
endif

PROMPT_ARGS = $(if $(PROMPT),--data.tracer $(word 1,$(subst :, ,$(PROMPT))) --data.region $(or $(word 2,$(subst :, ,$(PROMPT))),open))

# What the user set, as options of the command line. The data's class comes right after the defaults: it would drop what
# files after it have said. Sinograms keep their own views and bins; images are projected to SCALE's.
DATA_ARGS = $(if $(DATA),--data data_modules.SinogramFiles --data.folder "$(DATA)" --data.kind $(KIND) \
	--data.geometry null --data.image_geometry '$${...scale.geometry}' $(PROMPT_ARGS))
FIT = $(BIN)/allpet fit -c experiments/defaults.yaml $(DATA_ARGS) -c experiments/$(1).yaml -c $(SCALE_FILE) $(ARGS)
SAMPLE_ARGS = $(if $(MODEL),--model.folder "$(MODEL)") $(if $(N),--data.n_samples $(N)) $(if $(PROMPT),--data.prompts '["$(PROMPT)"]') \
	$(if $(SEED),--data.seed $(SEED)) $(if $(VIEWS),--model.sampling.n_views $(VIEWS)) \
	$(if $(BINS),--model.sampling.n_bins $(BINS)) $(if $(COUNTS),--model.sampling.counts $(COUNTS)) \
	$(if $(STEPS),--model.sampling.steps $(STEPS))
SCAN_ARGS = $(if $(DOSE),--data.dose $(DOSE)) $(if $(DELAY),--data.delay_min $(DELAY)) $(PROMPT_ARGS)
PAIRS_ARGS = $(SCAN_ARGS) $(if $(TARGETS),--data.target_tracer $(TARGETS))
RESTORE_MODEL = $(if $(filter prior,$(METHOD)),--model allpet.PriorRestoration.from_pretrained \
	--model.folder "$(or $(MODEL),outputs/ldm)",--model.folder "$(or $(MODEL),outputs/finetune/$(TASK))")
RESTORE_ARGS = $(SCAN_ARGS) $(if $(TARGETS),--data.target_tracers '[$(TARGETS)]') $(if $(ROI),--data.roi "$(ROI)") \
	$(if $(BOX),--data.roi_box '[$(BOX)]') $(if $(LABEL),--data.roi_label '[$(LABEL)]') \
	$(if $(ATTENTION),--model.sampling.attention_strength $(ATTENTION)) \
	$(if $(UPDATES),--model.sampling.data_consistency $(UPDATES)) $(if $(SEED),--data.seed $(SEED))

.DEFAULT_GOAL := help
# every target that is listed
.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*\#\# .*/\1/p' $(firstword $(MAKEFILE_LIST)))

help: ## List the targets, and the variables
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@sed -n '/^# Variables/,/^$$/s/^#//p' $(firstword $(MAKEFILE_LIST))

install: $(READY) ## Make .venv/ and install everything into it

$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed: name one with PYTHON=/path/to/python3."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]" $(PIP_ARGS)
	@touch $@

demo: $(READY) ## From nothing to a gallery of generated sinograms and images, in minutes
	$(BIN)/python experiments/demo.py $(ARGS)

test: $(READY) ## Run the tests, a file per core at a time
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

check: $(READY) ## Lint, types, import contracts, every YAML parsed, the page of results up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python experiments/results_table.py --check
	$(BIN)/python -m pytest tests/test_experiments.py

format: $(READY) ## Format the code and sort its imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train-vae: $(READY) ## Stage 1: train the autoencoder (DATA= KIND= PROMPT= SCALE=); the same command resumes
	$(call FIT,vae)

train-ldm: $(READY) ## Stage 2: train the latent diffusion on the newest stage 1 (say DATA= KIND= PROMPT= SCALE= as for it)
	$(call FIT,ldm)

finetune: $(READY) ## A downstream task (TASK=low_dose|attenuation|delayed|separation|conversion|multi_task PAIRS= DATA=)
	@test -f "experiments/finetune/$(TASK).yaml" || \
		{ echo "Name the task: make finetune TASK=low_dose (attenuation, delayed, separation, conversion, multi_task)."; exit 1; }
	@test -n "$(DATA)" -o -z "$(DOSE)$(DELAY)$(TARGETS)$(PROMPT)" || \
		{ echo "DOSE, DELAY, TARGETS and PROMPT are said of pairs of your own: name them with DATA=, or leave those out."; exit 1; }
	@test -z "$(DATA)" -o "$(TASK)" != multi_task || \
		{ echo "Pairs of your own are of one task: name it, or leave DATA out."; exit 1; }
	$(BIN)/allpet fit -c experiments/defaults.yaml -c experiments/finetune/bridge.yaml \
		$(if $(DATA),-c experiments/finetune/own_pairs.yaml) -c experiments/finetune/$(TASK).yaml -c $(SCALE_FILE) \
		$(if $(DATA),--data.folder "$(DATA)" $(PAIRS_ARGS)) $(if $(PAIRS),--data.num_scans $(PAIRS)) $(ARGS)

attenuation-demo: $(READY) ## Semi-real attenuation pairs: learn from some slices, try the others, a page (DATA=pairs.h5)
	@test -n "$(DATA)" || { echo "Name the pairs: make attenuation-demo DATA=pairs.h5 (allpet-data attenuation-pairs)."; exit 1; }
	$(BIN)/python experiments/attenuation_demo.py "$(DATA)" $(if $(PROMPT),--prompt "$(PROMPT)") --scale $(SCALE) $(ARGS)

baseline: $(READY) ## What stage 2 is compared with (NAME=gan|score|one_channel DATA= KIND= SCALE=)
	@test -f "experiments/baselines/$(NAME).yaml" || \
		{ echo "Name the baseline: make baseline NAME=gan (score, one_channel)."; exit 1; }
ifeq ($(NAME),one_channel)
	$(call FIT,vae.yaml -c experiments/baselines/one_channel)
	$(call FIT,ldm.yaml -c experiments/baselines/one_channel_ldm)
else
	$(call FIT,baselines/$(NAME))
endif

synthesise: $(READY) ## Generate pairs beside few real ones (TASK= PAIRS=50 DATA= DOSE= PROMPT=); N= of them (450)
	@test -n "$(TASK)" || { echo "Name the task: make synthesise TASK=low_dose PAIRS=50 N=450."; exit 1; }
	$(BIN)/python experiments/synthesise.py $(TASK) $(if $(PAIRS),--pairs $(PAIRS)) $(if $(N),--count $(N)) \
		$(if $(DATA),--folder "$(DATA)" $(if $(DOSE),--dose $(DOSE)) $(if $(PROMPT),--tracer $(word 1,$(subst :, ,$(PROMPT))) \
		--region $(word 2,$(subst :, ,$(PROMPT))))) $(if $(SEED),--seed $(SEED)) $(ARGS)

restore: $(READY) ## Use a downstream task on a folder of sinograms (TASK= DATA= DOSE= DELAY= TARGETS= PROMPT= MODEL=; UPDATES= ROI= BOX= METHOD=prior)
	@test -n "$(TASK)" -a -n "$(DATA)" || \
		{ echo "Name task and folder: make restore TASK=low_dose DATA=folder DOSE=0.05 PROMPT=FDG:brain."; exit 1; }
	@test -z "$(METHOD)" -o "$(METHOD)" = prior || { echo "METHOD is prior (stage 2 alone), or nothing."; exit 1; }
	$(BIN)/allpet predict -c experiments/restore.yaml $(RESTORE_MODEL) --data.folder "$(DATA)" --data.task $(TASK) $(RESTORE_ARGS) $(ARGS)

sample: $(READY) ## Generate with the newest stage 2 (N= PROMPT=FDG:brain VIEWS= BINS= COUNTS= STEPS= SEED= MODEL=)
	$(BIN)/allpet predict -c experiments/sample.yaml $(SAMPLE_ARGS) $(ARGS)

held-out: $(READY) ## Write the slices that a run was not trained on, for evaluate's REAL (RUN=outputs/ldm ARGS="--part test")
	$(BIN)/python experiments/held_out.py $(RUN) $(ARGS)

evaluate: $(READY) ## Judge generated sinograms beside real ones: a page of numbers and pictures (REAL= FAKE= TRAIN= ENCODER=)
	@test -n "$(REAL)" -a -n "$(FAKE)" || \
		{ echo "Name two sets of sinograms: make evaluate REAL=folder FAKE=outputs/samples/001/samples.h5."; exit 1; }
	$(BIN)/python experiments/evaluate.py --real "$(REAL)" --fake "$(FAKE)" $(if $(TRAIN),--train "$(TRAIN)") \
		$(if $(ENCODER),--encoder "$(ENCODER)") $(ARGS)

study: $(READY) ## Compare trainings (STUDY=few_shot|steps|compute|layers|baselines|downstream TASK= ARGS="--minutes 60"); hours
	@test -n "$(STUDY)" || { echo "Name the study: make study STUDY=few_shot (steps, compute, layers, baselines, downstream)."; exit 1; }
	$(BIN)/python experiments/study.py $(STUDY) $(if $(TASK),--task $(TASK)) $(ARGS)

sweep: $(READY) ## A grid of trainings and its curve, with W&B or without (SWEEP=few_shot or a task, OFFLINE=1); resumable
	@test -f "experiments/sweeps/$(SWEEP).yaml" || \
		{ echo "Name the sweep: make sweep SWEEP=few_shot (low_dose, attenuation, delayed, separation, conversion)."; exit 1; }
	$(BIN)/python experiments/sweep.py $(SWEEP) $(if $(OFFLINE),--offline) $(ARGS)

validate-data: $(READY) ## Check a folder of sinograms or images (DATA= KIND=)
	@test -n "$(DATA)" || { echo "Name the folder to check: make validate-data DATA=folder."; exit 1; }
	$(BIN)/python -m data_modules.validate "$(DATA)" --kind $(KIND) $(ARGS)

memory: $(READY) ## Estimate a training's peak memory, no GPU needed (CONFIG="a.yaml b.yaml" merged left to right)
	@test -n "$(CONFIG)" || { echo "Name the files: make memory CONFIG=\"experiments/defaults.yaml experiments/vae.yaml \
	experiments/scale/gpu24.yaml\"."; exit 1; }
	$(BIN)/python -m allpet.memory_report --config $(CONFIG) $(ARGS)

benchmark: $(READY) ## Projector, masks, reconstruction and training steps beside other ways to do the same; 20 minutes
	$(BIN)/python experiments/benchmarks/benchmark.py $(ARGS)
	$(BIN)/python experiments/benchmarks/throughput.py $(filter --quick,$(ARGS))

cost-curves: $(READY) ## Time per training step against batch, views x bins and data set size; 3 minutes
	$(BIN)/python experiments/benchmarks/cost_curves.py $(ARGS)

gpu-check: ## All that needs a GPU: tests, benchmark, training (PYTHON= any interpreter with torch; installs nothing)
	$(CHECK_PYTHON) experiments/benchmarks/gpu_check.py $(ARGS)

simulator-report: $(READY) ## The simulator beside what is published, and pages of its pictures; 15 minutes
	$(BIN)/python experiments/benchmarks/simulator_report.py $(ARGS)

faults: $(READY) ## Put faults into small trainings: what happened, what was lost, what was said (ARGS=--kills: 100 kills)
	$(BIN)/python experiments/faults.py $(ARGS)

clean: ## Remove caches and build products; outputs/ and .venv/ stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find src data_modules callbacks experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +
