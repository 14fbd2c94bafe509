"""A run as one HTML page that needs nothing else: no server, no network, no script."""

from __future__ import annotations

import base64
import html
import io
import tomllib
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from asynctrain._files import write_whole
from asynctrain.train import notebook
from asynctrain.train.events import Event, Paused, Resumed, RunEnd, RunStart, WorkerJoined, WorkerLost
from asynctrain.train.figures import as_text, best_of, last_metric, table
from asynctrain.train.recorded import RecordedRun
from asynctrain.train.tiles import class_name, only_mistakes, tile

ROWS = 200  # of a list, at most; how many more there are is told
MISTAKES = 48

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #333; background: #fff; margin: 2rem auto; max-width: 1100px;
       padding: 0 1rem; }
h1 { margin: 0; font-size: 1.6rem; overflow-wrap: anywhere; } h2 { margin: 2.5rem 0 .5rem; font-size: 1.15rem; }
.status { margin: .25rem 0 1.5rem; } .failed { color: #a61b1b; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; padding: 0; margin: 0; }
.tiles div { border: 1px solid #e4e4e4; border-radius: 6px; padding: .5rem .9rem; }
.tiles dt { font-size: .8rem; color: #666; } .tiles dd { margin: 0; font-size: 1.25rem; }
.tiles dd, td { font-variant-numeric: tabular-nums; }
.scroll { overflow: auto; max-height: 30rem; border: 1px solid #e4e4e4; border-radius: 6px; }
table { border-collapse: collapse; font-size: .87rem; width: 100%; }
th, td { padding: .25rem .8rem; text-align: right; }
th { position: sticky; top: 0; background: #f6f6f6; font-weight: 600; white-space: nowrap; }
tbody tr + tr { border-top: 1px solid #eee; }
.words th, .words td { text-align: left; overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; } .matrix svg { max-width: 760px; }
pre { margin: 0; padding: .75rem; font-size: .82rem; }
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .78rem; line-height: 1.35; overflow-wrap: anywhere; }
figure img, .none { width: 96px; height: 96px; border: 1px solid #e4e4e4; image-rendering: pixelated; }
.none { display: flex; align-items: center; justify-content: center; color: #888; font-size: .75rem; }
"""


def write(run_dir: Path, out: Path) -> None:
    """Write the report of a run, under way or not, to ``out``. Blocks.

    Raises:
        FileNotFoundError: ``run_dir`` holds no run.
        OSError: ``out`` cannot be written.
    """
    write_whole(out, render(RecordedRun.read(run_dir)).encode())


def render(run: RecordedRun) -> str:
    """Return the page. Blocks: it reads the images of the worst mistakes, where they are still there."""
    classes = _classes(run)
    name = html.escape(run.path.resolve().name)
    sections = {
        "Curves": _curves(run),
        "Epochs": _scrolled(table(run.epochs)),
        "Worst mistakes": _mistakes(last_metric(run.evaluations, "worst") or (), classes),
        "Confusion matrix": _confusion(last_metric(run.evaluations, "confusion"), classes),
        "Classes": _of_classes(run, classes),
        "Skipped samples": _rows(
            ("epoch", "position", "sample", "why"),
            [(skipped.epoch, skipped.position, skipped.source, skipped.reason) for skipped in run.skipped],
        ),
        "Checkpoints": _rows(("file", "size", "written"), [_file(path) for path in run.checkpoints if path.exists()]),
        "What happened": _rows(("when", "what"), [(_when(e.time), told) for e in run.events if (told := _told(e))]),
        "Configuration": f'<div class="scroll"><pre>{html.escape(run.config)}</pre></div>',
    }
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections.items() if content)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}</style></head>"
        f"<body><h1>{name}</h1>{_status(run)}{_tiles(run)}{body}</body></html>\n"
    )


def _status(run: RecordedRun) -> str:
    if run.end is not None:
        kind = "failed" if run.end.reason == "failed" else ""
        why = run.end.error or run.end.why
        told = f"{run.end.reason} after step {run.end.step:,}" + (f": {why}" if why else "")
    else:
        kind = ""
        told = "no end is told: the run is under way, or was killed"
        told += f"; its last event is of {_when(run.events[-1].time)}" if run.events else ""
    return f'<p class="status {kind}">{html.escape(told)}</p>'


def _tiles(run: RecordedRun) -> str:
    figures: dict[str, str] = {}
    validated = [epoch for epoch in run.epochs if epoch.validation is not None]
    if validated:
        best = best_of(validated, "validation.accuracy")
        if best.validation is not None:
            figures["best validation accuracy"] = f"{100 * best.validation.accuracy:.2f} %, epoch {best.epoch}"
    if run.epochs:
        figures["training loss"] = f"{run.epochs[-1].loss:.4f}"
        figures["training accuracy"] = f"{100 * run.epochs[-1].accuracy:.2f} %"
    start = run.start
    figures["epochs"] = f"{len(run.epochs):,}" + (f" of {start.epochs:,}" if start and start.epochs else "")
    figures["steps"] = f"{run.steps[-1].step if run.steps else 0:,}"
    figures["time"] = _duration(run.seconds)
    figures["images/s"] = f"{run.samples_per_second:,.0f}"
    if start is not None:
        figures["parameters"] = f"{start.parameters:,}"
    told = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures.items())
    return f'<dl class="tiles">{told}</dl>'


def _curves(run: RecordedRun) -> str:
    if not run.steps:
        return ""
    try:
        from asynctrain.train import plots
    except ModuleNotFoundError as error:
        return f"<div>{_plain_curves(run, 'loss')} {_plain_curves(run, 'accuracy')}</div>{_larger(error)}"
    return plots.to_svg(plots.curves(run.epochs, run.evaluations, run.steps))


def _plain_curves(run: RecordedRun, figure: str) -> str:
    """Return the loss or the accuracy over the steps, drawn without matplotlib."""
    training = notebook.Curve()
    for step in run.steps:
        training.add(step.step, getattr(step, figure))
    tested = [(event.step, getattr(event.result, figure)) for event in run.evaluations]
    return notebook.curves(figure, {"training": training.points, "validation": tested})


def _larger(error: ModuleNotFoundError) -> str:
    """Return how one gets what is drawn with matplotlib."""
    return f"<p><small>{html.escape(str(error))}</small></p>"


def _confusion(matrix: Any, classes: Sequence[str]) -> str:
    if not matrix:
        return ""
    names = classes if len(classes) == len(matrix) else ()
    try:
        from asynctrain.train import plots
    except ModuleNotFoundError:
        told = names or [str(label) for label in range(len(matrix))]
        rows = [(f"is {name}", *row) for name, row in zip(told, matrix, strict=True)]
        return _rows(("", *(html.escape(name) for name in told)), rows)
    return f'<div class="matrix">{plots.to_svg(plots.confusion_matrix(matrix, names))}</div>'


def _of_classes(run: RecordedRun, classes: Sequence[str]) -> str:
    """Return a table of what the last evaluation found for each class."""
    metrics = run.evaluations[-1].result.metrics if run.evaluations else {}
    figures = {name: values for name, values in metrics.items() if _is_of_classes(values, len(classes))}
    rows = [(name, *(as_text(values[i]) for values in figures.values())) for i, name in enumerate(classes)]
    return _rows(("class", *map(html.escape, figures)), rows if figures else ())


def _is_of_classes(values: Any, classes: int) -> bool:
    is_list = isinstance(values, list) and len(values) == classes
    return is_list and all(isinstance(value, int | float) for value in values)


def _mistakes(worst: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> str:
    told = "".join(_mistake(mistake, classes) for mistake in only_mistakes(worst)[:MISTAKES])
    return f'<div class="mistakes">{told}</div>' if told else ""


def _mistake(mistake: Mapping[str, Any], classes: Sequence[str]) -> str:
    source = str(mistake["source"])
    seen, true = (html.escape(class_name(mistake[key], classes)) for key in ("predicted", "label"))
    caption = f"<b>{seen}</b>, is <b>{true}</b><br>loss {mistake['loss']:.2f}<br>{html.escape(Path(source).name)}"
    return f'<figure title="{html.escape(source)}">{_image(source)}<figcaption>{caption}</figcaption></figure>'


def _image(source: str) -> str:
    pixels = tile(source)
    if pixels is None:
        return '<div class="none">no image file</div>'
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _told(event: Event) -> str:
    """Return in words what happened to the run as a whole; nothing for what happens all the time."""
    match event:
        case RunStart():
            return f"started at step {event.step:,}"
        case Resumed():
            return f"went on after step {event.step:,}, attempt {event.attempt}"
        case Paused():
            return f"paused after step {event.step:,}"
        case WorkerJoined():
            return f"the worker {event.address} has joined"
        case WorkerLost():
            return f"lost the worker {event.address}: {event.reason}"
        case RunEnd():
            why = event.error or event.why
            return f"{event.reason} after step {event.step:,}" + (f": {why}" if why else "")
    return ""


def _rows(names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows[:ROWS])
    more = f"<p>and {len(rows) - ROWS:,} more</p>" if len(rows) > ROWS else ""
    whole = f'<table class="words"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return _scrolled(whole) + more


def _scrolled(content: str) -> str:
    return f'<div class="scroll">{content}</div>' if content else ""


def _file(path: Path) -> tuple[str, str, str]:
    about = path.stat()
    return path.name, f"{about.st_size / 2**20:,.2f} MiB", _when(about.st_mtime)


def _classes(run: RecordedRun) -> Sequence[str]:
    data = tomllib.loads(run.config).get("data", {})
    return [str(name) for name in data.get("classes", ())]


def _when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
