"""The commands and their options."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

import asynctrain as at
from asynctrain.cli import demo as demos
from asynctrain.cli import info as infos
from asynctrain.cli import report as reports
from asynctrain.cli import serve as serving
from asynctrain.cli import train as training
from asynctrain.cli import use
from asynctrain.cli import workers as working
from asynctrain.cli.homes import make_executor
from asynctrain.cli.process import run
from asynctrain.cli.recipe import ERRORS, OPTIMIZERS, Recipe
from asynctrain.nn.kernels.choice import get as get_kernels
from asynctrain.train.run_folder import CONFIG, RunFolder

MENTIONED = 5  # runs, at most, where a name is none

app = typer.Typer(
    help="Train image classifiers from folders of images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _known_model(name: str) -> str:
    try:
        at.models.get(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return name


def _known_optimizer(name: str) -> str:
    if name not in OPTIMIZERS:
        raise typer.BadParameter(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
    return name


def _known_executor(text: str) -> str:
    try:
        make_executor(text)
    except (ValueError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    return text


def _known_kernels(name: str) -> str:
    try:
        get_kernels(name)
    except (ValueError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error
    return name


def _known_errors(policy: str) -> str:
    if policy not in ERRORS:
        raise typer.BadParameter(f"errors must be one of {', '.join(ERRORS)}, got {policy!r}")
    return policy


def _between_0_and_1(share: float) -> float:
    if not 0 < share < 1:
        raise typer.BadParameter(f"holdout must be between 0 and 1, both excluded, got {share}")
    return share


def _options_from(context: typer.Context, config: Path | None) -> Path | None:
    """Let the section [train] of a file say what the options are that are not given."""
    if config is None:
        return None
    if context.default_map:
        raise typer.BadParameter("--config and --resume exclude each other: the run to resume has a configuration")
    try:
        options = tomllib.loads(config.read_text(encoding="utf-8")).get("train")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise typer.BadParameter(f"{config} must be a readable TOML file: {reason}") from error
    if not isinstance(options, dict):
        raise typer.BadParameter(f"{config} must have a section [train] with options of this command")
    known = {option.name for option in fields(Recipe)}
    if unknown := options.keys() - known:
        raise typer.BadParameter(
            f"[train] in {config} must have none but {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}"
        )
    context.default_map = _as_typed(options)
    return config


def _as_typed(options: dict[str, Any]) -> dict[str, str]:
    """Return options as if they had been typed, so that they are checked as these are."""
    return {name: str(value) for name, value in options.items()}


def _options_of_run(context: typer.Context, resume: Path | None) -> Path | None:
    """Let the configuration of the run to resume say what the options are that are not given."""
    if resume is not None:
        run_dir = training.run_dir_of(resume)
        if not RunFolder(run_dir).holds_run():
            runs = sorted(str(path) for path in resume.glob("*") if RunFolder(path).holds_run())
            there = f"; there are {', '.join(runs[-MENTIONED:])}" if runs else ""
            raise typer.BadParameter(f"{resume} is neither the folder of a run nor a checkpoint in one{there}")
        _options_from(context, run_dir / CONFIG)
    return resume


Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on standard output.")]
Out = Annotated[Path | None, typer.Option(metavar="RUN_DIR", help="A new folder for the run; by default under runs/.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same weights, bit for bit.")]
Where = Annotated[
    str,
    typer.Option(
        "--executor",
        callback=_known_executor,
        help="Where to compute: threads, threads:2, processes:2, inline, dask, dask:tcp://HOST:PORT, "
        "grpc://HOST:PORT, or grpc://listen:HOST:PORT.",
    ),
]
ModelFile = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A model that asynctrain has written, or the folder of its run.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in a step.")]


@app.command()
def demo(seed: Seed = 0, executor: Where = "threads", out: Out = None, json: Json = False) -> None:
    """Train on 1,797 handwritten digits, from image files, in less than a minute."""
    run(lambda: demos.demo(seed, executor, out, json))


@app.command()
def train(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="A folder of images per class, or train/ and test/ (or val/) with these."),
    ] = None,
    model: Annotated[
        str, typer.Option(callback=_known_model, help=f"One of {', '.join(at.models.NAMES)}.")
    ] = "small_cnn",
    epochs: Annotated[int | None, typer.Option(min=1, help="By default about 2,000 steps, but 5 to 40 epochs.")] = None,
    batch_size: BatchSize = 64,
    microbatch: Annotated[
        int | None,
        typer.Option(min=1, help="The most images that one worker takes at once; else half a batch, 32 to 64."),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Height and width in pixels; by default the images' own, at most 64.")
    ] = None,
    lr: Annotated[float | None, typer.Option(min=0.0, help="The highest learning rate.")] = None,
    optimizer: Annotated[str, typer.Option(callback=_known_optimizer, help="adamw, adam or sgd.")] = "adamw",
    holdout: Annotated[
        float,
        typer.Option(
            callback=_between_0_and_1, help="The share of each class to test with, where DIR has no test folder."
        ),
    ] = 0.2,
    patience: Annotated[
        int | None, typer.Option(min=1, help="End after so many epochs without a lower test loss, with the best one's.")
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Save after so many steps; by default each epoch and each minute.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.0, help="Stop after that time; --resume goes on from there.")
    ] = None,
    seed: Seed = 0,
    executor: Where = "threads",
    kernels: Annotated[
        str, typer.Option(callback=_known_kernels, help="What computes: numpy, or the faster numba (an extra).")
    ] = "numpy",
    augment: Annotated[
        bool, typer.Option("--augment", help="Flip, move and tint images a little; for photos, where there are few.")
    ] = False,
    errors: Annotated[
        str, typer.Option(callback=_known_errors, help="What a broken image does: raise (end), or skip (and tell).")
    ] = "raise",
    out: Out = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_DIR",
            is_eager=True,
            callback=_options_of_run,
            help="Go on with an interrupted run, in mid-epoch too, with its options.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            is_eager=True,
            callback=_options_from,
            help=r"Take options from \[train] in a TOML file, such as a run's config.toml; flags override them.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Train a classifier on a folder of images."""
    if folder is None:
        raise typer.BadParameter("DIR must be given, or be the folder in the section [train] of a --config")
    recipe = Recipe(
        folder=folder,
        model=model,
        epochs=epochs,
        batch_size=batch_size,
        microbatch=microbatch,
        image_size=image_size,
        lr=lr,
        optimizer=optimizer,
        holdout=holdout,
        patience=patience,
        checkpoint_every=checkpoint_every,
        seconds=seconds,
        seed=seed,
        executor=executor,
        kernels=kernels,
        augment=augment,
        errors=errors,
    )
    run(lambda: training.train_folder(recipe, out, resume, json))


@app.command()
def evaluate(
    model: ModelFile,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Images in folders named as the model's classes.")],
    batch_size: BatchSize = 64,
    executor: Where = "threads",
    json: Json = False,
) -> None:
    """Measure how well a model recognises labelled images."""
    run(lambda: use.evaluate(model, folder, batch_size, executor, json))


@app.command()
def predict(
    model: ModelFile,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to name for each image.")] = 3,
    json: Json = False,
) -> None:
    """Say what is on images."""
    run(lambda: use.predict(model, images, top, json))


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run, under way or ended.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page; by default report.html in the run's folder.")
    ] = None,
    json: Json = False,
) -> None:
    """Show a run as one HTML page: curves, epochs, mistakes, checkpoints, configuration."""
    run(lambda: reports.report(run_dir, out, json))


@app.command()
def serve(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder for the runs, which go on from there.")],
    grpc: Annotated[bool, typer.Option("--grpc", help="Serve asynctrain.proto (extra grpc).")] = False,
    host: Annotated[str, typer.Option(help="An address of this machine, or unix:PATH.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 for any that is free.")] = 50_051,
    executor: Where = "threads",
    limits: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A TOML file of limits; see the documentation.")
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Lines NAME TOKEN, of which each call must have one; or $ASYNCTRAIN_TOKENS."),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="The server's certificate, in PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="The certificate's key, in PEM.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Ask clients for certificates of this authority, in PEM.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let other machines connect without encryption.")
    ] = False,
    reflection: Annotated[bool, typer.Option("--reflection", help="Describe the services to whoever asks.")] = False,
    grace: Annotated[float, typer.Option(min=0.0, help="Seconds to save what trains when the server ends.")] = 30.0,
    json: Json = False,
) -> None:
    """Train for clients in any language, over the network."""
    if not grpc:
        raise typer.BadParameter("say which service: --grpc")
    service = serving.Service(
        folder=folder,
        host=host,
        port=port,
        executor=executor,
        limits=limits,
        tokens=tokens,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        insecure=insecure,
        reflection=reflection,
        grace=grace,
    )
    run(lambda: serving.serve(service, json))


@app.command()
def worker(
    connect: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Dial a coordinator, and again whenever it is lost.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Wait for coordinators; port 0 for any that is free.")
    ] = None,
    executor: Where = "threads",
    name: Annotated[str | None, typer.Option(help="What coordinators call it; by default host and process.")] = None,
    capacity: Annotated[
        int | None, typer.Option(min=1, help="Pieces of work at once; by default one for each CPU.")
    ] = None,
    token: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The token to show when dialling; or $ASYNCTRAIN_TOKEN."),
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Lines NAME TOKEN, of which those who dial must have one; or $ASYNCTRAIN_TOKENS."
        ),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="Our certificate, in PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="The certificate's key, in PEM.")] = None,
    tls_ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Whose certificates we accept from the other side, in PEM.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Work with other machines without encryption.")] = False,
    grace: Annotated[float, typer.Option(min=0.0, help="Seconds to finish what is computed when it ends.")] = 30.0,
    json: Json = False,
) -> None:
    """Compute gradients for trainings on other machines."""
    if (connect is None) == (listen is None):
        raise typer.BadParameter("say either --connect or --listen")
    role = working.Role(
        connect=connect,
        listen=listen,
        executor=executor,
        name=name,
        capacity=capacity,
        token=token,
        tokens=tokens,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_ca=tls_ca,
        insecure=insecure,
        grace=grace,
    )
    run(lambda: working.work(role, json))


@app.command()
def info(json: Json = False) -> None:
    """Tell versions, loop, CPUs and numeric fingerprint, for bug reports."""
    run(lambda: infos.info(json))
