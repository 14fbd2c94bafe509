"""A classifier that learns inside an aiohttp application: one run, in the hands of whoever calls.

python examples/aiohttp_service.py flowers/ --port 8080

    curl -X POST localhost:8080/run                   start, or go on
    curl localhost:8080/run                           how far it is
    curl -X POST localhost:8080/run/pause             and resume, stop, cancel
    curl --data-binary @rose.jpg localhost:8080/predict
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import uvloop
from aiohttp import web

import asynctrain as at

RUN = web.AppKey("run", list[at.Run])  # the one of now, if there is one
STARTING = web.AppKey("starting", asyncio.Lock)
TASKS = web.AppKey("tasks", asyncio.TaskGroup)
FOLDER = web.AppKey("folder", Path)
routes = web.RouteTableDef()


async def learn(app: web.Application, data: at.ImageFolder, begun: asyncio.Future[at.Run]) -> None:
    """Train to the end, or go on with the run that was interrupted."""
    train, held_out = data.split(0.8, seed=0)
    loader = at.Loader(
        train, batch_size=32, image_size=(32, 32), augment=at.augment.standard(), errors="skip", max_skipped=0.5, seed=0
    )
    model = at.models.small_cnn(num_classes=len(data.classes), image_shape=(32, 32, 3))
    run_dir = app[FOLDER].with_suffix(".run")
    try:
        async with at.ThreadExecutor() as executor:
            trainer = at.Trainer(model, optimizer=at.optim.adamw(3e-3), executor=executor)
            async with trainer.start(loader, epochs=50, validate=held_out, run_dir=run_dir, resume=True) as run:
                begun.set_result(run)
                await asyncio.wait([run.task])
    except Exception as error:  # the application goes on
        logging.exception("the run has failed")
        if not begun.done():
            begun.set_exception(error)


def current(request: web.Request) -> at.Run:
    """Return the run of now."""
    if not request.app[RUN]:
        raise web.HTTPConflict(text="no run was started yet")
    return request.app[RUN][0]


@routes.post("/run")
async def start(request: web.Request) -> web.Response:
    """Start the run, or take it up where it was."""
    app = request.app
    async with app[STARTING]:
        if any(not run.task.done() for run in app[RUN]):
            raise web.HTTPConflict(text="the run is under way")
        begun: asyncio.Future[at.Run] = asyncio.get_running_loop().create_future()
        try:
            data = await asyncio.to_thread(at.ImageFolder, app[FOLDER])
            app[TASKS].create_task(learn(app, data, begun), name="learn")
            app[RUN][:] = [await begun]
        except (at.errors.AsyncTrainError, ValueError) as error:
            raise web.HTTPUnprocessableEntity(text=str(error)) from error
    return web.json_response(current(request).progress.to_json(), status=201)


@routes.get("/run")
async def progress(request: web.Request) -> web.Response:
    """Tell how far it is."""
    return web.json_response(current(request).progress.to_json())


@routes.post("/run/{verb:pause|resume|stop|cancel}")
async def steer(request: web.Request) -> web.Response:
    """Do with the run what the address says."""
    run = current(request)
    with contextlib.suppress(at.errors.AsyncTrainError):  # of a run that has failed
        done = getattr(run, request.match_info["verb"])()
        if asyncio.iscoroutine(done):
            await done
    return web.json_response(run.progress.to_json())


@routes.post("/predict")
async def predict(request: web.Request) -> web.Response:
    """Tell what is on the image in the body, with the weights of this moment."""
    try:
        found = await current(request).snapshot().predict(await request.read())
    except at.errors.DecodeError as error:
        raise web.HTTPUnprocessableEntity(text=str(error)) from error
    return web.json_response({"label": found.label, "probability": found.probability, "top": found.top})


async def tasks(app: web.Application) -> AsyncIterator[None]:
    """Own what learns; at a shutdown it is cancelled, and leaves a checkpoint."""
    async with asyncio.TaskGroup() as app[TASKS]:
        yield
        for run in app[RUN]:
            await run.cancel()


def create_app(folder: Path) -> web.Application:
    """Return the application that learns from ``folder``, which has a folder per class."""
    app = web.Application(client_max_size=32 * 2**20)
    app[FOLDER], app[RUN], app[STARTING] = folder, [], asyncio.Lock()
    app.cleanup_ctx.append(tasks)
    app.add_routes(routes)
    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args()
    web.run_app(create_app(options.folder), host="127.0.0.1", port=options.port, loop=uvloop.new_event_loop())
