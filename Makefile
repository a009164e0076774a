# With PYTHON given, that interpreter and its packages are used; without it, .venv is made and used.
ifdef PYTHON
READY :=
else
PYTHON := .venv/bin/python
READY := .venv/installed
endif

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow mutants lint datasets results reproduce studies bench gpu bench-peers policies tensorboard clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(READY)  ## make .venv with everything that requirements.txt pins

.venv/installed: requirements.txt requirements-tasks.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: put one first on PATH")'
	python3 -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check --progress-bar on -r requirements.txt
	.venv/bin/python -m pip install --disable-pip-version-check --no-deps -r requirements-tasks.txt
	touch $@

quickstart: $(READY)  ## install, collect a dataset, train TD3+BC on it, print its normalized score (minutes)
	$(PYTHON) algorithms/td3_bc.py --env halfcheetah-medium --source collected --steps 20000

test: $(READY) lint  ## the test suite, on two cores
	$(PYTHON) -m pytest -n 2

test-slow: $(READY)  ## the tests that need minutes: many kills, and the grid's runner on a real local Ray, which it installs
	$(PYTHON) -m pip install --disable-pip-version-check -r requirements-ray.txt
	$(PYTHON) -m pytest -m slow

mutants: $(READY)  ## breaks one line of a script's training at a time, and lists what its tests let pass (ALGOS="td3_bc iql")
	$(PYTHON) tests/mutate.py $(ALGOS)

lint: $(READY)  ## ruff: style and unused code
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

datasets: $(READY)  ## collect every task that is missing (25 minutes, 3 GB), print and draw all that is at hand
	$(PYTHON) datasets/collect.py --all
	$(PYTHON) datasets/show.py
	$(PYTHON) results/table.py

results: $(READY)  ## rebuild results/README.md, the README's table and the figures from results/runs/
	$(PYTHON) results/table.py

reproduce: $(READY)  ## run what is missing of the grid ALGOS x ENVS x SEEDS at STEPS updates (RUNNER=ray: on a cluster)
	$(PYTHON) results/reproduce.py $(if $(ALGOS),--algos $(ALGOS)) $(if $(ENVS),--envs $(ENVS)) \
	  $(if $(SEEDS),--seeds $(SEEDS)) $(if $(STEPS),--steps $(STEPS)) $(if $(SOURCE),--source $(SOURCE)) \
	  $(if $(RUNNER),--runner $(RUNNER))
	$(PYTHON) results/table.py

# d3rlpy is for the last study alone: where it cannot be installed, the others are measured and shown all the same.
studies: $(READY)  ## train and measure what results/studies/ asks (days on a CPU; goes on where it stopped)
	$(PYTHON) results/studies/extrapolation.py
	$(PYTHON) results/studies/q_divergence.py
	$(PYTHON) results/studies/cql_alpha.py
	$(PYTHON) results/studies/stitching.py
	$(PYTHON) results/studies/return_conditioning.py
	$(PYTHON) results/studies/in_context.py
	$(PYTHON) results/studies/model_error.py
	$(PYTHON) results/studies/demonstrations.py
	$(PYTHON) results/studies/compounding.py
	$(PYTHON) results/studies/transfer.py
	$(PYTHON) results/studies/ope.py
	$(PYTHON) results/studies/open_bandit.py
	$(PYTHON) results/studies/model_selection.py
	$(PYTHON) results/studies/overoptimisation.py
	$(PYTHON) results/studies/switch.py
	$(PYTHON) results/table.py
	$(MAKE) .venv-peers/installed
	$(PYTHON) results/studies/peer_iql.py
	$(PYTHON) results/table.py

bench: $(READY)  ## updates per second of every script on this machine, into results/bench.json (minutes)
	$(PYTHON) results/bench.py

gpu: $(READY)  ## on a GPU: its tests, bench, and cells of the grid in MINUTES (8), archived in OUT (runs/gpu)
	$(PYTHON) results/gpu.py $(if $(MINUTES),--minutes $(MINUTES)) $(if $(OUT),--out $(OUT)) \
	  $(if $(PARTS),--parts $(PARTS)) $(if $(STEPS),--steps $(STEPS)) $(if $(DEVICE),--device $(DEVICE))

bench-peers: $(READY) .venv-peers/installed .venv-imitation/installed  ## the same in d3rlpy, torchrl, imitation, in turns
	$(PYTHON) results/peers.py --peers .venv-peers/bin/python td3_bc
	$(PYTHON) results/peers.py --peers .venv-peers/bin/python iql
	$(PYTHON) results/peers.py --peers .venv-peers/bin/python cql
	$(PYTHON) results/peers.py --peers .venv-peers/bin/python fqe
	$(PYTHON) results/peers.py --peers .venv-imitation/bin/python gail
	$(PYTHON) results/peers.py --peers .venv-imitation/bin/python airl
	$(PYTHON) results/peers.py --peers .venv-imitation/bin/python dagger
	$(PYTHON) results/peers.py --peers .venv-imitation/bin/python maxent_irl

.venv-peers/installed:
	python3 -m venv .venv-peers
	.venv-peers/bin/python -m pip install --disable-pip-version-check torch==2.13.0 d3rlpy==2.8.1 torchrl==0.14.1
	touch $@

.venv-imitation/installed:
	python3 -m venv .venv-imitation
	.venv-imitation/bin/python -m pip install --disable-pip-version-check torch==2.13.0 imitation==1.0.1 "gymnasium[mujoco]" mujoco==3.1.6 "numpy<2" "pyarrow<20" "datasets<4" h5py
	touch $@

policies: $(READY)  ## train the behaviour policies again and copy the chosen snapshots (hours; goes on where it stopped)
	$(PYTHON) datasets/policies/train.py

tensorboard: $(READY)  ## the curves of runs/ in a browser
	$(PYTHON) -m tensorboard.main --logdir $${RUNS_DIR:-runs}

clean:  ## remove the .venv folders and caches; runs/, datasets and results stay
	rm -rf .venv .venv-peers .venv-imitation .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
