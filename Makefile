# The two commands that do everything: `make demo` and `make test`. Both run as root (or with sudo) on a
# fresh Debian 12 or 13; `make help` lists the rest.

SHELL := /bin/bash
PYTHON := .venv/bin/python
export PYTHONDONTWRITEBYTECODE := 1

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: ## Packages, Python environment, C libraries: for a controller and a lab; the rest comes with what needs it
	@scripts/setup

setup-demo setup-tests:
	@scripts/setup $(@:setup-%=%)

demo: setup-demo ## A lab of hosts; moves live connections from a to b to c while clients use them
	@scripts/demo

test: setup-tests ## Style, unit, sanity, simulation, fuzz, traffic, lab; in guests of 6.1 and 6.12: the module, Molecule
	@scripts/test

sanity: setup ## `ansible-test sanity` on the collection as its tarball installs it, without ignore files (some minutes)
	@scripts/sanity

lint: setup ## Style and types only
	@scripts/test style

test-kmod: setup-tests ## All tests of the kernel module: Debian's 6.1 and 6.12, and a debug kernel (an hour and more)
	@scripts/kmod-test all

molecule: setup-tests ## The appliance on virtual machines with Debian 12 and 13: every scenario of molecule/ (slow)
	@scripts/molecule all

wheelhouse: setup ## What the role install carries to hosts, in wheelhouse/
	@$(PYTHON) scripts/wheelhouse

test-kernels: setup-tests ## All tests of the kernel module in Debian's 7.2
	@scripts/kmod-test kernels

bench: setup-tests ## Blackout, throughput and costs, as ratios inside one run
	@$(PYTHON) -m bench

bench-kernel: setup-tests ## The kernel engine beside the repair engine, and the NAT helper beside nftables, in a guest
	@$(PYTHON) -m bench.kernel

clean: ## Remove what the above made in this folder
	rm -rf .venv .build
	$(MAKE) -C daemon/libsockmi clean

.PHONY: help setup setup-demo setup-tests demo test sanity lint test-kmod molecule wheelhouse bench test-kernels bench-kernel clean
.DEFAULT_GOAL := help
