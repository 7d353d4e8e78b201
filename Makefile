# Each target does all of its set-up itself: a virtual environment in .venv, PyTorch, the compiled package.
VENV ?= .venv
export VENV

.PHONY: demo test lint clean

# Random network -> search -> slim -> train -> save -> reload, on scikit-learn's digits.
demo:
	scripts/environment.sh
	$(VENV)/bin/pfs-fast search --model resnet20 --data digits --budget 0.5 --out runs/demo --overwrite
	$(VENV)/bin/pfs-fast train runs/demo --overwrite

test:
	scripts/test.sh

lint:
	scripts/environment.sh test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) build runs *.egg-info
