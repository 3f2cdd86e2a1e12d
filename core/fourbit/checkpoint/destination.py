"""The place where a new folder is to be: whether it may be written, and what may be removed for it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from fourbit.checkpoint import manifest, snapshot
from fourbit.checkpoint.errors import CheckpointError, first_of
from fourbit.checkpoint.snapshot import Snapshot
from fourbit.checkpoint.weight_files import MANIFEST_FILE, find_files

UNFINISHED = ".unfinished"
"""How the name of a folder ends that is being written; it begins with a dot and DST's name."""

_NAMED = 10
"""Most names in a message."""

_OF_TOOLS = re.compile(r"\.gitattributes|\.DS_Store|\.cache/huggingface/.*")
"""Names of what programs leave in a model folder by themselves."""

_MODEL_FILES = re.compile(
    r"(?:model|adapter_model|diffusion_pytorch_model)(?:-\d+-of-\d+)?\.safetensors"
    r"|(?:model|diffusion_pytorch_model)\.safetensors\.index\.json"
    r"|pytorch_model(?:-\d+-of-\d+)?\.bin|pytorch_model\.bin\.index\.json"
    r"|tf_model\.h5|flax_model\.msgpack|rust_model\.ot"
    r"|(?:adapter_|generation_|tokenizer_|preprocessor_|processor_)?config\.json"
    r"|(?:image_processor|video_preprocessor|feature_extractor|quantize)_config\.json"
    r"|tokenizer\.json|tokenizer\.model(?:\.v\d)?|(?:spiece|sentencepiece\.bpe|sentencepiece)\.model"
    r"|(?:special_tokens_map|added_tokens|vocab|merges|chat_template|modules|normalizer)\.json"
    r"|config_sentence_transformers\.json|sentence_bert_config\.json"
    r"|(?:vocab|merges)\.txt|(?:bpe\.codes|dict\.txt)|chat_template\.jinja"
    r"|(?:modeling|configuration|tokenization|processing|image_processing|generation)_\w+\.py|generation_utils\.py"
    r"|README\.md|(?:LICENSE|LICENCE|NOTICE|USE_POLICY)(?:\.txt|\.md)?"
    r"|fourbit_manifest\.json"
    rf"|{_OF_TOOLS.pattern}"
)
"""Names that the format of a model folder knows; what has another one may be a user's own."""


def unfinished_folder(dst: Path) -> Path:
    """Where a run writes what is to become `dst`."""
    return dst.parent / f".{dst.name}{UNFINISHED}"


def check(
    src: Path, files: Iterable[Path], dst: Path, overwrite: bool, replaces: Snapshot | None = None
) -> Snapshot | None:
    """What the run may replace: the destination as it is, or None if nothing is there.

    Args:
        src: the source, a resolved path.
        files: every file of it, also those that are not carried over.
        dst: the destination, a resolved path.
        overwrite: whether a model folder may be replaced.
        replaces: what an earlier run, which is resumed, was allowed to replace.

    Raises CheckpointError if the model must not be written there: it is the source, or has files of the source, or
    is there and is not to be replaced, or holds something else than a model, or is not what was to be replaced.
    """
    _check_apart(src, files, dst)
    if not os.path.lexists(dst):
        return None
    if replaces is not None:
        require_same(replaces, dst, dst)
        return replaces
    if not overwrite:
        left = unfinished_folder(dst)
        or_else = f"; or move it elsewhere, and --resume continues {left}" if left.exists() else ""
        raise CheckpointError(f"the destination {dst} exists already (--overwrite replaces it{or_else})")
    if not dst.is_dir():
        raise CheckpointError(f"the destination {dst} is not a folder, and is not replaced by one")
    if os.path.ismount(dst):
        raise CheckpointError(f"the destination {dst} is a mount point, which cannot be replaced; name a folder in it")
    found = snapshot.take(dst)
    others = _strangers(dst, found)
    if others:
        raise CheckpointError(
            f"the destination {dst} holds something else than a model, and is not replaced: {first_of(others, _NAMED)}."
            " Move it elsewhere, or choose another destination"
        )
    return found


def require_same(replaces: Snapshot, folder: Path, dst: Path) -> None:
    """Raise CheckpointError if `folder`, which is `dst` or was until now, is not what was to be replaced."""
    changes = snapshot.differences(replaces, folder)
    if changes:
        raise CheckpointError(
            f"the destination {dst} is not what it was when the run began, and is not replaced:"
            f" {first_of(changes, _NAMED)}. What is done so far is in {unfinished_folder(dst)}: move {dst} elsewhere,"
            " then --resume finishes"
        )


def _check_apart(src: Path, files: Iterable[Path], dst: Path) -> None:
    if dst == src or dst in src.parents:
        raise CheckpointError(f"the destination {dst} is the source, or a folder around it")
    if src.is_dir() and src in dst.parents:
        raise CheckpointError(f"the destination {dst} lies inside the source {src}")
    around = {place: file for file in files for place in _places(file)}
    for place in (dst, unfinished_folder(dst)):
        if not place.exists():
            continue
        for folder, file in around.items():
            if folder.exists() and os.path.samefile(folder, place):  # which can have several names
                raise CheckpointError(
                    f"the source's {file} is {os.path.realpath(file)}, which is in the destination {place}: it would be"
                    " removed with it. Choose another destination"
                )


def _places(file: Path) -> tuple[Path, ...]:
    """What `file` is, links followed, and the folders around that."""
    real = Path(os.path.realpath(file))
    return (real, *real.parents)


def _strangers(dst: Path, found: Snapshot) -> list[str]:
    """What in a folder is not known to be a model's: all of it, if no weights are there."""
    files = [name for name, entry in found.entries.items() if len(entry) > 2]
    folders = {name for name in found.entries if name not in files}
    names = _MODEL_FILES
    try:
        listing = manifest.read(dst)
    except CheckpointError:  # damaged; the usual names must do
        listing = None
    if listing is not None:  # with it every file that was written is known, and a model card may be the user's own
        known = {entry["file"] for entry in listing["tensors"].values()} | {
            MANIFEST_FILE,
            *listing["files"],
        }
        names = _OF_TOOLS
    else:
        known = _opened(dst)
    others = [name for name in files if name not in known and not names.fullmatch(name)]
    empty = [name for name in folders if not any(other.startswith(name + "/") for other in found.entries)]
    if not others and files and not any(name in known or name.endswith(".safetensors") for name in files):
        return files
    return sorted([*others, *(f"{name}/" for name in empty)])


def _opened(folder: Path) -> set[str]:
    """Names of the weight files that reading the folder would open."""
    try:
        return {file.name for file in find_files(folder).files}
    except CheckpointError:  # damaged, or several models
        return set()
