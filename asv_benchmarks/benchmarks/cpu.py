"""The CPU backend as ratios and rates within one run, weights cold; `python -m peers cpu` has the whole table."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

import fourbit
from harness.timing import ReadBandwidth, copies_for, interleave

SIZE = 2048
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def weight():
    """[2048, 2048] float32, always the same."""
    return torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def rotated(tensor):
    """Enough copies of a tensor that no cache holds them all."""
    return [tensor.clone() for _ in range(copies_for(tensor.nbytes))]


class ColdLinear:
    """linear_4bit against torch's linear in the activations' dtype; and of M=1 the share of the read bandwidth."""

    params = ([1, 4, 16, 128], list(DTYPES))
    param_names = ("rows", "dtype")
    timeout = 120

    def setup(self, rows, dtype):
        plain = weight()
        packed, state = fourbit.quantize_4bit(plain, blocksize=64)
        self.weight_bytes = packed.nbytes + state.absmax.nbytes
        x = torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
        self.contenders = {
            "fourbit": [lambda w=w: fourbit.linear_4bit(x, w, state) for w in rotated(packed)],
            "torch": [lambda w=w: linear(x, w) for w in rotated(plain.to(x.dtype))],
        }

    def track_ratio_to_torch(self, *_):
        """torch's time over fourbit's: more is better."""
        with torch.no_grad():
            times = interleave(self.contenders, 0.4)
        return times["torch"].median / times["fourbit"].median

    def track_read_bandwidth(self, rows, dtype):
        """GB/s of packed weight and scales over GB/s of a plain read; M=1 only."""
        if rows != 1:
            return float("nan")
        reading = ReadBandwidth()
        with torch.no_grad():
            times = interleave({"fourbit": self.contenders["fourbit"], "read": reading.calls()}, 0.4)
        return self.weight_bytes / times["fourbit"].median / 1e9 / reading.best(times["read"])


class ColdQuantize:
    """GB/s of float32: read by the quantizing ops, written into a fresh tensor by the dequantizing ones."""

    timeout = 120

    def setup(self):
        self.sources = rotated(weight())
        self.bytes = self.sources[0].nbytes
        self.packed, self.state = fourbit.quantize_4bit(self.sources[0], blocksize=64)
        self.codes, self.scales = fourbit.quantize_blockwise(self.sources[0])

    def track_quantize_4bit(self):
        return self._rate([lambda w=w: fourbit.quantize_4bit(w, blocksize=64) for w in self.sources])

    def track_dequantize_4bit(self):
        return self._rate([lambda w=w: fourbit.dequantize_4bit(w, self.state) for w in rotated(self.packed)])

    def track_quantize_blockwise(self):
        return self._rate([lambda w=w: fourbit.quantize_blockwise(w) for w in self.sources])

    def track_dequantize_blockwise(self):
        return self._rate([lambda w=w: fourbit.dequantize_blockwise(w, self.scales) for w in rotated(self.codes)])

    def _rate(self, calls):
        return self.bytes / interleave({"fourbit": calls}, 0.4)["fourbit"].median / 1e9


ColdLinear.track_ratio_to_torch.unit = "times"
ColdLinear.track_read_bandwidth.unit = "of the read bandwidth"
for _method in vars(ColdQuantize).copy().values():
    if getattr(_method, "__name__", "").startswith("track_"):
        _method.unit = "GB/s"
