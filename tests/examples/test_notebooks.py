"""The notebooks run from top to bottom under Jupyter's own loop, and are kept without outputs beside their scripts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import jupytext
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
OF_ITS_KIND = {  # what a notebook is to show, of the outputs by kind
    "1_first_steps": "text/html",
    "2_image_pipeline": "image/png",
    "3_your_own_photos": "image/png",
    "4_a_run_in_your_hand": "text/html",
}


def read(path: Path) -> Any:
    return jupytext.read(path)  # it has no types


def sources(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_the_pair_of_its_script_and_has_no_outputs(path: Path) -> None:
    notebook, script = read(path), read(path.with_suffix(".py"))
    assert sources(notebook) == sources(script)
    assert not [cell for cell in notebook.cells if cell.cell_type == "code" and (cell.outputs or cell.execution_count)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom_in_less_than_a_minute(path: Path, tmp_path: Path) -> None:
    notebook = read(path)
    client = NotebookClient(notebook, resources={"metadata": {"path": tmp_path}})
    asyncio.run(asyncio.wait_for(client.async_execute(), 60))
    shown = {kind for cell in notebook.cells for output in cell.get("outputs", ()) for kind in output.get("data", ())}
    assert OF_ITS_KIND.get(path.stem, "text/plain") in shown
