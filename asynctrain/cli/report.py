"""``asynctrain report``: a run as a page for a browser."""

from __future__ import annotations

import asyncio
from pathlib import Path

from asynctrain.cli.output import people, to_programs
from asynctrain.train.report import write


async def report(run_dir: Path, out: Path | None, as_json: bool) -> None:
    """Write the report of a run, by default into its folder, and say where it is."""
    path = out or run_dir / "report.html"
    await asyncio.to_thread(write, run_dir, path)
    people.print(f"The report is {path}", markup=False, soft_wrap=True)
    if as_json:
        to_programs({"report": str(path)})
