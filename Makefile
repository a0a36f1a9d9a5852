# Everything is built, tested and installed from here; `make` alone builds.

GO     ?= go
PREFIX ?= /usr/local

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c

.PHONY: need-go build demo deps check lint test sim sim-mutants soak bench-quick fuzz install clean
.DEFAULT_GOAL := build

need-go:
	@GO=$(GO) .ci/need-go

# The binary needs nothing of the host but its kernel.
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)

build: need-go
	CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '-X main.version=$(VERSION)' -o bin/afterimage ./cmd/afterimage

# Loses a host, and starts its VM on the other. Needs nothing but Go.
demo: build
	bin/afterimage demo

# The only target that installs anything.
deps:
	@GO=$(GO) .ci/deps

# Everything that needs nothing but Go and gcc.
check: need-go lint
	$(GO) run ./internal/citest unit race

STATICCHECK := bin/tools/staticcheck

$(STATICCHECK): internal/tools/go.mod internal/tools/go.sum | need-go
	CGO_ENABLED=0 $(GO) build -C internal/tools -o ../../$@ honnef.co/go/tools/cmd/staticcheck

lint: need-go $(STATICCHECK)
	@bad=$$($$($(GO) env GOROOT)/bin/gofmt -l .); \
	if [ -n "$$bad" ]; then echo "not formatted, run gofmt -w on:"; echo "$$bad"; exit 1; fi
	$(GO) vet ./...
	$(STATICCHECK) ./...

# Everything. As an ordinary user, the tests that need root go through sudo.
test: need-go
	@GO=$(GO) .ci/deps --check >/dev/null || GO=$(GO) .ci/deps
	@$(MAKE) --no-print-directory build lint
	$(GO) run ./internal/citest unit race sim real kill lab root
	@$(MAKE) --no-print-directory sim-mutants THIRD=$$(($$(date +%j | sed 's/^0*//') % 3 + 1)) MUTANT_TIME=2m

# The tests of `make check`, with SOAK times the rounds and all cases: for hours.
SOAK ?= 10

soak: need-go
	SOAK=$(SOAK) $(GO) run ./internal/citest unit race sim lab
	@$(MAKE) --no-print-directory sim-mutants MUTANT_TIME=5m

# Random histories of both hosts, in memory (package internal/sim), for a minute.
sim: need-go
	$(GO) run ./internal/citest sim
	$(GO) test -count=1 -run 'TestSmall|TestFound' ./internal/sim

# Is each rule that is broken on purpose noticed? THIRD=1, 2 or 3: only every third.
THIRD       ?= 0
MUTANT_TIME ?= 2m
sim-mutants: need-go
	$(GO) run ./internal/sim/simtool -third $(THIRD) -time $(MUTANT_TIME) -j 2 mutants

# Beside other servers, in memory, in about a minute and a half. BENCH_FLAGS
# are those of `afterimage bench quick`.
bench-quick: build
	bin/afterimage bench quick $(BENCH_FLAGS)

FUZZTIME ?= 5m

fuzz: need-go
	$(GO) run ./internal/citest -fuzztime $(FUZZTIME) fuzz

install: build
	install -D -m 0755 bin/afterimage $(DESTDIR)$(PREFIX)/bin/afterimage
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions $(DESTDIR)$(PREFIX)/share/zsh/site-functions $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	bin/afterimage completion bash >$(DESTDIR)$(PREFIX)/share/bash-completion/completions/afterimage
	bin/afterimage completion zsh >$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_afterimage
	bin/afterimage completion fish >$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/afterimage.fish

# What go test keeps as fuzzing crashers is source: it stays.
clean:
	rm -rf bin
