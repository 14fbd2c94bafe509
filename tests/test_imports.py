"""Imports go one way, like the data: each module's are read from its source and held against one table."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GROUND = "errors arena types randomness"
WATCHED = {"asyncio"}  # of the standard library, the part that must be permitted

# A row holds for the module or package it names, except where a longer name has a row of its own. Besides what is
# listed, a package may import itself and whatever of the standard library is not watched.
TABLE = f"""
errors               |
arena                | numpy
randomness           | numpy
types                | {GROUND} numpy
metrics              | {GROUND} numpy
_version             |
_aio                 | errors asyncio
_files               |
_safetensors         | arena numpy
nn                   | {GROUND} numpy
nn.kernels.compiled  | {GROUND} nn.kernels numpy numba llvmlite
optim                | {GROUND} numpy
data                 | {GROUND} _aio _files numpy asyncio PIL aiofiles fsspec imagecodecs simplejpeg
executors.blas       | {GROUND} threadpoolctl
executors.fingerprint| {GROUND} numpy threadpoolctl numba llvmlite
executors.worker     | {GROUND} executors.blas nn numpy threadpoolctl
executors.ledger     | {GROUND} nn numpy
executors.dask       | {GROUND} _aio nn executors numpy asyncio dask distributed
executors.dask.keeper |
executors            | {GROUND} _aio nn numpy asyncio threadpoolctl
rpc                  | {GROUND} _aio executors nn.model numpy asyncio grpc google
inference            | {GROUND} _aio _files _safetensors nn data.images executors.base executors.worker executors.blas
                     | numpy asyncio PIL safetensors
train                | {GROUND} _version _aio _files _safetensors nn optim inference metrics
                     | executors.base executors.worker executors.fingerprint numpy asyncio safetensors tomli_w
train.callbacks      | _aio _files nn inference data.images train tensorboardX
train.display        | train rich IPython
train.notebook       | train IPython
train.plots          | train numpy matplotlib
train.tiles          | {GROUND} data.images
train.report         | _files train PIL
"""

ANYTHING = ("__init__", "testing", "cli", "serve")  # the package's own page, fakes for tests, command line, service
NEVER_IN_NN = {"concurrent", "datetime", "io", "os", "pathlib", "random", "secrets", "tempfile", "time"}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "asynctrain").rglob("*.py"))
}


def full(name: str) -> str:
    """Return a name of the table as it is imported: ``types`` is ours, ``numpy`` is not."""
    return f"asynctrain.{name}" if f"asynctrain.{name}" in MODULES else name


def permissions() -> dict[str, set[str]]:
    """Return what each row permits, by the full name of its module; a line without a name goes on with the last row."""
    permitted: dict[str, set[str]] = {}
    module = ""
    for line in TABLE.strip().splitlines():
        name, _, names = line.partition("|")
        module = f"asynctrain.{name.strip()}" if name.strip() else module
        permitted.setdefault(module, {module}).update(map(full, names.split()))
    return permitted


PERMITTED = permissions()
FREE = {"asynctrain", *(f"asynctrain.{name}" for name in ANYTHING)}
RULED = [name for name in MODULES if name not in FREE and not name.startswith(("asynctrain.cli.", "asynctrain.serve."))]


def imports(module: str) -> Iterator[str]:
    """Yield the full names of what ``module`` imports, at the top or inside of functions."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{module}, line {node.lineno}: write imports in full"
            assert not node.level, f"{module}, line {node.lineno}: write imports in full"
            for alias in node.names:  # a module of ours, or a name in one: from asynctrain.data import images
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in MODULES else node.module


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def row(module: str) -> str:
    """Return the name of the row that holds for ``module``: the longest that fits."""
    return max((name for name in PERMITTED if within(module, name)), key=len, default="")


def is_permitted(name: str, module: str) -> bool:
    top = name.split(".")[0]
    if top in sys.stdlib_module_names and top not in WATCHED:
        return True
    return any(within(name, permitted) for permitted in PERMITTED[row(module)])


@pytest.mark.parametrize("module", RULED)
def test_each_module_imports_only_what_its_row_permits(module: str) -> None:
    assert row(module), f"{module} has no row in the table: give it one"
    foreign = {name for name in imports(module) if not is_permitted(name, module)}
    assert not foreign, f"{module} may not import {', '.join(sorted(foreign))}"


def test_no_module_imports_one_that_imports_it_at_the_top_or_inside_of_a_function() -> None:
    package = {"asynctrain"}  # its page imports all that it offers
    graph = {name: {found for found in imports(name) if found in MODULES} - package - {name} for name in MODULES}
    del graph["asynctrain"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("module", [name for name in RULED if within(name, "asynctrain.nn")])
def test_nn_knows_no_files_no_clocks_and_no_hidden_generators(module: str) -> None:
    reached = {name.split(".")[0] for name in imports(module)} & NEVER_IN_NN
    assert not reached, f"{module} may not import {', '.join(sorted(reached))}"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("nn.layers", "asyncio"),
        ("nn.layers", "asynctrain"),
        ("executors.worker", "asyncio"),
        ("executors.worker", "asynctrain.executors.local"),
        ("executors.local", "asynctrain.train.trainer"),
        ("executors.local", "distributed"),
        ("inference.classifier", "asynctrain.data"),
        ("train.trainer", "asynctrain.executors.local"),
        ("train.trainer", "grpc"),
        ("executors.crew", "asynctrain.rpc.executor"),
        ("rpc.executor", "asynctrain.serve.server"),
        ("train.trainer", "asynctrain.data.loader"),
        ("data.loader", "asynctrain.nn"),
        ("_aio", "numpy"),
    ],
)
def test_the_table_forbids_the_way_back(module: str, name: str) -> None:
    assert not is_permitted(name, f"asynctrain.{module}")


def test_the_table_permits_the_way_down_and_the_standard_library() -> None:
    assert is_permitted("asynctrain.data.images", "asynctrain.inference.classifier")
    assert is_permitted("types", "asynctrain._aio")
    assert not is_permitted("asynctrain.types", "asynctrain._aio")
