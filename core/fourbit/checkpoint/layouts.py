"""Folders of several models, by what they say of themselves: diffusers' pipelines, models of sentence-transformers.

model_index.json of a pipeline names its components, each in the subfolder of its name. modules.json of
sentence-transformers names the modules that a text goes through; the transformer is in the folder itself, or in one
such as 0_Transformer, and others, such as Dense, may have weights of their own. Both files are a stranger's.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fourbit.checkpoint import untrusted
from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.weight_files import PIPELINE_FILE, has_weights

MODULES_FILE = "modules.json"
MOST_PARTS = 1000
"""Components, or modules, that a folder may name: no pipeline has a twentieth of it."""
MOST_DEEP = 16
"""Folders within folders that a module may be in."""

PIPELINE = "a pipeline of diffusers"
SENTENCES = "a model of sentence-transformers"

_QUANTIZED_NAME = re.compile(r"(?:\w+_)?(?:unet|transformer|text_encoder)(?:_\d+)?")
_QUANTIZED_CLASS = re.compile(r"\w*(?:UNet|Transformer\dD|PriorTransformer|DiT|ControlNet)\w*")
"""The denoisers and text encoders. An image's encoder and decoder (vae) is made of convolutions, which stay."""

_MODULE_BINARY = re.compile(r"pytorch_model\.bin")
_COMPONENT_BINARY = re.compile(r"(?:diffusion_)?pytorch_model(?:-\d{5}-of-\d{5})?\.bin(?:\.index\.json)?")


@dataclass(frozen=True)
class Part:
    """One model of a folder.

    Attributes:
        folder: that it is in, relative to the whole, with "/" between components; "" is the whole folder itself.
        left: why it stays as it is where nobody says which parts are quantized; "" if it does not.
    """

    folder: str
    left: str = ""

    @property
    def prefix(self) -> str:
        """What the names of its files, and of its tensors, begin with among those of all parts."""
        return f"{self.folder}/" if self.folder else ""


@dataclass(frozen=True)
class Layout:
    """The models of a folder.

    Attributes:
        kind: what it is, in words; "" for one model alone, or a file.
        parts: the models with weights in safetensors, in the order in which they are named.
        weightless: folders that are named and have none: of tokenizers, of schedulers, of weights in another form.
        unread: those of them that would be quantized by default.
    """

    kind: str = ""
    parts: tuple[Part, ...] = (Part(""),)
    weightless: frozenset[str] = frozenset()
    unread: tuple[str, ...] = ()

    def needs(self, name: str) -> bool:
        """Whether a file with weights that no part reads (relative, with "/") is all that a folder has of them."""
        path = PurePosixPath(name)
        if self.kind == SENTENCES:  # a module may have its weights in a folder below its own
            inside = any(str(folder) in self.weightless for folder in path.parents)
            return inside and (path.name == "model.safetensors" or _MODULE_BINARY.fullmatch(path.name) is not None)
        return str(path.parent) in self.weightless and _COMPONENT_BINARY.fullmatch(path.name) is not None


def find(path: Path) -> Layout:
    """What a source, folder or file, says that it is made of.

    Raises CheckpointError if it names folders elsewhere, or too many.
    """
    if path.is_dir():
        if untrusted.is_there(path / PIPELINE_FILE):
            return _pipeline(path)
        modules = _modules(path)
        if modules:
            return _sentences(path, modules)
    return Layout()


def _pipeline(path: Path) -> Layout:
    file = path / PIPELINE_FILE
    parts: list[Part] = []
    weightless: dict[str, str] = {}
    for name, entry in untrusted.own_json(path, PIPELINE_FILE).items():
        pair = isinstance(entry, list) and len(entry) == 2 and all(isinstance(each, str) for each in entry)
        if name.startswith("_") or not pair:  # the pipeline's own class, a setting, a component that it does not have
            continue
        folder = _within(path, file, "component", name)
        if len(parts) + len(weightless) == MOST_PARTS:
            raise CheckpointError(f"{file} names more than {MOST_PARTS} components")
        left = "" if _is_quantized(name, *entry) else f"of {name}, which stays as it is by default"
        if has_weights(path / folder):
            parts.append(Part(folder, left))
        else:
            weightless[folder] = left
    unread = tuple(folder for folder, left in weightless.items() if not left)
    return Layout(PIPELINE, tuple(parts), frozenset(weightless), unread)


def _is_quantized(name: str, library: str, kind: str) -> bool:
    named = _QUANTIZED_NAME.fullmatch(name) is not None
    return named or (library == "diffusers" and _QUANTIZED_CLASS.fullmatch(kind) is not None)


def _within(path: Path, file: Path, what: str, name: str) -> str:
    """The folder of that name in `path`. Raises CheckpointError if it would be elsewhere, or can have no such name."""
    parts = PurePosixPath(name).parts
    if len(parts) > (1 if what == "component" else MOST_DEEP) or not parts or not all(map(_is_folder_name, parts)):
        raise CheckpointError(f"{file} names the {what} {name[:80]!r}, which is no folder within {path}")
    folder = "/".join(parts)
    untrusted.require_inside(path / folder, path)
    return folder


def _is_folder_name(name: str) -> bool:
    # no system has longer ones, nor half a surrogate pair in them
    return untrusted.is_plain_name(name) and len(name.encode(errors="surrogatepass")) < 256 and name.isprintable()


def _modules(path: Path) -> dict[str, str]:
    """The modules of modules.json: their folders, "" for the whole, with the class of each, less its package."""
    file = path / MODULES_FILE
    if (
        not untrusted.is_file(file)
        or not untrusted.stays_inside(file, path)
        or file.stat().st_size > untrusted.MAX_JSON_BYTES
    ):
        return {}
    try:
        listed = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}  # some other library's: it is carried over, whatever it is
    found: dict[str, str] = {}
    for module in listed if isinstance(listed, list) else ():
        place, kind = (module.get("path"), module.get("type")) if isinstance(module, dict) else (None, None)
        if not isinstance(place, str) or not isinstance(kind, str):
            continue
        found.setdefault(_within(path, file, "module", place) if place else "", kind.rpartition(".")[2])
        if len(found) > MOST_PARTS:
            raise CheckpointError(f"{file} names more than {MOST_PARTS} modules")
    return found


def _sentences(path: Path, modules: dict[str, str]) -> Layout:
    weights = {folder for folder in modules if folder and has_weights(path / folder)}
    # the weights of the folder itself are the transformer's, whatever class the module has
    models = {folder for folder in weights if modules[folder].endswith("Transformer")}
    if has_weights(path) or not models:
        models = {""}
    parts = [Part("")] if "" in models else []
    for folder, kind in modules.items():
        if folder in models:
            parts.append(Part(folder)) if folder else None
        elif folder in weights:
            parts.append(Part(folder, f"of the module {kind}, which sentence-transformers loads itself"))
    return Layout(SENTENCES, tuple(parts), frozenset(modules.keys() - weights - {""}))
