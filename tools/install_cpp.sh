#!/usr/bin/env bash
# Installs what examples/cpp needs, from Debian's or Ubuntu's packages, if it is not there: as root, or in CI with sudo.
# Elsewhere it only says what to install: nobody's laptop is changed by `make test`, and the test is skipped there.
set -euo pipefail

PACKAGES="g++ make pkg-config libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc"

is_there() {
    local program
    for program in g++ make pkg-config protoc grpc_cpp_plugin; do
        command -v "$program" >/dev/null || return 1
    done
    pkg-config --exists grpc++ protobuf
}

if is_there; then exit 0; fi

if [ "$(id -u)" = 0 ]; then
    sudo=""
elif [ -n "${CI:-}" ]; then
    sudo="sudo -n"
else
    sudo=none
fi
if [ "$sudo" = none ] || ! command -v apt-get >/dev/null; then
    echo "WARNING: the C++ client will not be tested; to have it tested, install: $PACKAGES" >&2
    exit 0
fi

log="$(mktemp)"
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
if ! { $sudo apt-get update && $sudo apt-get install -y --no-install-recommends $PACKAGES; } >"$log" 2>&1 || ! is_there; then
    tail -n 20 "$log" >&2
    echo "WARNING: the C++ client will not be tested: its packages could not be installed: $PACKAGES" >&2
fi
