"""What the driver is given at a launch, from any number of threads."""

from __future__ import annotations

import threading

import pytest

from fourbit_cuda import driver, tensor_map
from fourbit_gpu.launcher import LaunchError
from tests.cuda.standin import PROTOTYPE, Driver


@pytest.mark.parametrize("overlapping", (False, True))
def test_what_the_driver_gets(made_up, overlapping):
    launch = made_up.kernel.bind((3, 4, 5), 256, 1000, 2, (8, 9), overlapping, maps=1)
    made_up.sizes = (128, 8, 8, 8, 8)
    for first, second in ((1 << 47, 0), (6, 7)):
        launch(bytes([first % 251]) * 128, first, second)
        fields, parameters = made_up.launches.pop()
        assert fields == (3, 4, 5, 256, 1, 1, 1000, 0x5EED, *((77, 1) if overlapping else (0, 0)))
        assert parameters == (bytes([first % 251]) * 128, first, second, 8, 9)


def test_a_launch_that_is_made_once(made_up):
    kernel = made_up.kernel
    for grid in ((1, 1, 1), (2, 1, 1), (1, 1, 1)):
        made_up.sizes = (8,) * 3
        kernel.launch(grid, 64, 0, (1, 2, 3))
        made_up.sizes = (8,) * 2
        kernel.launch(grid, 64, 0, (4, 5))
    assert [parameters for _, parameters in made_up.launches] == [(1, 2, 3), (4, 5)] * 3
    assert [fields[0] for fields, _ in made_up.launches] == [1, 1, 2, 2, 1, 1]
    assert len(kernel._bound) == 4


def test_kept_launches_are_bounded(made_up, monkeypatch):
    monkeypatch.setattr(driver, "_MOST_BOUND", 8)
    kernel, made_up.sizes = made_up.kernel, (8,)
    for i in range(1, 30):
        kernel.launch((i, 1, 1), 64, 0, (i,))
        assert len(kernel._bound) <= 8
    assert [(fields[0], *parameters) for fields, parameters in made_up.launches] == [(i, i) for i in range(1, 30)]


def test_a_thread_without_a_context_gets_one(made_up):
    launch, made_up.sizes = made_up.kernel.bind((1, 1, 1), 32, 0, 1), (8,)
    made_up.errors = [tensor_map.INVALID_CONTEXT]
    launch(5)
    assert made_up.launcher.made_current == 1 and [parameters for _, parameters in made_up.launches] == [(5,), (5,)]


def test_a_refusal_names_the_launch_and_leaves_it_usable(made_up):
    launch, made_up.sizes = made_up.kernel.bind((2, 3, 4), 32, 16, 1), (8,)
    made_up.errors = [1]
    with pytest.raises(
        LaunchError, match=r"a_kernel on made up \(cuda:0\), grid \(2, 3, 4\), 32 threads, 16 bytes.*1$"
    ):
        launch(5)
    launch(6)
    assert made_up.launches[-1][1] == (6,)


def test_threads_never_share_a_buffer(made_up):
    """Each waits in the driver until all are there."""
    count = 6
    barrier = threading.Barrier(count)
    seen, errors = set(), []
    launch = made_up.kernel.bind((1, 1, 1), 32, 0, 2)

    def slow(config, function, pointers, extra):
        barrier.wait(10)
        made_up.sizes = (8, 8)
        Driver.launch(made_up, config, function, pointers, extra)
        barrier.wait(10)
        return 0

    made_up.kernel.launch_function = PROTOTYPE(slow)

    def work(i):
        try:
            for turn in range(5):
                launch(i, turn)
                seen.add((i, turn))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert {parameters for _, parameters in made_up.launches} == seen
    assert len(seen) == len(made_up.launches) == 5 * count
    assert len(launch._free) == count
