"""Import time, in fresh processes. fourbit may cost at most 60 ms over torch."""

from __future__ import annotations

from statistics import median

from harness.calls import import_milliseconds


def timeraw_torch():
    return "import torch"


def timeraw_fourbit():
    return "import fourbit"


def timeraw_fourbit_after_torch():
    return "import fourbit", "import torch"


timeraw_torch.repeat = timeraw_fourbit.repeat = timeraw_fourbit_after_torch.repeat = 5
timeraw_torch.number = timeraw_fourbit.number = timeraw_fourbit_after_torch.number = 1


def track_over_torch():
    """Median of five processes."""
    return median(import_milliseconds(5))


track_over_torch.unit = "ms"
track_over_torch.timeout = 120
