"""Checks a built wheel and sdist: `python tests/packaging/check_dist.py FOLDER`. Exits with the first fault."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
NATIVE = (".c", ".cc", ".cpp", ".cu", ".h", ".hpp", ".cuh", ".inl", ".cmake", "CMakeLists.txt")
KERNEL_FOLDERS = ("fourbit_gpu/", "fourbit_cuda/", "fourbit_rocm/")  # compiled at run time


def check(condition: object, message: str) -> None:
    if not condition:
        sys.exit(f"check_dist: {message}")


def tracked(folder: str) -> list[str]:
    """Files of `folder` as git has them, so that a stray file of the working tree is no surprise."""
    output = subprocess.run(["git", "ls-files", folder], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return output.splitlines()


def in_wheel(path: str) -> str:
    """Where the wheel has a file of the repository: without its source root."""
    return path.split("/", 1)[1]


def check_wheel(names: set[str], read_metadata: str, entry_points: str) -> None:
    packages = {path.split("/")[1] for root in ("core", "backends", "plugins") for path in tracked(root)}
    for path in [*tracked("core"), *tracked("backends"), *tracked("plugins")]:
        if path.endswith((".py", ".typed")) and not path.startswith("plugins/example_backend/"):
            check(in_wheel(path) in names, f"the wheel lacks {in_wheel(path)}")
    for name in names:
        check("example_backend" not in name, f"the wheel has {name}, which is a distribution of its own")
        check("__pycache__" not in name, f"the wheel has {name}")
        check(not name.endswith(NATIVE) or name.startswith(KERNEL_FOLDERS), f"the wheel has the source {name}")
        top = name.split("/")[0]
        check(top in packages or top.endswith(".dist-info"), f"the wheel installs {name} outside of its packages")
    check("fourbit_cpu/_native.abi3.so" in names, "the wheel lacks the compiled CPU kernels")
    check("fourbit/py.typed" in names, "the wheel lacks fourbit/py.typed")
    check(any(n.endswith("licenses/LICENSE") for n in names), "the wheel lacks the licence")
    check("Name: fourbit\n" in read_metadata, "the wheel is not named fourbit")
    for line in (
        "[fourbit.backends]",
        "cpu = fourbit_cpu",
        "reference = fourbit.reference",
        "[fourbit.commands]",
        "demo = fourbit_demo.command:demo",
        "[fourbit.models]",
        "diffusers = fourbit_models.diffusers",
        "transformers = fourbit_models.transformers",
        "[vllm.general_plugins]",
        "fourbit = fourbit_vllm:register",
        "fourbit = fourbit_pytest",
        "fourbit.cli:main",
    ):
        check(line in entry_points, f"the wheel's entry points lack {line!r}")


def check_sdist(names: set[str]) -> None:
    for path in ("pyproject.toml", "README.md", "LICENSE", "core/fourbit/__init__.py", "tests/support.py"):
        check(path in names, f"the sdist lacks {path}")
    for path in tracked("backends"):
        check(path in names, f"the sdist lacks {path}")
    for name in names:
        check(not name.startswith((".ci/", ".git/", "asv_benchmarks/results/")), f"the sdist has {name}")


def main() -> None:
    folder = Path(sys.argv[1])
    wheels, sdists = list(folder.glob("*.whl")), list(folder.glob("*.tar.gz"))
    check(len(wheels) == 1 and len(sdists) == 1, f"want one wheel and one sdist in {folder}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = {n for n in wheel.namelist() if not n.endswith("/")}
        info = next(n for n in names if n.endswith(".dist-info/METADATA")).removesuffix("METADATA")
        check_wheel(names, wheel.read(info + "METADATA").decode(), wheel.read(info + "entry_points.txt").decode())
    check("-cp310-abi3-" in wheels[0].name, f"{wheels[0].name} is not in the stable ABI")
    with tarfile.open(sdists[0]) as sdist:
        inside = {m.name.split("/", 1)[1] for m in sdist.getmembers() if m.isfile()}
    check_sdist(inside)
    print(f"{wheels[0].name}: {len(names)} files; {sdists[0].name}: {len(inside)} files")


if __name__ == "__main__":
    main()
