#!/bin/sh
# Install what the example clients in Node and Go need. What cannot be had is told, and its tests are skipped.
cd "$(dirname "$0")/.." || exit

if command -v npm >/dev/null; then
    npm ci --ignore-scripts --prefix examples/clients/node --no-audit --no-fund || echo "the client in Node could not be installed"
else
    echo "the client in Node needs node and npm"
fi

packages="golang-go golang-google-grpc-dev golang-github-golang-protobuf-1-5-dev protoc-gen-go protoc-gen-go-grpc"
if dpkg --status $packages >/dev/null 2>&1; then
    echo "the client in Go has what it needs"
elif [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -qq --yes --no-install-recommends $packages >/dev/null; } ||
        echo "the client in Go could not be installed"
else
    echo "the client in Go needs Debian's packages: apt-get install $packages"
fi
