"""The rocm backend's modules and kernels, over a HIP made up of a few functions."""

from __future__ import annotations

import gc
from types import SimpleNamespace

from fourbit_gpu.spec import KernelSpec
from fourbit_rocm import compiler, driver, libraries
from fourbit_rocm.targets import target


class Image(bytes):
    """A code object that notes its end."""

    gone: list[str] = []

    def __del__(self):
        self.gone.append("image")


class Module:
    def __del__(self):
        Image.gone.append("module")


def test_a_kernel_keeps_its_module_and_the_modules_image(monkeypatch):
    """HIP does not promise to copy what hipModuleLoadData is given."""
    hip = SimpleNamespace(
        hipSetDevice=lambda index: (0,),
        hipModuleLoadData=lambda image: (0, Module()),
        hipModuleGetFunction=lambda module, name: (0, name),
    )
    info = SimpleNamespace(vgprs=8, private_size=0, lds_size=0, explicit_arguments=())
    monkeypatch.setattr(libraries, "bindings", lambda: (hip, None))
    monkeypatch.setattr(compiler, "compiled", lambda spec, where: Image(b"code"))
    monkeypatch.setattr(compiler, "check_code", lambda spec, where, code: info)
    where = target("gfx1100")
    props = driver.device_props(where, index=0, name="made up", units=48, l2_bytes=6 << 20, wave=32)
    launcher = driver.RocmLauncher(0, "gfx1100", props)
    monkeypatch.setattr(launcher, "_is_capturing", lambda: False)
    spec = KernelSpec.of("dequantize.cu", "dequantize_4bit", {})

    Image.gone.clear()
    kernel = launcher.kernel(spec)
    gc.collect()
    assert Image.gone == [] and launcher.kernel(spec) is kernel
    launcher._kernels.clear()
    del kernel
    gc.collect()
    assert sorted(Image.gone) == ["image", "module"]  # and no longer than the kernel
