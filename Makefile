# make demo | make test | make test-slow | make clean
# All set up .venv first; PYTHON chooses the interpreter.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow clean

demo: $(STAMP)
	bash scripts/demo.sh demo

test: $(STAMP)
	$(VENV)/bin/python -m pytest -m "not slow"

test-slow: $(STAMP)
	$(VENV)/bin/python -m pytest

# The stamp is written last: a set-up that was interrupted starts again from nothing.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else "error: %s is Python %d.%d; accepted: 3.11 to 3.13; use make PYTHON=python3.11" % (sys.executable, *v))'
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .hypothesis .ruff_cache
