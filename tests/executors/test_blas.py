"""The process-wide BLAS guard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from threadpoolctl import ThreadpoolController

from asynctrain.errors import ExecutorError
from asynctrain.executors.blas import check_one_blas_thread, find_blas, one_blas_thread


def count() -> int:
    return int(ThreadpoolController().select(user_api="blas").lib_controllers[0].get_num_threads())


@pytest.fixture
def set_count() -> Iterator[Callable[[int], None]]:
    """Set the count as a user would (threadpoolctl may obey one thread only: its underscored method goes past that)."""
    library = ThreadpoolController().select(user_api="blas").lib_controllers[0]
    setter = getattr(library, "_real_set_num_threads", library.set_num_threads)
    before = count()
    setter(2)
    yield setter
    setter(before)


def test_the_count_is_one_while_held_and_what_it_was_before_afterwards(set_count: Callable[[int], None]) -> None:
    with one_blas_thread(find_blas()):
        assert count() == 1
    assert count() == 2


@pytest.mark.parametrize("first_out", [0, 1])
def test_overlapping_holders_may_end_in_either_order(first_out: int, set_count: Callable[[int], None]) -> None:
    stacks = [ExitStack(), ExitStack()]
    for stack in stacks:
        stack.enter_context(one_blas_thread(find_blas()))
    stacks[first_out].close()
    assert count() == 1, "the holder that is left still computes"
    stacks[1 - first_out].close()
    assert count() == 2


def test_it_works_from_a_thread_after_another_thread_has_set_the_count(set_count: Callable[[int], None]) -> None:
    def hold() -> int:
        with one_blas_thread(find_blas()):
            return count()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(hold).result() == 1
    assert count() == 2


def test_a_count_changed_under_the_guard_is_an_error_that_says_so(set_count: Callable[[int], None]) -> None:
    with one_blas_thread(find_blas()):
        check_one_blas_thread()
        set_count(2)
        with pytest.raises(ExecutorError, match="BLAS was set to 2 threads while a session runs on one"):
            check_one_blas_thread()
