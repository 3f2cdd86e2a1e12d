"""Which files make up a checkpoint: one .safetensors file, or an index with its shards.

A folder is input from a stranger: neither an index nor a link may point outside the folder.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fourbit.checkpoint import source, untrusted
from fourbit.checkpoint.errors import CheckpointError, first_of

STEMS = ("model", "diffusion_pytorch_model")
"""What weight files are called by transformers, and by diffusers."""

CONFIG_FILE = "config.json"
MANIFEST_FILE = "fourbit_manifest.json"
PIPELINE_FILE = "model_index.json"
"""What makes a folder a pipeline of diffusers, with a model in each subfolder."""
MOST_PARTS = 12
"""Names that an error lists."""
MAX_OTHER_BYTES = 1 << 32
"""A larger file that is no weight is not carried over: no tokenizer, template or licence has a tenth of it."""
_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".keras", ".msgpack", ".npz", ".ot"),
    *(".onnx", ".onnx_data", ".onnx.data", ".tflite", ".pdparams", ".nemo"),
)
"""Files that hold weights, and so are not carried over."""
_INDEX_NAME = re.compile(r"\.safetensors\.index(\.[^.]+)?\.json$")


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a checkpoint.

    Attributes:
        files: sorted by name.
        weight_map: the index's, of tensor names to file names; None without an index.
        index: its path; None without one.
        stem: what the names of files and index begin with, shard numbers and variants such as "fp16" left out:
            "model", or "diffusion_pytorch_model". Libraries look for it.
    """

    files: list[Path]
    weight_map: dict[str, str] | None
    index: Path | None
    stem: str


def single_file(stem: str) -> str:
    """The name of the only weight file of a folder."""
    return f"{stem}.safetensors"


def index_file(stem: str) -> str:
    """The name of the index of a folder of several."""
    return f"{stem}.safetensors.index.json"


def shard_file(stem: str, number: int, count: int) -> str:
    """The name of one of several weight files, counted from 1."""
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def find_files(path: Path) -> WeightFiles:
    """The weight files of a folder (or one .safetensors or index file).

    Raises CheckpointError, naming the path, if it is no checkpoint, if a shard is missing, or if a file of a folder
    is a link out of it. A file that is named itself may be any link.
    """
    if path.is_file():
        if _INDEX_NAME.search(path.name):
            return _from_index(path)
        if path.suffix == ".safetensors":
            # a file of any other name is no library's, and becomes one that transformers finds
            stem = stem_of(path.name)
            return WeightFiles([path], None, None, stem if stem in STEMS else STEMS[0])
        raise CheckpointError(f"{path} is neither a folder nor a .safetensors file")
    if not path.is_dir():
        exists = os.path.lexists(path)
        raise CheckpointError(f"{path} is neither a folder nor a file" if exists else f"{path} does not exist")
    if (path / PIPELINE_FILE).is_file():
        raise CheckpointError(f"{path} is a pipeline of diffusers ({PIPELINE_FILE}), not one model; {_parts(path)}")
    for stem in STEMS:  # the order in which transformers and diffusers look
        if untrusted.is_there(path / single_file(stem)):
            return _single(path / single_file(stem), path)
        if untrusted.is_there(path / index_file(stem)):
            return _from_index(path / index_file(stem), path)
    names = sorted(p.name for p in path.iterdir() if p.name.endswith((".safetensors", ".json")))
    indexes = [name for name in names if _INDEX_NAME.search(name)]
    for found, opened in ((indexes, _from_index), ([n for n in names if n.endswith(".safetensors")], _single)):
        if len(found) == 1:
            return opened(path / found[0], path)
        if found:
            raise CheckpointError(f"{path} has {len(found)} candidates ({', '.join(found[:4])}); name one of them")
    other = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
    hint = f"; it has {other[0]}, and fourbit reads safetensors only" if other else ""
    parts = _parts(path)
    parts = f"; {parts}" if parts else source.how_to_complete(path)
    raise CheckpointError(f"{path} has no .safetensors file{hint}{parts}")


def has_weights(folder: Path) -> bool:
    """Whether a folder has a .safetensors file, or an index of such. Raises CheckpointError if it cannot be listed."""
    try:
        return any(name.endswith(".safetensors") or _INDEX_NAME.search(name) for name in os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror or error}") from error


def holds_weights(name: str) -> bool:
    """Whether a file of that name, which may have folders in front, holds weights or is an index of such."""
    is_index = name.endswith(".json") and ".index." in name
    return name.endswith(_WEIGHT_SUFFIXES) or is_index or ".ckpt.data-" in name


def stem_of(name: str) -> str:
    """A weight file's name without its suffix, shard number and, where a library put one in, variant."""
    stem = re.sub(r"-\d{5}-of-\d{5}", "", name.removesuffix(".safetensors"))
    first = stem.partition(".")[0]
    # the variant names the type, as in model.fp16.safetensors: what is written is another, and there is only one
    return first if first in STEMS else stem


def _parts(path: Path) -> str:
    """What to name instead of a folder that is no model itself: its folders with weights, and its files."""
    folders = (p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = sorted(f"{p.name}/" for p in folders if next(p.glob("*.safetensors"), None) is not None)
    found += sorted(p.name for p in path.glob("*.safetensors"))
    return f"it has weights in {first_of(found, MOST_PARTS)}: name one of these" if found else ""


def _single(path: Path, folder: Path) -> WeightFiles:
    _require_file(path, folder)
    return WeightFiles([path], None, None, stem_of(path.name))


def _from_index(path: Path, folder: Path | None = None) -> WeightFiles:
    if folder is not None:
        _require_file(path, folder)
    weight_map = untrusted.read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing, empty or not an object")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not untrusted.is_plain_name(file) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: tensor {name!r} is said to be in {file!r}, which is not the plain name of a"
                " .safetensors file in the same folder"
            )
    files = [path.parent / file for file in sorted(set(weight_map.values()))]
    for file_path in files:
        if not untrusted.is_file(file_path):
            advice = source.how_to_complete(path.parent)
            raise CheckpointError(f"{path} names the shard {file_path.name}, which is missing{advice}")
        untrusted.require_inside(file_path, path.parent)
    return WeightFiles(files, weight_map, path, stem_of(_INDEX_NAME.sub("", path.name)))


def _require_file(path: Path, folder: Path) -> None:
    """That it is a file, and in the folder whatever links it is made of."""
    untrusted.require_inside(path, folder)
    untrusted.is_there(path)
