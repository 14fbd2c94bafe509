"""The gradient worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from asynctrain import nn
from asynctrain.arena import Array
from asynctrain.executors.blas import find_blas, one_blas_thread
from asynctrain.executors.worker import GradientWorker, StopFlag, Stopped
from asynctrain.types import ForwardWork, GradientWork, Normalization, Program

MODEL = nn.Model(
    [nn.Conv2D(3, 3), nn.ReLU(), nn.MaxPool2D(2), nn.Flatten(), nn.Dropout(0.5), nn.Dense(4)], input_shape=(6, 6, 1)
)
PROGRAM = Program(MODEL.to_json(), dtype="float64", seed=5)
PARAMS = MODEL.init(0, "float64")
RNG = np.random.default_rng(1)
IMAGES = RNG.integers(0, 256, (6, 6, 6, 1), dtype=np.uint8)
LABELS = RNG.integers(0, 4, 6)


@pytest.fixture(autouse=True)
def guard() -> Iterator[None]:
    with one_blas_thread(find_blas()):
        yield


def work(step: int = 0, microbatch: int = 0) -> GradientWork:
    return GradientWork(step, microbatch, 1, IMAGES, LABELS)


def test_equal_work_gives_equal_bits_and_another_microbatch_other_dropout() -> None:
    worker = GradientWorker(PROGRAM)
    first, again, other = (
        worker.gradients(PARAMS, work(microbatch=m), StopFlag()).gradients.vector.tobytes() for m in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_the_gradient_is_the_slope_of_the_loss() -> None:
    worker = GradientWorker(PROGRAM)  # dropout is keyed, so the loss is a plain function of the parameters
    gradients = worker.gradients(PARAMS, work(), StopFlag()).gradients

    def loss(name: str, index: tuple[int, ...], shift: float) -> float:
        params = PARAMS.copy()
        params[name][index] += shift
        return worker.gradients(params, work(), StopFlag()).sums.loss

    for name, array in PARAMS.items():
        index = tuple(int(RNG.integers(0, size)) for size in array.shape)
        slope = (loss(name, index, 1e-6) - loss(name, index, -1e-6)) / 2e-6
        np.testing.assert_allclose(gradients[name][index], slope, rtol=1e-6, atol=1e-8)


def test_sums_tell_loss_weight_samples_and_hits() -> None:
    worker = GradientWorker(PROGRAM)
    result = worker.forward(PARAMS, {}, ForwardWork(IMAGES, LABELS), StopFlag())
    shifted = result.outputs - result.outputs.max(axis=1, keepdims=True)
    log_likelihood = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(result.sums.loss, -log_likelihood[np.arange(6), LABELS].sum(), rtol=1e-12)
    assert (result.sums.weight, result.sums.samples) == (6, 6)
    assert result.sums.counts["correct"] == (result.outputs.argmax(axis=1) == LABELS).sum()


def test_pixels_are_normalized_as_the_program_says() -> None:
    linear = nn.Model([nn.Flatten(), nn.Dense(2)], input_shape=(1, 1, 1))
    params = linear.init(0, "float64").copy()
    params["dense1/weight"][...] = [[1.0, 0.0]]
    params["dense1/bias"][...] = 0
    worker = GradientWorker(Program(linear.to_json(), normalization=Normalization(0.1, 0.2), dtype="float64"))
    outputs = worker.forward(params, {}, ForwardWork(np.array([[[[51]]]], np.uint8)), StopFlag()).outputs
    np.testing.assert_allclose(outputs[0, 0], (51 / 255 - 0.1) / 0.2, rtol=1e-12)


def test_a_set_flag_stops_the_work_before_any_kernel() -> None:
    stop = StopFlag()
    stop.set()
    with pytest.raises(Stopped):
        GradientWorker(PROGRAM).gradients(PARAMS, work(), stop)


def test_weight_gradients_done_later_and_backwards_have_the_same_bits() -> None:
    worker = GradientWorker(PROGRAM)
    at_once = worker.gradients(PARAMS, work(), StopFlag()).gradients.vector.tobytes()
    jobs: list[Callable[[], None]] = []
    later = worker.gradients(PARAMS, work(), StopFlag(), jobs.append)
    assert len(jobs) == 2, "one job for each layer that has parameters"
    for job in reversed(jobs):
        job()
    assert later.gradients.vector.tobytes() == at_once


def test_released_arrays_serve_the_next_work_and_others_are_left_alone() -> None:
    worker = GradientWorker(PROGRAM)
    first = worker.gradients(PARAMS, work(), StopFlag())
    second = worker.gradients(PARAMS, work(), StopFlag())
    assert second.gradients.vector is not first.gradients.vector
    first.release()
    third = worker.gradients(PARAMS, work(), StopFlag())
    assert third.gradients.vector is first.gradients.vector


@pytest.mark.parametrize("images", [IMAGES.astype(np.float32), IMAGES[:, ::2]])
def test_images_that_are_no_contiguous_bytes_are_refused(images: Array) -> None:
    with pytest.raises(ValueError, match="images must be C-contiguous uint8, got"):
        GradientWorker(PROGRAM).forward(PARAMS, {}, ForwardWork(images), StopFlag())
