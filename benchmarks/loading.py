"""Loading images, side by side with PyTorch's DataLoader and SPDL: ``make bench-loading``.

The images are those of the folder that ``ASYNCTRAIN_DATA`` names, unpacked once into the user's cache folder, and
generated ones where there are none. What each side does is in ``benchmarks/loaders.py``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.harness import PEERS_PYTHON, Row, child, interleave, plot, report, spread, table
from benchmarks.loaders import OURS, PEERS, Job

UNPACKED = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "asynctrain-bench"
PHOTOS, DIGITS = 400, 6000  # how many are generated

Result = dict[str, float]
Results = Mapping[str, list[Result]]

SAFELY = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 and later have it


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the comparison: asynctrain's job, and the peers' where it differs.

    Attributes:
        name: of the line.
        job: what is measured; the side is put in.
        peers: each side, with how many times better asynctrain is to be.
        peers_decoder: where the peers are given another decoder than the job's.
        slow: what share of the job's images a peer counts, so that a round is not all theirs.
    """

    name: str
    job: Job
    peers: Mapping[str, float]
    peers_decoder: str | None = None
    slow: float = 1.0

    def jobs(self) -> Iterator[Job]:
        """Yield the job of each side, asynctrain's first."""
        yield self.job
        for side in self.peers:
            own = side in OURS
            decoder = self.job.decoder if own or self.peers_decoder is None else self.peers_decoder
            images = self.job.images if own else round(self.job.images * self.slow)
            yield replace(self.job, side=side, images=images, decoder=decoder, epochs_before=0)


def cases(photos: Path, digits: Path) -> list[Case]:
    """Return the lines of the comparison."""
    photo = Job("asynctrain", str(photos), size=64, channels=3, images=3000, repeats=5)
    large = replace(photo, size=224, images=2000, repeats=4)
    digit = Job("asynctrain", str(digits), size=28, channels=1, images=15_000)
    spdl = {"SPDL native": 3.5, "SPDL Pillow": 3.5}
    cached_photo = replace(photo, images=200_000, augment=True, epochs_before=1)
    cached_digit = replace(digit, images=200_000, augment=True, epochs_before=1)
    return [
        Case("photos to 64x64, defaults", photo, {"DataLoader": 2.0, **spdl}, slow=0.5),
        Case(
            "photos to 64x64, same draft decoder",
            photo,
            {"DataLoader": 1.1, "SPDL Pillow, chunks": 1.2, "bare threads": 0.95},
            peers_decoder="draft",
        ),
        Case("photos to 224x224, defaults", large, {"DataLoader": 1.4, "SPDL native": 1.8, "SPDL Pillow": 1.8}),
        Case("28x28 PNGs, Pillow", digit, {"DataLoader": 1.3, "SPDL Pillow": 8.0}, slow=0.3),
        Case("28x28 PNGs, imagecodecs", replace(digit, decoder="imagecodecs"), {"DataLoader": 1.1}, slow=0.5),
        Case("photos to 64x64, later epochs, augmented", cached_photo, {"DataLoader": 10.0}, "pillow", 0.01),
        Case("28x28 PNGs, later epochs, augmented", cached_digit, {"DataLoader": 6.0}, "pillow", 0.05),
    ]


def memory_jobs(photos: Path, images: int) -> dict[str, Job]:
    """Return a short and a long job in which asynctrain's memory is watched."""
    job = Job("asynctrain", str(photos), size=64, channels=3, images=images, repeats=40, watched=True)
    return {"memory, short": replace(job, images=images // 8), "memory, long": job}


# The images


def photos_and_digits() -> tuple[Path, Path]:
    """Return two folders of class folders: real images if they can be had, else generated ones."""
    data = os.environ.get("ASYNCTRAIN_DATA")
    if data is None:
        print("ASYNCTRAIN_DATA is not set: the images are generated ones", file=sys.stderr)
        return made(UNPACKED / "generated-photos", write_photos), made(UNPACKED / "generated-digits", write_digits)
    photos, digits = Path(data) / "flower_photos.tar", Path(data) / "mnist.tar.xz"
    return (
        made(UNPACKED / "flower_photos_sub", partial(unpack, photos)) / "train",
        made(UNPACKED / "mnist", partial(unpack, digits)) / "train",
    )


def made(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return ``folder``, made by ``make(folder)`` unless an earlier call had finished that."""
    stamp = folder.with_suffix(".made")
    if not stamp.exists():
        folder.mkdir(parents=True, exist_ok=True)
        make(folder)
        stamp.touch()
    return folder


def unpack(pack: Path, folder: Path) -> None:
    """Unpack a tar file whose content is one folder, into ``folder``."""
    with tarfile.open(pack) as tar:
        tar.extractall(folder.parent, **SAFELY)  # type: ignore[arg-type]  # noqa: S202 - a pack of the user's own


def write_photos(folder: Path) -> None:
    """Write JPEG files of 500 x 333 pixels: blotches and grain, about as large as photos are."""
    rng = np.random.default_rng(0)
    for number in range(PHOTOS):
        path = folder / f"class-{number % 5}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (42, 63, 3), np.uint8)).resize((500, 333))
        grain = rng.integers(0, 20, (333, 500, 3), np.uint8)
        Image.fromarray(np.asarray(coarse) // 2 + 50 + grain).save(path, quality=90)


def write_digits(folder: Path) -> None:
    """Write grey PNG files of 28 x 28 pixels, about as large as those of handwritten digits."""
    rng = np.random.default_rng(0)
    for number in range(DIGITS):
        path = folder / str(number % 10) / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        image = np.zeros((28, 28), np.uint8)
        image[4:24, 8:20] = rng.integers(0, 256, (20, 12), np.uint8) * rng.integers(0, 2, (20, 12), np.uint8)
        Image.fromarray(image).save(path)


# The figures


def run(job: Job) -> Result:
    """Run a job in a process of its own, in its side's environment."""
    python = sys.executable if job.side in OURS else PEERS_PYTHON
    result: Result = child("benchmarks.loaders", job.to_json(), python=python)
    return result


def rows_of(case: Case, results: Results) -> Iterator[Row]:
    """Yield a row for each peer and each of the speed, the CPU time and the memory."""
    ours = results[label(case, case.job.side)]
    for side, target in case.peers.items():
        theirs = results.get(label(case, side))
        yield compared(case.name, "images/s", ours, theirs, side, f"{target:g}x")
        if theirs:
            yield compared(case.name, "CPU us/image", ours, theirs, side)
            yield compared(case.name, "memory, MB", ours, theirs, side)


FIGURES = {  # by metric: the key in a result, what it is multiplied by, whether more is better
    "images/s": ("images_per_second", 1.0, True),
    "CPU us/image": ("cpu_per_image", 1e6, False),
    "memory, MB": ("memory", 1e-6, False),
}


def compared(
    case: str, metric: str, ours: list[Result], theirs: list[Result] | None, side: str, target: str = ""
) -> Row:
    """Return the row of one figure, a median on either side; ``target`` is ``"2x"`` or nothing."""
    key, unit, more_is_better = FIGURES[metric]
    own, own_spread = median(ours, key) * unit, spread([result[key] for result in ours])
    if theirs is None:
        return Row(case, metric, own, None, side, None, own_spread, target, None)
    other = median(theirs, key) * unit
    ratio = own / other if more_is_better else other / own
    met = ratio >= float(target.removesuffix("x")) if target else None
    return Row(case, metric, own, other, side, ratio, own_spread, target, met)


def memory_rows(results: Results, allowed: float = 4e6) -> Iterator[Row]:
    """Yield whether memory is constant but for ``allowed`` bytes of noise, and within the bound that is stated."""
    short, long = results["memory, short"], results["memory, long"]
    taken = [result["memory"] - result["memory_before"] for result in long]
    own, stated, earlier = statistics.median(taken), median(long, "bound"), median(short, "memory")
    grown = median(long, "memory") - earlier
    after = "after 8 times as many images"
    megabytes = (median(long, "memory") / 1e6, earlier / 1e6)
    ratio, target = megabytes[1] / megabytes[0], f"at most {allowed / 1e6:g} MB more"
    yield Row(f"memory {after}", "MB", *megabytes, "before", ratio, spread(taken), target, grown <= allowed)
    within = ("the bound", stated / own, spread(taken), "1x", own <= stated)
    yield Row("memory taken by a stream, at its peak", "MB", own / 1e6, stated / 1e6, *within)


def median(results: list[Result], key: str) -> float:
    """Return the median of one figure."""
    return statistics.median(one[key] for one in results)


def label(case: Case, side: str) -> str:
    """Return the name under which a side of a case is run."""
    return f"{case.name}: {side}"


def left_out() -> tuple[dict[str, str], dict[str, str]]:
    """Return why which peers cannot be run, and the versions of the others."""
    if not PEERS_PYTHON.exists():
        return dict.fromkeys(PEERS, "there is no .venv-peers (make bench-loading makes it)"), {}
    about = child("benchmarks.loaders", "--about", python=PEERS_PYTHON)
    return {side: why for side, why in about["missing"].items() if why and side in PEERS}, about["versions"]


def main() -> None:
    """Run the rounds of all cases, or of those whose name has ``--only`` in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds, a fifth of the images, for a look")
    parser.add_argument("--only", default="", help="the cases whose name has this in it; writes no results")
    arguments = parser.parse_args()
    photos, digits = photos_and_digits()
    without, versions = left_out()
    share, rounds = (0.2, 2) if arguments.quick else (1.0, 10)
    chosen = [case for case in cases(photos, digits) if arguments.only in case.name]
    runs = {
        label(case, job.side): partial(run, replace(job, images=round(job.images * share)))
        for case in chosen
        for job in case.jobs()
        if job.side not in without
    }
    if arguments.only:
        results = interleave(runs, rounds)
        print(table([row for case in chosen for row in rows_of(case, results)]))
        return
    watched = {name: partial(run, job) for name, job in memory_jobs(photos, round(20_000 * share)).items()}
    results = interleave(runs | watched, rounds)
    rows = [*(row for case in chosen for row in rows_of(case, results)), *memory_rows(results)]
    versions |= child("benchmarks.loaders", "--about")["versions"]
    report("loading", rows, versions, [f"{side} is left out: {why}" for side, why in without.items()])
    plot("loading")


if __name__ == "__main__":
    main()
