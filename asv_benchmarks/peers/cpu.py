"""The cases of `python -m peers cpu`: each function yields rows, what was measured and how it stands to the targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import fourbit
from harness.calls import microseconds
from harness.others import Others
from harness.timing import ReadBandwidth, Times, copies_for, interleave
from harness.weights import BLOCKSIZE, DTYPES, bind, stored_bytes
from peers import targets
from peers.contenders import CpuWeights, check, composed_calls, linear_calls
from peers.targets import Target


@dataclass(frozen=True)
class Settings:
    """What is asked for. `seconds` is about the time of one table row, `rounds` its least and most rounds."""

    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    threads: tuple[int, ...]
    dtypes: tuple[str, ...]
    seconds: float
    rounds: tuple[int, int]
    side: int
    isa: str | None
    bnb: Any


@dataclass
class Row:
    """One line of the tables: `times` by contender, `values` by measure (ratios to fourbit's time, GB/s).

    `others` is what other processes used meanwhile, in cores.
    """

    case: str
    label: str
    threads: int
    times: dict[str, Times]
    values: dict[str, float] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()
    others: float | None = None

    def verdicts(self) -> list[tuple[Target, float, str]]:
        """Targets whose peer was there, with the value and the verdict."""
        found = [(t, self.values[t.measure]) for t in self.targets if t.measure in self.values]
        return [(target, value, target.verdict(value)) for target, value in found]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; seconds."""
        return {
            "case": self.case,
            "label": self.label,
            "threads": self.threads,
            "seconds": {name: asdict(times) for name, times in self.times.items()},
            "values": self.values,
            "cores_used_by_others": self.others,
            "targets": [{**asdict(target), "value": value, "verdict": v} for target, value, v in self.verdicts()],
        }


def ratios(times: dict[str, Times], own: str = "fourbit") -> dict[str, float]:
    """How many times as long as fourbit each peer takes, by medians."""
    return {name: t.median / times[own].median for name, t in times.items() if not name.startswith(("fourbit", "read"))}


def linear(settings: Settings, dtypes: tuple[str, ...] | None = None) -> Iterator[Row]:
    """linear_4bit at every shape, number of rows and dtype; at M=1 beside a read of memory."""
    bandwidth = ReadBandwidth()
    for shape in settings.shapes:
        weights = CpuWeights(shape, settings.bnb)
        for dtype in dtypes or settings.dtypes:
            for rows in settings.rows:
                x = _activations(rows, shape[1], dtype)
                contenders = linear_calls(weights, x)
                if rows == settings.rows[0]:
                    check(contenders, weights, x, dtype)
                for threads in settings.threads:
                    yield _linear_row(settings, weights, bandwidth, contenders, (rows, dtype, threads))
        del weights


def _linear_row(
    settings: Settings,
    weights: CpuWeights,
    bandwidth: ReadBandwidth,
    contenders: dict[str, list[Callable[[], object]]],
    kind: tuple[int, str, int],
) -> Row:
    rows, dtype, threads = kind
    torch.set_num_threads(threads)
    if rows == 1:
        contenders = {**contenders, "read": bandwidth.calls()}
    times = interleave(contenders, settings.seconds, rounds=settings.rounds)
    values = ratios(times)
    if rows == 1:
        limit = bandwidth.best(times["read"])
        rate = stored_bytes(*weights.fourbit()[0]) / times["fourbit"].median / 1e9
        values |= {"read GB/s": limit, "GB/s": rate, targets.READ: rate / limit}
        if "fourbit double" in times:
            rate = stored_bytes(*weights.fourbit(double_quant=True)[0]) / times["fourbit double"].median / 1e9
            values |= {"double GB/s": rate, "double read bandwidth": rate / limit}
            for peer, ratio in ratios(times, "fourbit double").items():
                values[f"double {peer}"] = ratio
    n, k = weights.shape
    label = f"{n}×{k} M={rows} {dtype}"
    return Row("linear", label, threads, times, values, targets.linear(dtype, rows, settings.isa))


def fp16(settings: Settings) -> Iterator[Row]:
    """float16 activations at the first shape, against torch's float16."""
    first = Settings(**{**settings.__dict__, "shapes": settings.shapes[:1]})
    for row in linear(first, ("fp16",)):
        row.case = "fp16"
        yield row


def quantize(settings: Settings) -> Iterator[Row]:
    """quantize_4bit of a square weight, NF4: GB/s of input for each thread, and bitsandbytes."""
    weight = torch.randn(settings.side, settings.side)
    for dtype in ("fp32", "bf16"):
        source = weight.to(DTYPES[dtype])
        sources = [source, *(source.clone() for _ in range(copies_for(source.nbytes) - 1))]
        contenders = {"fourbit": [bind(_quantize, w) for w in sources]}
        if settings.bnb is not None:
            bnb_quantize = settings.bnb.functional.quantize_4bit
            contenders["bitsandbytes"] = [bind(_bnb_quantize, bnb_quantize, w) for w in sources]
            _same_bits(_quantize(source)[0], _bnb_quantize(bnb_quantize, source)[0])
        for threads in settings.threads:
            torch.set_num_threads(threads)
            times = interleave(contenders, settings.seconds, rounds=(3, settings.rounds[1]))
            rate = source.nbytes / times["fourbit"].median / 1e9 / threads
            label = f"quantize_4bit {settings.side}² {dtype}"
            wanted = targets.QUANTIZE if dtype == "fp32" and settings.isa is None else ()
            yield Row("quantize", label, threads, times, {**ratios(times), targets.RATE: rate}, wanted)


def _quantize(weight: torch.Tensor) -> Any:
    return fourbit.quantize_4bit(weight, blocksize=BLOCKSIZE)


def _bnb_quantize(function: Callable[..., Any], weight: torch.Tensor) -> Any:
    return function(weight, blocksize=BLOCKSIZE, quant_type="nf4")


def _same_bits(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    different = float((mine.view(-1) != theirs.view(-1)).float().mean())
    if different > 1e-4:
        raise RuntimeError(f"quantize_4bit and bitsandbytes differ in {different:.2%} of the bytes")


def dequantize(settings: Settings) -> Iterator[Row]:
    """dequantize_4bit by its public call into a fresh tensor, against bitsandbytes' public call."""
    side = settings.side
    plain = torch.randn(side, side)
    weights = _rotated(fourbit.quantize_4bit(plain, blocksize=BLOCKSIZE))
    theirs = []
    if settings.bnb is not None:
        theirs = _rotated(_bnb_quantize(settings.bnb.functional.quantize_4bit, plain))
    for dtype in ("bf16", "fp32"):
        contenders = {"fourbit": [bind(fourbit.dequantize_4bit, *w, DTYPES[dtype]) for w in weights]}
        for _, state in theirs:
            state.dtype = DTYPES[dtype]
        if theirs:
            contenders["bitsandbytes"] = [bind(settings.bnb.functional.dequantize_4bit, *w) for w in theirs]
            torch.testing.assert_close(contenders["bitsandbytes"][0](), contenders["fourbit"][0]())
        for threads in settings.threads:
            torch.set_num_threads(threads)
            times = interleave(contenders, settings.seconds, rounds=settings.rounds)
            values = ratios(times)
            values["GB/s of output"] = plain.numel() * DTYPES[dtype].itemsize / times["fourbit"].median / 1e9
            wanted = targets.DEQUANTIZE if settings.isa is None else ()
            yield Row("dequantize", f"dequantize_4bit {side}² {dtype}", threads, times, values, wanted)


def _rotated(pair: Any) -> list[Any]:
    import copy

    return [pair, *(copy.deepcopy(pair) for _ in range(copies_for(pair[0].nbytes) - 1))]


def blockwise(settings: Settings) -> Iterator[Row]:
    """quantize_blockwise and dequantize_blockwise, 8 bits with the dynamic map, blocks of 256."""
    side = settings.side
    plain = [torch.randn(side, side)]
    plain += [plain[0].clone() for _ in range(copies_for(plain[0].nbytes) - 1)]
    codes = _rotated(fourbit.quantize_blockwise(plain[0]))
    pairs: dict[str, dict[str, list[Callable[[], object]]]] = {
        "quantize_blockwise": {"fourbit": [bind(fourbit.quantize_blockwise, p) for p in plain]},
        "dequantize_blockwise": {"fourbit": [bind(fourbit.dequantize_blockwise, *c) for c in codes]},
    }
    if settings.bnb is not None:
        functional = settings.bnb.functional
        theirs = _rotated(functional.quantize_blockwise(plain[0], blocksize=256))
        pairs["quantize_blockwise"]["bitsandbytes"] = [
            lambda p=p: functional.quantize_blockwise(p, blocksize=256) for p in plain
        ]
        pairs["dequantize_blockwise"]["bitsandbytes"] = [bind(functional.dequantize_blockwise, *t) for t in theirs]
    for op, contenders in pairs.items():
        for threads in settings.threads:
            torch.set_num_threads(threads)
            times = interleave(contenders, settings.seconds, rounds=(3, settings.rounds[1]))
            values = ratios(times)
            values["GB/s of fp32"] = plain[0].nbytes / times["fourbit"].median / 1e9
            yield Row("blockwise", f"{op} {side}² fp32", threads, times, values)


def gradient(settings: Settings) -> Iterator[Row]:
    """The gradient of linear_4bit with respect to x at the first shape, against torch's matmul."""
    shape = settings.shapes[0]
    weights = CpuWeights(shape, None)
    op = torch.ops.fourbit.linear_4bit_grad.default
    for rows in settings.rows:
        grad = _activations(rows, shape[0], "bf16")
        mine = [bind(op, grad, w, s.absmax, s.code, s.blocksize, shape[1]) for w, s in weights.fourbit()]
        plain = [bind(torch.matmul, grad, w) for w in weights.torch("bf16")]
        for threads in settings.threads:
            torch.set_num_threads(threads)
            times = interleave({"fourbit": mine, "torch bf16": plain}, settings.seconds, rounds=settings.rounds)
            yield Row("gradient", f"{shape[0]}×{shape[1]} M={rows} bf16", threads, times, ratios(times))


def module(settings: Settings, size: int = 64) -> Iterator[Row]:
    """A whole call of the modules, bfloat16 [1, 64] times [64, 64]: what a call costs when the kernel costs nothing."""
    plain = torch.nn.Linear(size, size, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    config = fourbit.QuantConfig(blocksize=BLOCKSIZE)
    x = _activations(1, size, "bf16")
    modules: dict[str, Any] = {
        "fourbit": fourbit.nn.Linear4bit.from_linear(plain, config),
        "fourbit double": fourbit.nn.Linear4bit.from_linear(
            plain, fourbit.QuantConfig(blocksize=BLOCKSIZE, double_quant=True)
        ),
        "torch nn.Linear": plain,
    }
    packed = CpuWeights((size, size), settings.bnb).bitsandbytes() if settings.bnb is not None else []
    if packed:
        modules["bitsandbytes"] = packed[0]
    for threads in settings.threads:
        torch.set_num_threads(threads)
        calls = {name: bind(m, x) for name, m in modules.items()}
        found = microseconds(calls, rounds=max(settings.rounds), batch=30)
        times = {name: Times.of([value / 1e6]) for name, value in found.items()}
        values = {**ratios(times), targets.MICROSECONDS: found["fourbit"]}
        yield Row("module", "module call 64×64 bf16", threads, times, values, targets.MODULE)


def sweep(settings: Settings) -> Iterator[Row]:
    """linear_4bit against dequantize_4bit and torch's linear at every M from 1 to 64, and 96, 128, 256, 512."""
    for shape in settings.shapes:
        weights = CpuWeights(shape, None)
        for dtype in settings.dtypes:
            for threads in settings.threads:
                torch.set_num_threads(threads)
                for rows in (*range(1, 65), 96, 128, 256, 512):
                    x = _activations(rows, shape[1], dtype)
                    contenders = linear_calls(weights, x, peers=False)
                    contenders[targets.COMPOSED] = composed_calls(weights, x)
                    times = interleave(contenders, settings.seconds / 8, rounds=(3, settings.rounds[1]))
                    label = f"{shape[0]}×{shape[1]} M={rows} {dtype}"
                    yield Row("sweep", label, threads, times, ratios(times), (targets.NEVER_SLOWER,))


def watched(case: Iterator[Row]) -> Iterator[Row]:
    """The rows of a case, each with what other processes used while it was made."""
    others = Others()
    for row in case:
        row.others = others.share()
        yield row
        others = Others()


CASES: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "linear": linear,
    "fp16": fp16,
    "gradient": gradient,
    "quantize": quantize,
    "dequantize": dequantize,
    "blockwise": blockwise,
    "module": module,
}


def _activations(rows: int, features: int, dtype: str) -> torch.Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(rows)).to(DTYPES[dtype])
