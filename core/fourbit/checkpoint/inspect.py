"""What a checkpoint holds, tensor by tensor: ours, bitsandbytes' and plain ones. Only headers and scales are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fourbit.checkpoint import foreign
from fourbit.checkpoint.compound import Compound
from fourbit.checkpoint.reader import Checkpoint
from fourbit.state import dtype_name


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of a checkpoint; a 4-bit weight and the tensors of its state count as one.

    Attributes:
        name: of the tensor.
        shape: of the weight, not of its packed form.
        type: "bfloat16" and the like, or the quant_type of a 4-bit weight.
        blocksize: elements that share a scale; None unless 4-bit, likewise
        double_quant: whether the scales are in 8 bits, and
        dtype: that was quantized.
        parameters: elements of the weight.
        nbytes: codes, scales and their scales; of a plain tensor all of it.
        table_bytes: code tables and JSON beside them, the same few hundred bytes for every weight.
        file: that it is in.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    blocksize: int | None
    double_quant: bool | None
    dtype: str
    parameters: int
    nbytes: int
    table_bytes: int
    file: str

    @property
    def bits_per_parameter(self) -> float:
        """Bits an element, tables not counted; 0 for an empty tensor."""
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0

    @property
    def is_4bit(self) -> bool:
        """Whether it is a 4-bit weight."""
        return self.blocksize is not None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "shape": list(self.shape), "bits_per_parameter": self.bits_per_parameter}


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds.

    Attributes:
        path: of the folder or file.
        kind: in words: 4-bit, plain, an adapter, or quantized by another method.
        tensors: in the order of the files.
        files: names of the weight files.
        models: the kind of each model, by its folder; "" is that of the whole folder, or the file, itself.
    """

    path: Path
    kind: str
    tensors: tuple[TensorFacts, ...]
    files: tuple[str, ...]
    models: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, tables included."""
        return sum(t.nbytes + t.table_bytes for t in self.tensors)

    @property
    def parameters(self) -> int:
        """Elements of all weights."""
        return sum(t.parameters for t in self.tensors)

    @property
    def quantized_parameters(self) -> int:
        """Elements of the 4-bit weights."""
        return sum(t.parameters for t in self.tensors if t.is_4bit)

    @property
    def bits_per_quantized_parameter(self) -> float:
        """Bits an element of the 4-bit weights, scales included and tables not; 0 if there are none."""
        count = self.quantized_parameters
        return 8 * sum(t.nbytes for t in self.tensors if t.is_4bit) / count if count else 0.0

    @property
    def bits_per_parameter(self) -> float:
        """Bits an element of the whole, tables included; 0 for an empty file."""
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "models": self.models,
            "files": list(self.files),
            "parameters": self.parameters,
            "quantized_parameters": self.quantized_parameters,
            "bytes": self.nbytes,
            "bits_per_quantized_parameter": self.bits_per_quantized_parameter,
            "bits_per_parameter": self.bits_per_parameter,
            "tensors": [t.to_dict() for t in self.tensors],
        }


def inspect_checkpoint(path: str | Path) -> Inspection:
    """List what a folder, or a .safetensors or index file, holds.

    Raises CheckpointError, naming the tensor or file, for anything malformed.
    """
    with Compound(path) as source:
        kinds = {folder: _kind(member.checkpoint) for folder, member in source.members.items()}
        kind = kinds.get("", "")
        if list(kinds) != [""]:
            kind = f"{source.layout.kind}; " + "; ".join(f"{folder or '.'}: {each}" for folder, each in kinds.items())
        return Inspection(source.path, kind, tuple(list_tensors(source)), tuple(source.files), kinds)


def list_tensors(source: Compound) -> Iterator[TensorFacts]:
    """Every tensor, in the order of the files."""
    companions = source.companions()
    return (_facts(source, name) for name in source.entries if name not in companions)


def _facts(source: Compound, name: str) -> TensorFacts:
    info, file = source.info(name), source.file_name(source.info(name))
    parts = source.quantized().get(name)
    if parts is None:
        dtype = dtype_name(info.dtype)
        return TensorFacts(
            *(name, info.shape, dtype, None, None, dtype, info.numel, info.nbytes, 0, file),
        )
    state = source.state(name)
    stored = info.nbytes + sum(source.info(part).nbytes for part in parts)
    return TensorFacts(
        *(name, tuple(state.shape), state.quant_type, state.blocksize, state.double_quant),
        *(dtype_name(state.dtype), state.numel, state.nbytes, stored - state.nbytes, file),
    )


def _kind(checkpoint: Checkpoint) -> str:
    if checkpoint.quantized():
        return "4-bit, in the bitsandbytes layout"
    found = foreign.quantized_by(checkpoint)
    if found is not None:
        return f"quantized by {found[0]}"
    return "an adapter (of peft)" if foreign.is_adapter(checkpoint) else "plain, not quantized"
