"""The conformance suite, which every backend is run against, built in or third party:

    pytest --pyargs fourbit.testing --backend NAME [--device DEVICE]

It compares the backend with the reference's plain torch methods, called directly and on the CPU. What the
backend's `supports` declines is a skip with the backend's own reason. `--device` defaults to the first of
the backend's device types that this machine has; a backend for any device is tested on the CPU.

Environment: FOURBIT_TEST_HUGE=1 also runs tensors of more than 2^31 elements (about 8 GB of memory).

Each `test_*.py` names in `COVERS` the ops that it tests. The helpers:

- `fixtures.py`: the fixtures `backend` and `device`; `need`, which turns a declined query into a skip.
- `inputs.py`: weights chosen to hurt.
- `oracle.py`: what the reference makes of an input, comparison bit for bit, and error bounds.
"""
