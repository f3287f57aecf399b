# Each command does its own set-up: a virtual environment in .venv with the tested versions of constraints.txt.

PYTHON = $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v "$$p" && break; done)
BIN = .venv/bin

.NOTPARALLEL:
.PHONY: help demo demo-video demo-fashion demo-text test lint types docs mutants teacher-scores emoji-scores text-scores \
	preference-scores prompt-preference-scores clean

help:
	@echo 'make demo        distil the bundled teacher emoji, score the student, write runs/demo/report.html'
	@echo 'make demo-video  the same for moving emoji (runs/demo_video)'
	@echo 'make demo-fashion, demo-text   the same for the teachers of labels (runs/demo_fashion) and for a diffusers'
	@echo '                 pipeline (runs/demo_text)'
	@echo 'make test        lint, types, documentation and tests'
	@echo 'make lint        ruff (rules and formatting) and import-linter'
	@echo 'make types       mypy'
	@echo 'make docs        build the documentation as a site (site/); fails on broken links'
	@echo 'make mutants FILES="distill/loop.py" TESTS="tests/distill"   break files on purpose and count what tests notice'
	@echo 'make teacher-scores, emoji-scores   score the bundled teachers again (over an hour, ten minutes on two cores)'
	@echo 'make text-scores, preference-scores, prompt-preference-scores   train and score models in docs/results.md again'
	@echo 'make clean       remove .venv, caches and build leftovers (never runs/)'

demo: .venv/installed
	@$(BIN)/fewstep demo

demo-video: .venv/installed
	@$(BIN)/fewstep demo --video

demo-fashion: .venv/installed
	@$(BIN)/fewstep demo --fashion

demo-text: .venv/installed-text
	@$(BIN)/fewstep demo --text

# Two workers with one thread each: with more threads than cores torch gets many times slower.
test: export OMP_NUM_THREADS = 1
test: lint types docs
	@echo '== tests'
	@$(BIN)/pytest -n 2

# The packages are linted where they stand; the links under src are excluded in pyproject.toml.
lint: .venv/installed-dev
	@echo '== lint'
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-logo

types: .venv/installed-dev
	@echo '== types'
	@$(BIN)/mypy

docs: .venv/installed-dev
	@echo '== documentation'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

TESTS = tests/distill tests/models tests/samplers
mutants: .venv/installed-dev
	@$(BIN)/python -c 'import mutmut' 2>.venv/pip.log || $(INSTALL) '.[dev,mutants]' $(QUIETLY)
	@$(BIN)/python benchmarks/mutants.py $(FILES) --tests $(TESTS) --json results/mutants.json

# The teacher's scores that students are compared with. They are merged into the file, so this can be repeated in parts.
SCORE = $(BIN)/fewstep eval fashion --json models/bundled/fashion/eval.json
teacher-scores: .venv/installed
	$(SCORE) --solver euler,heun,ddim --nfe 4,8 --guidance 1,1.4,2
	$(SCORE) --solver heun --nfe 64 --guidance 1.3,1.4
	$(SCORE) --solver dpmpp_2m,unipc_2,dpm_solver_v3_2 --nfe 4,8
	$(SCORE) --solver unipc_2,dpm_solver_v3_2 --nfe 8 --guidance 1.4
	$(SCORE) --solver unipc_2 --nfe 32 --guidance 1.15,1.3

# The same for the teacher of emoji, also on captions that it has not seen, and real renders.
SCORE_EMOJI = $(BIN)/fewstep eval emoji --n 1024 --json
emoji-scores: .venv/installed
	$(SCORE_EMOJI) models/bundled/emoji/eval.json --steps 1,2,4,8,16 --guidance 2
	$(SCORE_EMOJI) models/bundled/emoji/eval.json --solver unipc_2 --steps 2,4 --guidance 2
	$(SCORE_EMOJI) models/bundled/emoji/eval.json --solver unipc_2 --steps 16 --guidance 1.5
	$(SCORE_EMOJI) results/emoji/held_out.json --steps 16 --guidance 2 --reference emoji-background --name background
	$(SCORE_EMOJI) results/emoji/held_out.json --steps 16 --guidance 2 --reference emoji-style --name style
	$(BIN)/python benchmarks/make_emoji_reference.py eval/reference/emoji --scores results/emoji/renders.json

# The text-conditioned students in docs/results.md; two seeds, of training and samples alike.
TEXT = $(BIN)/fewstep eval --n 2160 --json results/fashion_text/eval.json
text-scores: .venv/installed-text
	$(BIN)/fewstep data encode configs/fashion_text/captions.txt --teacher fashion-text --out runs/fashion_text_captions
	for seed in 0 1; do \
		$(BIN)/fewstep train configs/fashion_text/tdm.yaml out=runs/copies-$$seed seed=$$seed && \
		$(BIN)/fewstep train configs/fashion_text/tdm_adapters.yaml out=runs/adapters-$$seed seed=$$seed && \
		$(TEXT) runs/copies-$$seed --name copies --seed $$seed && \
		$(TEXT) runs/adapters-$$seed --name adapters --seed $$seed || exit 1; \
	done
	$(TEXT) fashion-text --solver unipc_2 --steps 4,16
	$(TEXT) fashion-text --solver unipc_2 --steps 16 --guidance 2
	for w in 1 2 4; do \
		$(BIN)/fewstep train configs/fashion_text/decoupled.yaml out=runs/decoupled-$$w stages.0.objective.guidance=$$w && \
		$(BIN)/fewstep eval runs/decoupled-$$w --steps 4 --n 2160 --json results/fashion_text/split.json \
			--name "decoupled_dmd, w = $$w" || exit 1; \
	done

# The preferences in docs/results.md: three seeds of training, each scored on its own samples.
TUNED = $(BIN)/fewstep eval --json results/dpo
PLAN = --solver heun --steps 8 --guidance 1.3
preference-scores: .venv/installed
	[ -d runs/tdm/student ] || $(BIN)/fewstep train configs/fashion/tdm.yaml
	$(BIN)/fewstep data preferences runs/tdm --reward symmetry --out runs/preferences.safetensors
	$(BIN)/fewstep data preferences fashion --reward symmetry $(PLAN) --out runs/preferences_teacher.safetensors
	for seed in 0 1 2; do \
		$(BIN)/fewstep train configs/fashion/dpo.yaml out=runs/dpo-$$seed seed=$$seed && \
		$(BIN)/fewstep train configs/fashion/dpo_teacher.yaml out=runs/dpo_teacher-$$seed seed=$$seed && \
		$(BIN)/fewstep winrate runs/dpo-$$seed runs/tdm --n 1000 --seed $$((seed + 1)) \
			--json results/dpo/student_wins-$$seed.json && \
		$(BIN)/fewstep winrate runs/dpo_teacher-$$seed fashion $(PLAN) --n 1000 --seed $$((seed + 1)) \
			--json results/dpo/teacher_wins-$$seed.json && \
		$(TUNED)/student_eval.json runs/tdm --steps 4 --seed $$seed --name tdm && \
		$(TUNED)/teacher_eval.json fashion $(PLAN) --n 2000 --seed $$seed && \
		$(TUNED)/student_eval.json runs/dpo-$$seed --steps 4 --seed $$seed --name dpo && \
		$(TUNED)/teacher_eval.json runs/dpo_teacher-$$seed $(PLAN) --n 2000 --seed $$seed --name dpo_teacher || exit 1; \
	done

# Prompt following as the preference: pairs (seed 0) for four of five captions, win rates on the others; three seeds, of
# training and samples alike, so that no noise is that of a pair.
FOLLOWED = $(BIN)/fewstep eval --n 1440 --json results/dpo_prompts
TEXT_PLAN = --solver unipc_2 --steps 8
CAPTIONS = configs/fashion_text/captions.txt
prompt-preference-scores: .venv/installed-text
	mkdir -p runs
	awk 'NR % 5' $(CAPTIONS) > runs/captions_tuned.txt
	awk 'NR % 5 == 0' $(CAPTIONS) > runs/captions_held_out.txt
	$(BIN)/fewstep data preferences fashion-text --captions runs/captions_tuned.txt --reward prompt $(TEXT_PLAN) \
		--n 1152 --batch 100 --out runs/fashion_text_preferences
	for seed in 1 2 3; do \
		$(FOLLOWED)/start_eval.json fashion-text $(TEXT_PLAN) --seed $$seed || exit 1; \
		for name in dpo dpo_adapters; do \
			$(BIN)/fewstep train configs/fashion_text/$$name.yaml out=runs/fashion_text_$$name-$$seed seed=$$seed && \
			$(FOLLOWED)/$${name}_eval.json runs/fashion_text_$$name-$$seed $(TEXT_PLAN) --seed $$seed --name $$name && \
			$(BIN)/fewstep winrate runs/fashion_text_$$name-$$seed fashion-text $(TEXT_PLAN) \
				--captions runs/captions_held_out.txt --n 432 --seed $$seed --batch 100 \
				--json results/dpo_prompts/$${name}_wins-$$seed.json || exit 1; \
		done; \
	done

clean:
	rm -rf .venv build dist site src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- set-up, repeated only when one of these two files has changed ---------------------------------------------------

# Quiet, but a failure shows pip's messages.
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e
QUIETLY = >.venv/pip.log 2>&1 || { tail -n 30 .venv/pip.log >&2; exit 1; }

.venv/installed: pyproject.toml constraints.txt | .venv/bin/pip
	@echo '== set-up (some minutes the first time: torch is large)'
	@$(INSTALL) . $(QUIETLY)
	@touch $@

.venv/installed-text: pyproject.toml constraints.txt | .venv/bin/pip
	@echo '== set-up with diffusers (some minutes the first time: torch is large)'
	@$(INSTALL) '.[diffusers,lora]' $(QUIETLY)
	@touch .venv/installed $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/pip
	@echo '== set-up with the development tools (some minutes the first time: torch is large)'
	@$(INSTALL) '.[dev]' $(QUIETLY)
	@touch .venv/installed $@

.venv/bin/pip:
	@test -d src/fewstep/models || { echo 'This checkout has no working symbolic links' \
		'(src/fewstep/models is not a folder): clone again with "git clone -c core.symlinks=true".' >&2; exit 1; }
	@test -n '$(PYTHON)' || { echo 'fewstep needs Python 3.11 or newer: install one,' \
		'or name it with "make PYTHON=/path/to/python3".' >&2; exit 1; }
	@'$(PYTHON)' -m venv .venv || { rm -rf .venv; exit 1; }
