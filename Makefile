# Aliases; the commands stand alone.
PYTHON ?= python3
.PHONY: book test clean
book test:
	$(PYTHON) -m handbook_src $@
clean:
	rm -rf _build
