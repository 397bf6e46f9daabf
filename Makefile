# `make help` lists the targets. A stage is a notebook; which stages are run is no matter of times of files: stages.py
# says which are not done, by the keys of their results, and why. Executed copies lie in runs/<profile>.
ifeq ($(wildcard ssl_robust/records.py),)
$(error This Makefile works in its own folder; write for example make -C FOLDER paper)
endif
# What a user gives is taken letter by letter ('$' too), and reaches a shell only as a variable of the environment, never
# as a part of a command.
GIVEN := PROFILE DATA EXECUTOR CLUSTER AT_ONCE NAME CELL LAB TORCH
$(foreach name,$(GIVEN),$(if $(filter undefined,$(origin $(name))),,$(eval override $(name) := $$(value $(name)))))

PROFILE ?= demo
DATA    ?=
# Where `make paper` computes: here, notebook by notebook; local or slurm: as jobs, see params/cluster/$(CLUSTER).yaml
EXECUTOR ?=
CLUSTER ?= $(EXECUTOR)
export DATA CLUSTER NAME CELL LAB
PYTHON  ?= python3
# Notebooks that run side by side where they do not depend on each other: while one starts or draws, the other computes.
# One after the other where there is a GPU, whose memory each of them expects for itself.
AT_ONCE ?= $(if $(wildcard /proc/driver/nvidia/version /dev/dxg),1,2)
# In an environment of your own, e.g. conda's, say: make paper PY=python STAMP=
PY      := .venv/bin/python
STAMP   := .venv/.ready
UV      := 0.13.9
# Which torch `make env` installs: without a GPU that for CPUs, which takes less of the disk.
TORCH   ?= $(if $(wildcard /proc/driver/nvidia/version /dev/dxg),cuda,cpu)
INSTALL  = .venv/bin/python -m uv pip install --quiet --compile-bytecode --python .venv/bin/python
ifneq ($(filter-out cpu cuda,$(TORCH))$(words $(TORCH)),1)
$(error TORCH must be cpu or cuda; write for example TORCH=cuda)
endif

DIGITS  := 0 1 2 3 4 5 6 7 8 9
NAMES   := $(DIGITS) _ - a b c d e f g h i j k l m n o p q r s t u v w x y z A B C D E F G H I J K L M N O P Q R S T U V W X Y Z
# what is left of $(1) without the characters $(2)
left     = $(if $(2),$(call left,$(subst $(firstword $(2)),,$(1)),$(wordlist 2,99,$(2))),$(1))
ifneq ($(words $(PROFILE))$(filter -%,$(PROFILE))$(call left,$(PROFILE),$(NAMES)),1)
$(error PROFILE must be one name of letters, digits, _ and -, without a slash; write for example PROFILE=demo)
endif
ifneq ($(filter-out local slurm,$(EXECUTOR))$(word 2,$(EXECUTOR)),)
$(error EXECUTOR must be local or slurm, or nothing; write for example EXECUTOR=local)
endif
ifneq ($(words $(AT_ONCE))$(call left,$(AT_ONCE),$(DIGITS)),1)
$(error AT_ONCE must be a number of notebooks; write for example AT_ONCE=1)
endif
ifeq ($(call left,$(AT_ONCE),0),)
$(error AT_ONCE must be a number of notebooks above 0; write for example AT_ONCE=1)
endif
# a slash at its end makes no other folder
override DATA := $(or $(subst //end//,,$(subst ///end//,,$(DATA)//end//)),$(DATA))
RESULTS := results/$(PROFILE)
STAGES  := 00_data 01_heads 02_deacl 03_attack_classification 04_attack_segmentation 05_attack_depth 06_figures 07_sanity
ATTACKS := 05_attack_depth 04_attack_segmentation 03_attack_classification# begun in this order, so the long ones first
RUN      = $(PY) -m ssl_robust.ops.run --profile $(PROFILE) --data "$$DATA"
stages   = $(addprefix run-,$(1))
# Has the stages run that $(1) needs and that are not done; begun by '+', so that make -n says what they are.
made     = +@stale="$$($(PY) -m ssl_robust.ops.stages --profile $(PROFILE) --data "$$DATA")" && \
  $(MAKE) --no-print-directory $(if $(filter -j%,$(MAKEFLAGS)),,-j$(AT_ONCE)) STALE="$$stale" $(1)
STALE   ?= $(STAGES)

.DELETE_ON_ERROR:
.PHONY: help env plan data paper table1 table2 table3 fig1 fig2 notebook explain remake keep bench gpu-check example lab test
.PHONY: reference encoder house lock clean check $(STAGES:%=run-%)

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9 -]+:.*## / { printf "make %-26s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: PROFILE=$(PROFILE) (a file in params/), DATA=$$DATA (folder of real images), PYTHON=$(PYTHON),"
	@echo '           AT_ONCE=$(AT_ONCE) (notebooks side by side), EXECUTOR=$(EXECUTOR) (of paper: local or slurm, jobs in place of'
	@echo '           notebooks), CLUSTER='"$$CLUSTER (a file in params/cluster/)"

env: $(STAMP) ## the environment in .venv, alone

plan: $(STAMP) ## what PROFILE would do: rows, minutes, memory, disk, what is missing
	@$(RUN) --plan

data: $(STAMP) ## fetch the data sets of PROFILE into DATA, and encoder weights (SMALL=1: the smaller of two training sets)
	@$(PY) -m ssl_robust.ops.fetch --profile $(PROFILE) --data "$$DATA" $(if $(SMALL),--small)

ifeq ($(EXECUTOR),)
paper: $(STAMP) ## Tables 1-3, Figures 1-2 and index.html in figures/PROFILE
	$(call made,$(call stages,06_figures 07_sanity))
	@$(PY) -m ssl_robust.show.report $(PROFILE)
else
# Results come from jobs, and the notebooks find them; 3: jobs of the cluster wait or run.
paper: $(STAMP)
	$(call made,$(call stages,00_data))
	@$(PY) -m ssl_robust.ops.grid --profile $(PROFILE) --data "$$DATA" --executor $(EXECUTOR) --cluster "$$CLUSTER" \
	  && $(MAKE) --no-print-directory paper EXECUTOR= || { code=$$?; [ $$code = 3 ] || exit $$code; }
endif

table1: STAGE := 03_attack_classification
table2: STAGE := 04_attack_segmentation
table3: STAGE := 05_attack_depth
fig1 fig2: STAGE := 06_figures
table1: ## Table 1, classification
table2: ## Table 2, segmentation
table3: ## Table 3, depth
fig1 fig2: ## Figure 1, the attacks; Figure 2, along DeACL
table1 table2 table3 fig1 fig2: $(STAMP)
	$(call made,$(call stages,$(STAGE)))
	@echo "made: $$(ls figures/$(PROFILE)/$@.* | tr '\n' ' ')"
	@$(if $(filter fig2,$@),test -f figures/$(PROFILE)/fig2.png || echo 'no Figure 2: no DeACL fine-tuning was followed here')

notebook: $(if $(NAME),$(STAMP) check) ## one notebook with PROFILE: NAME=appendix_protocols
	@$(if $(NAME),$(RUN) "$$NAME",echo 'NAME is empty; write for example: make notebook NAME=appendix_protocols' >&2; exit 2)

explain: $(STAMP) ## how one table cell came about: CELL=table1/scenes/embedded_vit/standard/task
	@$(if $(CELL),$(PY) -m ssl_robust.ops.explain --profile $(PROFILE) "$$CELL",echo 'CELL is empty; write for example: make explain CELL=table1/scenes/embedded_vit/standard/task' >&2; exit 2)

remake: $(STAMP) ## make one table cell again, alone, and compare it: CELL=table1/scenes/embedded_vit/standard/task
	@$(if $(CELL),$(PY) -m ssl_robust.ops.explain --again --profile $(PROFILE) --data "$$DATA" "$$CELL",echo 'CELL is empty; write for example: make remake CELL=table1/scenes/embedded_vit/standard/task' >&2; exit 2)

keep: $(STAMP) ## keep results that other versions of the code made from the same inputs; their records say so
	@$(PY) -m ssl_robust.ops.stages --profile $(PROFILE) --data "$$DATA" --keep

bench: $(STAMP) ## speed and strength of the attacks beside other implementations, in figures/bench
	@$(PY) benchmarks/contenders.py

gpu-check: $(STAMP) ## the first hour on a GPU: what is expected of it and what is seen (AGAIN=1: keep nothing of before)
	@$(PY) benchmarks/gpu_check.py --data "$$DATA" $(if $(AGAIN),--again)

example: $(STAMP) ## for maintainers: what the last run of PROFILE made becomes the committed example
	@$(PY) -m ssl_robust.show.committed $(PROFILE)

lab: $(STAMP) ## JupyterLab on copies of the notebooks, in lab/ (options: LAB="--allow-root --no-browser --port 8899")
	@$(PY) -m ssl_robust.ops.lab

test: $(STAMP) ## ruff, unit tests, notebook rules, nbval
	@$(PY) -m ruff check ssl_robust tests notebooks benchmarks
	@env -u DATA -u CLUSTER -u NAME -u CELL -u LAB $(PY) -m pytest

reference: $(STAMP) ## the notebooks that nbval compares with, made anew
	@$(PY) tests/make_reference.py

encoder: $(STAMP) check ## pretrain the embedded encoder (appendix notebook)
	@$(RUN) appendix_pretraining

house: $(STAMP) ## how large the package and the notebooks are, and who imports whom
	@$(PY) tests/house.py

lock: $(STAMP) ## requirements.lock made anew from pyproject.toml
	@$(PY) -m uv pip compile --quiet --upgrade --universal --python-version 3.11 --extra dev \
	  --no-emit-index-url --no-annotate --no-header pyproject.toml -o requirements.lock

clean: ## delete results/PROFILE and runs/PROFILE, with all that was ever computed; asks first (YES=1: does not)
	@du -sh $(RESULTS) runs/$(PROFILE)/* 2>/dev/null || true; \
	answer=$(if $(YES),y); test -n "$$answer" || { \
	  printf 'Delete these, $(RESULTS) and runs/$(PROFILE)? [y/N] '; read -r answer || true; }; \
	if [ "$$answer" = y ]; then rm -rf $(RESULTS) runs/$(PROFILE); echo 'Deleted $(RESULTS) and runs/$(PROFILE).'; \
	else echo 'Nothing deleted.'; fi

check: | $(STAMP)
	@$(RUN) --check

# What a stage waits for; of all these only those in STALE do anything.
$(call stages,01_heads 02_deacl): $(call stages,00_data)
$(call stages,$(ATTACKS)): $(call stages,01_heads 02_deacl)
$(call stages,07_sanity): $(call stages,$(ATTACKS))
# last, as the checks of 07_sanity decide which values of the tables have a dagger
$(call stages,06_figures): $(call stages,07_sanity)
$(call stages,$(STAGES)): run-%:
	$(if $(filter $*,$(STALE)),@$(RUN) $*)

# A stamp at the end, so that an interrupted installation is completed by the next call.
.venv/.ready: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo '$(PYTHON) is not Python 3.11 or later; name one that is, e.g. make env PYTHON=python3.12' >&2; exit 1; }
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV)
	@grep -Ev '^(nvidia|cuda|triton)' requirements.lock > .venv/cpu.lock; [ $(TORCH) = cpu ] \
	  && echo 'environment: the pinned packages, torch for CPUs, into .venv (TORCH=cuda: for GPUs)' \
	  && $(INSTALL) --torch-backend cpu -r .venv/cpu.lock 2> .venv/cpu.log || { [ $(TORCH) = cuda ] \
	  || echo 'environment: torch for CPUs cannot be had (.venv/cpu.log), so that for GPUs follows'; \
	  echo 'environment: the pinned packages into .venv (about 6 GB)'; $(INSTALL) -r requirements.lock; }
	@.venv/bin/python -m uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation -e .
	@touch $@
