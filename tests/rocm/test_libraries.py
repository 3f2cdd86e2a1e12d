"""The rocm backend's choices that need neither HIP nor a GPU: architectures, libraries, what is missing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fourbit_rocm
from fourbit import plugins
from fourbit.backend import OpQuery
from fourbit_rocm import codeobject, libraries, linear, requirements, targets


@pytest.mark.parametrize(
    ("name", "arch"),
    (
        ("gfx90a:sramecc+:xnack-", "gfx90a"),
        (b"gfx942:sramecc+:xnack-", "gfx942"),
        ("gfx1100", "gfx1100"),
        (b"gfx1030\0\0\0", "gfx1030"),
    ),
)
def test_arch_of_a_drivers_name(name, arch):
    assert targets.arch_of(name) == arch


def test_wave_sizes():
    assert {each.wave for each in targets.TARGETS.values() if each.arch.startswith("gfx9")} == {64}
    assert {each.wave for each in targets.TARGETS.values() if each.arch.startswith("gfx1")} == {32}
    assert targets.target("gfx90a").number == 0x90A
    assert all(each.has_mfma == (each.wave == 64) for each in targets.TARGETS.values())


@pytest.mark.parametrize("arch", ("gfx803", "gfx906", "gfx9999", "", "sm_90"))
def test_an_unknown_architecture_is_refused(arch):
    with pytest.raises(targets.UnknownArchError, match="it serves gfx90a, gfx942"):
        targets.target(arch)


def test_an_old_compiler_is_not_asked():
    """hipRTC 5.2 ends the process when it is asked for gfx942."""
    targets.check_compiler(targets.target("gfx90a"), (5, 2))
    with pytest.raises(targets.UnknownArchError, match=r"hipRTC 5.2 does not compile for gfx942: HIP 6.0 or newer"):
        targets.check_compiler(targets.target("gfx942"), (5, 2))


MAPS = """7f00-7f01 r-xp 00000000 08:01 12 /opt/torch/lib/libamdhip64.so
7f01-7f02 r--p 00001000 08:01 12 /opt/torch/lib/libamdhip64.so
7f02-7f03 r-xp 00000000 08:01 13 /opt/with space/lib/libamdhip64.so.6
7f03-7f04 rw-p 00000000 00:00 0
7f04-7f05 r-xp 00000000 08:01 14 /opt/torch/lib/libhiprtc.so
"""


def test_loaded_libraries():
    found = libraries.mapped_libraries(MAPS.splitlines(), "libamdhip64.so")
    assert found == [Path("/opt/torch/lib/libamdhip64.so"), Path("/opt/with space/lib/libamdhip64.so.6")]


def test_rocm_path_is_torchs(tmp_path):
    torch_folder = tmp_path / "torch"
    (torch_folder / "lib").mkdir(parents=True)
    assert libraries.rocm_path(None, torch_folder, "/users") == "/users"  # torch brings no HIP: as the user says
    library = torch_folder / "lib" / "libamdhip64.so"
    library.touch()
    assert libraries.rocm_path(None, torch_folder, "/users") == str(torch_folder)
    other = tmp_path / "rocm" / "lib"
    other.mkdir(parents=True)
    (other / "libamdhip64.so").touch()
    assert libraries.rocm_path(other / "libamdhip64.so.6.4", torch_folder, None) == str(tmp_path / "rocm")


def test_two_runtimes_are_refused(monkeypatch):
    monkeypatch.setattr(libraries, "loaded", lambda name: [Path("/a/libamdhip64.so"), Path("/b/libamdhip64.so.6")])
    with pytest.raises(RuntimeError, match="two HIP runtimes are loaded"):
        libraries.prepare()


def as_rocm(monkeypatch, devices=1, arch="gfx90a:sramecc+:xnack-", hip=(6, 4)):
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(gcnArchName=arch))

    def version():
        if isinstance(hip, Exception):
            raise hip
        return hip

    monkeypatch.setattr(libraries, "hip_version", version)


def test_what_is_missing(monkeypatch):
    assert "built without ROCm" in requirements.missing()
    as_rocm(monkeypatch, devices=0)
    assert "/dev/kfd" in requirements.missing()
    as_rocm(monkeypatch, hip=ImportError("No module named 'hip'"))
    assert 'pip install "fourbit[rocm]"' in requirements.missing()
    as_rocm(monkeypatch, hip=RuntimeError("failed to dlopen"))
    monkeypatch.setattr(libraries, "hip_python_version", lambda: "10.0.0.0.1.2")
    assert "failed to dlopen" in requirements.missing()
    as_rocm(monkeypatch, arch="gfx803")
    assert "device 0: the rocm backend has no kernels for 'gfx803'" in requirements.missing()
    as_rocm(monkeypatch, arch="gfx1201", hip=(6, 2))
    assert "HIP 6.4 or newer is needed" in requirements.missing()
    as_rocm(monkeypatch)
    assert requirements.missing() is None


@pytest.mark.parametrize("version", ("6.4.4.555.40", "7.2.2.562.43"))
def test_an_old_hip_python_wants_a_variable(monkeypatch, version):
    """It asks the linker for "libamdhip64.so", whatever ROCM_PATH says."""
    as_rocm(monkeypatch, hip=RuntimeError("failed to dlopen 'libamdhip64.so': cannot open shared object file"))
    monkeypatch.setattr(libraries, "hip_python_version", lambda: version)
    monkeypatch.setattr(libraries, "loaded", lambda name: [Path("/opt/torch/lib") / name])
    reason = requirements.missing()
    assert f"hip-python {version} ignores ROCM_PATH" in reason and "cannot open shared object file" in reason
    assert "pip install 'hip-python>=10'" in reason and "LD_LIBRARY_PATH=/opt/torch/lib" in reason


def test_hip_python_10_wants_another_variable(monkeypatch):
    as_rocm(monkeypatch, hip=RuntimeError("failed to dlopen '/opt/rocm/lib/libamdhip64.so'"))
    monkeypatch.setattr(libraries, "hip_python_version", lambda: "10.0.0.0.1.2")
    monkeypatch.setattr(libraries, "loaded", lambda name: [Path("/opt/torch/lib") / f"{name}.6"])
    reason = requirements.missing()
    assert "hip-python 10.0.0.0.1.2 takes" in reason and "else from ROCM_PATH" in reason and "/opt/torch/lib" in reason
    assert "LD_LIBRARY_PATH" not in reason


def test_a_second_runtime_is_named(monkeypatch):
    """hip-python found another libamdhip64 than torch's: both are named, and what this hip-python goes by."""
    found = [
        [Path("/opt/torch/lib/libamdhip64.so")],
        [Path("/opt/torch/lib/libamdhip64.so"), Path("/usr/lib/libamdhip64.so")],
    ]
    monkeypatch.setattr(libraries, "_prepared", False)
    monkeypatch.setattr(libraries, "loaded", lambda name: found.pop(0) if len(found) > 1 else found[0])
    calls = SimpleNamespace(hipRuntimeGetVersion=lambda: (0, 70200000), hiprtcVersion=lambda: (0, 9, 0))
    monkeypatch.setattr(libraries, "_modules", lambda: (calls, calls))
    version = libraries.hip_version
    as_rocm(monkeypatch)
    monkeypatch.setattr(libraries, "hip_version", version)
    monkeypatch.setattr(libraries, "hip_python_version", lambda: "7.2.2.562.43")
    reason = requirements.missing()
    assert "a second HIP runtime (/opt/torch/lib/libamdhip64.so, /usr/lib/libamdhip64.so)" in reason
    assert "start Python with LD_LIBRARY_PATH=/opt/torch/lib" in reason


def test_listed_everywhere_and_ready_under_rocm(monkeypatch):
    (info,) = [info for info in plugins.backends() if info.name == "rocm"]
    if torch.version.hip is None:
        assert info.state == "unavailable" and "built without ROCm" in info.reason
    found = []
    as_rocm(monkeypatch)
    fourbit_rocm.fourbit_register_backends(found.append)
    (backend,) = found
    assert backend.name == "rocm"
    assert backend.default_blocksize(torch.device("cuda", 0)) == 128 and backend.device_types == ("cuda",)
    assert backend.unavailable() is None


def test_supports_names_the_architecture(monkeypatch):
    as_rocm(monkeypatch, arch="gfx803")
    query = OpQuery("linear_4bit", torch.device("cuda", 0), torch.bfloat16, 128)
    answer = fourbit_rocm.RocmBackend().supports(query)
    assert not answer and "gfx803" in answer.reason


@pytest.mark.parametrize(
    ("arch", "dtype", "m", "k", "blocksize", "path"),
    (
        (0x90A, torch.bfloat16, 1, 4096, 128, "mfma"),
        (0x90A, torch.bfloat16, 16, 4096, 64, "mfma"),
        (0x90A, torch.bfloat16, 17, 4096, 64, "pieces"),
        (0x90A, torch.float32, 1, 4096, 64, "vector"),
        (0x90A, torch.float16, 1, 4096, 64, "vector"),  # its matrix cores flush denormals
        (0x942, torch.float16, 1, 4096, 64, "mfma"),
        (0x90A, torch.bfloat16, 1, 4096, 32, "vector"),
        (0x942, torch.float16, 1, 72, 64, "vector"),
        (0x1100, torch.bfloat16, 16, 4096, 128, "vector"),
        (0x1100, torch.bfloat16, 1, 4100, 128, "pieces"),
    ),
)
def test_ways_of_a_product(arch, dtype, m, k, blocksize, path):
    assert linear.path(arch, dtype, m, k, blocksize) == path


def kernel_info(lds, vgprs, wgp_mode=False, sgprs=64):
    descriptor = bytes(48) + (wgp_mode << 29).to_bytes(4, "little") + bytes(12)
    sizes = {"kernarg_size": 104, "lds_size": lds, "private_size": 0, "sgprs": sgprs, "vgprs": vgprs, "agprs": 0}
    spills = {"sgpr_spills": 0, "vgpr_spills": 0}
    return codeobject.KernelInfo(
        "k", 64, **sizes, **spills, max_workgroup_size=256, arguments=(), descriptor=descriptor
    )


KB = 1024


@pytest.mark.parametrize(
    ("arch", "info", "threads", "fit"),
    (
        # by LDS: 64 KB of a compute unit, 160 KB of CDNA 4's (in granules of 1280 bytes), 128 KB of a pair of RDNA's
        ("gfx90a", kernel_info(32 * KB, 90), 256, 2),
        ("gfx942", kernel_info(20 * KB, 60), 256, 3),
        ("gfx950", kernel_info(32 * KB, 90), 256, 4),
        ("gfx950", kernel_info(20 * KB, 60), 256, 8),
        ("gfx1030", kernel_info(32 * KB, 76), 256, 4),  # hipRTC 5.2: each compute unit for itself
        ("gfx1100", kernel_info(32 * KB, 75, wgp_mode=True), 256, 4),
        ("gfx1100", kernel_info(40 * KB, 75, wgp_mode=True), 256, 3),
        ("gfx1100", kernel_info(40 * KB, 75), 256, 2),  # 24 KB of either half are left
        # by vector registers: rows of a SIMD, four SIMDs
        ("gfx942", kernel_info(0, 248), 256, 2),
        ("gfx1030", kernel_info(0, 207, wgp_mode=True), 256, 2),
        ("gfx1100", kernel_info(0, 223, wgp_mode=True), 256, 3),
        ("gfx1100", kernel_info(0, 223), 256, 2),
        ("gfx1102", kernel_info(0, 223, wgp_mode=True), 256, 2),
        # by scalar registers, and by waves: eight of a SIMD of CDNA, sixteen of RDNA's
        ("gfx90a", kernel_info(0, 24, sgprs=106), 256, 7),
        ("gfx90a", kernel_info(0, 24), 256, 8),
        ("gfx90a", kernel_info(0, 24), 512, 4),
        ("gfx1201", kernel_info(0, 24, wgp_mode=True, sgprs=106), 256, 8),
    ),
    ids=lambda value: f"{value.lds_size}-{value.vgprs}" if isinstance(value, codeobject.KernelInfo) else str(value),
)
def test_workgroups_that_a_unit_holds(arch, info, threads, fit):
    assert targets.target(arch).workgroups(info, threads) == fit
    # what a launch adds counts like what the kernel has
    assert targets.target(arch).workgroups(info, threads, 128 * KB) < fit


def test_no_workgroup_has_more_than_its_unit():
    for each in targets.TARGETS.values():
        assert each.unit.lds_of_workgroup <= each.unit.lds, each.arch
        assert (each.unit.compute_units == 2) == (each.wave == 32), each.arch
        most = kernel_info(each.unit.lds_of_workgroup, 1)
        assert each.workgroups(most, 256) == each.unit.lds // each.unit.lds_of_workgroup, each.arch


@pytest.mark.parametrize("data", (b"", b"\x7fELF\x02" + bytes(100), b"__CLANG_OFFLOAD_BUNDLE__" + bytes(40)))
def test_a_damaged_code_object(data):
    with pytest.raises(codeobject.CodeObjectError):
        codeobject.parse(data)
