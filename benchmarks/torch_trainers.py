"""PyTorch's side of ``benchmarks/trainers.py``: a script as its tutorial has it, and the same one tuned.

Both read a folder with Pillow as ``torchvision.datasets.ImageFolder`` does, and do ``Resize``, ``ToTensor`` and
``Normalize`` to each image; these are written out, so that importing torchvision is not counted. Tuned are the number
of workers, which live on between epochs, and of threads, and images and network are channels last.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import networks
from benchmarks.trainers import TUNED, Job, Tested, spread_over


class Images:
    """The images of class folders, each read and made a tensor when it is asked for."""

    def __init__(self, job: Job, part: str) -> None:
        classes = sorted(path for path in Path(job.folder, part).iterdir() if path.is_dir())
        samples = [(str(file), label) for label, path in enumerate(classes) for file in sorted(path.iterdir())]
        chosen = range(len(samples)) if job.images is None else spread_over(len(samples), job.images)
        self._samples = [samples[index] for index in chosen]
        self._mode = "L" if job.channels == 1 else "RGB"
        self._size = (job.size, job.size)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self._samples[index]
        with open(path, "rb") as file:  # noqa: PTH123 - as torchvision has it
            image = Image.open(file).convert(self._mode)
        if image.size != self._size:
            image = image.resize(self._size, Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).view(*self._size, -1)
        return pixels.permute(2, 0, 1).contiguous().float().div(255).sub_(0.5).div_(0.25), label


def train(job: Job) -> Tested:
    """Train and test."""
    torch.manual_seed(job.seed)
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    tuned = job.side == TUNED
    layout = torch.channels_last if tuned else torch.contiguous_format
    options: dict[str, Any] = {"batch_size": job.batch, "num_workers": job.workers}
    if tuned and job.workers:
        options["persistent_workers"] = True
    batches = torch.utils.data.DataLoader(Images(job, "train"), shuffle=True, **options)
    model = initial_network(job).to(memory_format=layout)
    optimizer = torch.optim.Adam(model.parameters(), lr=job.rate)
    loss_of = torch.nn.CrossEntropyLoss()
    for _ in range(job.epochs):
        for images, labels in batches:
            loss = loss_of(model(images.to(memory_format=layout)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    right = tested = 0
    with torch.inference_mode():
        for images, labels in torch.utils.data.DataLoader(Images(job, "test"), **options):
            right += int((model(images.to(memory_format=layout)).argmax(1) == labels).sum())
            tested += len(labels)
    return {"accuracy": right / tested, "tested": tested}


def initial_network(job: Job) -> torch.nn.Module:
    """Return the network with the parameters that asynctrain begins with."""
    with np.load(job.initial) as file:
        arrays = dict(file)
    model = networks.twin(json.loads(str(arrays.pop("architecture"))))
    return networks.load(model, arrays, {})
