"""An image classifier that learns inside a FastAPI application, in the application's own event loop.

uvicorn --factory examples.fastapi_service.app:create_app --loop uvloop --timeout-graceful-shutdown 2

The environment tells where things are kept (``STUDIO_HOME``, by default ``studio/``), on how many threads it trains
(``STUDIO_THREADS``, by default one for each CPU) and with which kernels (``STUDIO_KERNELS``, ``numpy`` or ``numba``).
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Request, UploadFile
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

import asynctrain as at
from examples.fastapi_service.service import NotNow, Order, Service

PAGE = Path(__file__).with_name("page.html")


async def _service(request: Request) -> Service:  # FastAPI would call a plain function in a thread, for each request
    service: Service = request.app.state.service
    return service


Ours = Annotated[Service, Depends(_service)]
routes = APIRouter()


@routes.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """Show the page."""
    return FileResponse(PAGE)


@routes.post("/images")
async def upload(service: Ours, files: list[UploadFile], label: str = "") -> dict[str, int]:
    """Keep images of the class ``label``, or zips with a folder per class; the server has spooled them to disk."""
    for file in files:
        await asyncio.to_thread(service.images.keep, file.file, file.filename or "", label)
    return await asyncio.to_thread(service.images.counts)


@routes.get("/images")
async def images(service: Ours) -> dict[str, int]:
    """Tell how many images each class has."""
    return await asyncio.to_thread(service.images.counts)


@routes.delete("/images/{label}")
async def forget(service: Ours, label: str) -> dict[str, int]:
    """Forget a class and its images; a run under way goes on without those it has not read."""
    await asyncio.to_thread(service.images.remove, label)
    return await asyncio.to_thread(service.images.counts)


@routes.post("/run", status_code=201)
async def start(service: Ours, order: Order) -> dict[str, str]:
    """Start to train on the images that are there."""
    return {"run": await service.start(order)}


@routes.get("/run")
async def progress(service: Ours) -> dict[str, Any]:
    """Tell how far the run is, and what holds its pipeline up."""
    run = service.current()
    return {"run": service.name, "error": service.error, **run.progress.to_json()}


@routes.get("/run/events")
async def events(service: Ours, last_event_id: Annotated[str, Header()] = "") -> StreamingResponse:
    """Stream the events of this run and the next ones; after ``Last-Event-ID`` where that is given."""
    name, _, number = last_event_id.rpartition("-")
    following = service.follow(name, int(number) + 1 if number.isdecimal() else 0)
    return StreamingResponse(
        _messages(following), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


async def _messages(events: AsyncIterator[tuple[str, at.events.Event]]) -> AsyncIterator[str]:
    async for run, event in events:
        told = at.events.to_json(event) | {"run": run}
        yield f"id: {run}-{event.number}\ndata: {json.dumps(told)}\n\n"


@routes.post("/run/pause")
async def pause(service: Ours) -> dict[str, int]:
    """Let the run wait after its step; answers when it does."""
    return {"step": await service.current().pause()}


@routes.post("/run/resume")
async def resume(service: Ours) -> dict[str, int]:
    """Let it go on."""
    service.current().resume()
    return {"step": service.current().progress.step}


@routes.post("/run/stop")
async def stop(service: Ours) -> dict[str, Any]:
    """End the run after its step, normally."""
    history = await service.stop()
    return {"step": history.state.step, "reason": history.reason}


@routes.post("/run/cancel")
async def cancel(service: Ours) -> dict[str, int]:
    """Stop its computing at once."""
    await service.current().cancel()
    return {"step": service.current().progress.step}


@routes.post("/predict")
async def predict(service: Ours, request: Request) -> at.Prediction:
    """Tell what is on the image in the body, by the weights of this moment, while the run goes on."""
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > service.images.largest:
            raise ValueError(f"an image may have {service.images.largest} bytes, and this one has more")
    return await service.classifier().predict(bytes(content))


@routes.get("/model")
async def model(service: Ours) -> Response:
    """Give away the weights of this moment as one file, which ``asynctrain predict`` and Python can use."""
    content = await asyncio.to_thread(service.classifier().to_bytes)
    headers = {"Content-Disposition": f'attachment; filename="{service.name}.safetensors"'}
    return Response(content, media_type="application/octet-stream", headers=headers)


async def not_now(request: Request, error: Exception) -> JSONResponse:
    """Answer what does not fit the moment."""
    return JSONResponse({"detail": str(error)}, status_code=409)


async def wrong(request: Request, error: Exception) -> JSONResponse:
    """Answer what is wrong with what was sent."""
    return JSONResponse({"detail": str(error)}, status_code=422)


async def gone(request: Request, error: Exception) -> Response:
    """Answer nobody: the client has gone amid its request."""
    return Response(status_code=499)


def create_app(home: Path | None = None) -> FastAPI:
    """Return the application; what it has learned and is learning lives in ``home``."""
    threads, kernels = int(os.environ.get("STUDIO_THREADS", 0)) or None, os.environ.get("STUDIO_KERNELS", "numpy")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        place = home or Path(os.environ.get("STUDIO_HOME", "studio"))
        async with Service(place, threads, kernels) as app.state.service:
            gc.freeze()  # what was imported stays: collections need not look at it again while requests wait
            yield  # a run that was interrupted goes on, and at a shutdown it leaves a checkpoint

    handlers: dict[int | type[Exception], Any] = {
        NotNow: not_now,
        ValueError: wrong,
        at.errors.DataError: wrong,
        ClientDisconnect: gone,
    }
    app = FastAPI(title="A studio for image classifiers", lifespan=lifespan, exception_handlers=handlers)
    app.include_router(routes)
    return app
