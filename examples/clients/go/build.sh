#!/bin/sh
# Builds the client as BUILD/client (BUILD is the first argument, or ./build), from what Debian packages alone:
#
#   apt-get install golang-go golang-google-grpc-dev golang-github-golang-protobuf-1-5-dev protoc-gen-go protoc-gen-go-grpc
set -eu
here="$(cd "$(dirname "$0")" && pwd)"
mkdir -p "${1:-build}/src"
build="$(cd "${1:-build}" && pwd)"

package=Masynctrain.proto=example.com/asynctrain/v1
protoc -I "$here/../../../asynctrain/serve" asynctrain.proto \
    --go_out="$build/src" --go_opt="$package" --go-grpc_out="$build/src" --go-grpc_opt="$package"

cd "$here"
GO111MODULE=off GOFLAGS='' GOPATH="$build:/usr/share/gocode" go build -o "$build/client" client.go
