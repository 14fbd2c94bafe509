"""An optimizer with all of its learning rates scaled, as a plateau asks for."""

from __future__ import annotations

import numpy as np
import pytest

from asynctrain import optim
from asynctrain.optim.transforms import Optimizer, Transform, rescaled

PARAMS = {"body/weight": np.linspace(-1, 1, 6).reshape(2, 3), "head/weight": np.ones((2, 2))}
GRADS = {name: 0.3 * array + 0.1 for name, array in PARAMS.items()}


@pytest.mark.parametrize(
    "optimizer",
    [
        optim.sgd(0.1, momentum=0.9),
        optim.adamw(optim.cosine(1e-2, steps=9, warmup=2)),
        optim.chain(optim.clip_by_global_norm(0.5), optim.rmsprop(1e-2)),
        optim.groups({"head/*": optim.sgd(0.5), "*": optim.adam(optim.linear(0.1, steps=5))}),
        optim.freeze(optim.accumulate(optim.nadam(1e-3), 2), "head/*"),
        optim.average_weights(optim.adagrad(0.2)),
    ],
    ids=lambda optimizer: optimizer.name,
)
def test_every_update_is_scaled_and_the_state_the_same_as_without(optimizer: Optimizer) -> None:
    state, slower = optimizer.init(PARAMS), rescaled(optimizer, 0.25)
    for step in range(4):
        updates, after = optimizer.update(GRADS, state, PARAMS, step)
        scaled, scaled_after = slower.update(GRADS, state, PARAMS, step)
        for name, update in updates.items():
            np.testing.assert_allclose(scaled[name], 0.25 * update, rtol=1e-12)
        for slot in {*optimizer.slots} - {"average"}:  # the mean of the weights follows the smaller steps
            for name, array in after[slot].items():
                np.testing.assert_array_equal(scaled_after[slot][name], array)
        state = after


def test_the_mean_of_the_weights_follows_the_smaller_steps() -> None:
    optimizer = optim.average_weights(optim.sgd(0.4), decay=0.5)
    plain = optim.average_weights(optim.sgd(0.1), decay=0.5)
    _, expected = plain.update(GRADS, plain.init(PARAMS), PARAMS, 0)
    _, found = rescaled(optimizer, 0.25).update(GRADS, optimizer.init(PARAMS), PARAMS, 0)
    np.testing.assert_allclose(found["average"]["body/weight"], expected["average"]["body/weight"], rtol=1e-12)


def test_an_optimizer_of_ones_own_cannot_be_rescaled() -> None:
    own = Transform(lambda params: {}, lambda updates, state, params, step: (updates, state))
    with pytest.raises(TypeError, match=r"optimizer must be made of the functions .* to be rescaled"):
        rescaled(own, 0.5)
