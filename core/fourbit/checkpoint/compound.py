"""A source as a whole: one model, or all those of a folder of several.

Tensors of a model in a subfolder have its name in front, as in `unet/conv_in.weight`; so have names of files. Whoever
reads, converts, checks or compares a source does it with these names, and need not know how many models it has.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from fourbit.checkpoint import layouts, source, weight_files
from fourbit.checkpoint.errors import CheckpointError, first_of
from fourbit.checkpoint.layouts import Part
from fourbit.checkpoint.reader import Checkpoint
from fourbit.checkpoint.remote import Remote
from fourbit.checkpoint.tensors import TensorInfo, Tensors


@dataclass(frozen=True)
class Member:
    """One model: where it is, and its checkpoint, which has the names without the folder."""

    part: Part
    checkpoint: Checkpoint

    @property
    def prefix(self) -> str:
        """What the names of its tensors and files begin with."""
        return self.part.prefix


class Compound(Tensors):
    """A folder of safetensors, or of several models, or one .safetensors or index file, by its headers only.

    Args:
        path: of it.
        remote: what reads its tensors, where `path` stands for a URL.

    Attributes:
        path, entries: as in `Tensors`.
        remote: as given.
        layout: what it is made of.
        members: its models, by their folders; {"": …} of one model alone.

    Raises CheckpointError, as `Checkpoint` does; also for a pipeline without any model in safetensors.
    """

    def __init__(self, path: str | os.PathLike[str], remote: Remote | None = None) -> None:
        located, self.remote = source.located(path), remote
        self.layout = layouts.find(located)
        self.members = {part.folder: Member(part, Checkpoint(located / part.folder)) for part in self.layout.parts}
        if not self.members:
            raise CheckpointError(f"{located} is {self.layout.kind} in which no component has a .safetensors file")
        entries: dict[str, TensorInfo] = {}
        quantized: dict[str, tuple[str, ...]] = {}
        for member in self.members.values():
            prefix, checkpoint = member.prefix, member.checkpoint
            for name, info in checkpoint.entries.items():
                if prefix + name in entries:  # of a model in the folder itself, with a "/" in the tensor's name
                    raise CheckpointError(f"{located}: two of its models have the tensor {prefix + name!r}")
                entries[prefix + name] = replace(info, name=prefix + name) if prefix else info
            for name, parts in checkpoint.quantized().items():
                quantized[prefix + name] = tuple(prefix + part for part in parts)
        super().__init__(located, entries, quantized)

    def _read_into(self, info: TensorInfo, target: memoryview) -> None:
        if self.remote is None:
            super()._read_into(info, target)
        else:
            self.remote.read_into(info, target)

    @property
    def named(self) -> Path | str:
        """As its user knows it."""
        return self.path if self.remote is None else self.remote.url

    @property
    def folder(self) -> Path:
        """The folder that it is, or that its file is in."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def files(self) -> dict[str, Path]:
        """The weight files, by name relative to `folder`."""
        return {m.prefix + file.name: file for m in self.members.values() for file in m.checkpoint.files}

    @cached_property
    def configs(self) -> dict[str, Path]:
        """Each model's config.json, which need not be there, by relative name."""
        name = weight_files.CONFIG_FILE
        return {member.prefix + name: member.checkpoint.folder / name for member in self.members.values()}

    @cached_property
    def indexes(self) -> dict[str, Path]:
        """The indexes of weight files, by relative name."""
        found = ((member.prefix, member.checkpoint.index) for member in self.members.values())
        return {prefix + index.name: index for prefix, index in found if index is not None}

    def file_name(self, info: TensorInfo) -> str:
        """The name of a tensor's file, relative to `folder`."""
        return info.file.relative_to(self.folder).as_posix()

    def of_member(self, member: Member) -> list[str]:
        """The names of a model's tensors."""
        return [member.prefix + name for name in member.checkpoint.entries]

    @cached_property
    def aliases(self) -> Mapping[str, str]:
        """What the headers say beside tensors, under the whole names: of tied tensors that are stored once, the one."""
        return {
            m.prefix + name: m.prefix + kept
            for m in self.members.values()
            for name, kept in m.checkpoint.metadata.items()
        }

    def chosen(self, components: Sequence[str] | None) -> dict[str, str]:
        """For each model that is not to be quantized, why, by its folder.

        Args:
            components: names of those that are; None: the ones that are by default.

        Raises CheckpointError for a name that no component has, or where the source is no pipeline.
        """
        for folder in self.layout.unread if components is None else components:
            if folder in self.layout.weightless:
                weight_files.find_files(self.path / folder)  # which says why there is nothing to read
        if components is None:
            return {folder: member.part.left for folder, member in self.members.items() if member.part.left}
        if self.layout.kind != layouts.PIPELINE:
            raise CheckpointError(f"{self.path} is no pipeline of diffusers: it has no components to choose from")
        unknown = [name for name in components if name not in self.members]
        if unknown or not components:
            what = f"no component {unknown[0]!r}" if unknown else "components, and none is chosen"
            raise CheckpointError(
                f"{self.path} has {what}; those with weights in safetensors are {first_of(list(self.members), 20)}"
            )
        return {
            folder: f"of {folder}, which is none of the components to quantize"
            for folder in self.members
            if folder not in components
        }
