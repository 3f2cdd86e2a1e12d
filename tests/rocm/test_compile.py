"""Every kernel variant compiles for every architecture, and the code object is what the launches assume."""

from __future__ import annotations

import pytest

from fourbit_gpu.compilation import CompileError
from fourbit_gpu.program import program
from fourbit_rocm import compiler, linear
from fourbit_rocm.codeobject import parse
from fourbit_rocm.targets import target
from tests.rocm.gcn import tiers
from tests.rocm.gcn.disassembly import disassemble
from tests.rocm.variants import DTYPES, specs

LDS_BYTES = 65536
REGISTERS = {64: 512, 32: 256}
"""Vector registers of a lane at most, by wave size (CDNA counts its accumulation registers in)."""

FIT = {
    **{("linear_vector", lds << 10): fit for lds, fit in ((64, 2), (128, 4), (160, 4))},  # 32 KB each
    **{("linear_mfma", lds << 10): fit for lds, fit in ((64, 3), (160, 8))},  # 20 KB each
}
"""Workgroups that fit a unit, by the kernel and the unit's LDS."""

# Memory of a lane's own means spilled registers or an indexed array; calls mean that something was not inlined.
FORBIDDEN = ("scratch_", "buffer_store", "buffer_load", "s_swappc", "s_setpc")


def checked(spec, where):
    """Compile, by the tier for the architecture and into the cache that the launches use, and check the code object."""
    tier = tiers.tier_for(where.arch)
    with tiers.serving(tier):
        image = compiler.compiled(spec, where)
    info = compiler.check_code(spec, where, image)  # target, wave size, parameters of eight bytes
    label = f"{spec.label()} for {where.arch}"
    assert parse(image).target == where.arch and info.wavefront_size == where.wave, label
    assert info.private_size == info.sgpr_spills == info.vgpr_spills == 0, f"{label} spills: {info}"
    assert info.vgprs <= REGISTERS[where.wave] and info.sgprs <= 112, f"{label}: {info.vgprs}, {info.sgprs}"
    assert info.lds_size <= LDS_BYTES, f"{label}: {info.lds_size} bytes of LDS"
    threads = max(int(dict(spec.defines).get("BLOCKSIZE", 0)) // 8, 256)
    assert info.max_workgroup_size >= threads, f"{label}: at most {info.max_workgroup_size} work items"
    # where HIP counts workgroup processors: see targets.py
    assert info.wgp_mode == (where.wave == 32 and tier is not tiers.HIPRTC5), label
    fit = where.workgroups(info, threads)
    assert fit > 0 and fit * info.lds_size <= where.unit.lds, f"{label}: {fit} workgroups a unit"
    expected = FIT.get((spec.name, where.unit.lds))
    if expected is not None and int(dict(spec.defines).get("M", 1)) >= 4:  # as the registers of some compilers allow
        assert expected // 2 <= fit <= expected, f"{label}: {fit} fit"
    elif expected is not None:
        assert fit == expected, f"{label}: {fit} fit"
    for instruction in disassemble(image, where.arch)[spec.name]:
        assert not instruction.mnemonic.startswith(FORBIDDEN), f"{label}: {instruction.text}"
    return image


@pytest.mark.long
@pytest.mark.parametrize("arch", tiers.ARCHS)
def test_every_variant(arch, device, capsys):
    where = target(arch)
    variants = specs(where)
    for spec in variants:
        checked(spec, where)
    with capsys.disabled():
        print(f"\n{arch}: {len(variants)} kernel variants compiled by {tiers.tier_for(arch).name}")


@pytest.mark.parametrize("arch", tiers.ARCHS)
def test_a_few_variants(arch, device):
    where = target(arch)
    for spec in specs(where)[::27]:
        checked(spec, where)


@pytest.mark.parametrize("arch", ("gfx90a", "gfx942", "gfx950"))
def test_matrix_cores_are_used(arch, device):
    where = target(arch)
    for spec in (each for each in specs(where) if each.name == "linear_mfma"):
        code = disassemble(checked(spec, where), arch)[spec.name]
        products = [i for i in code if i.mnemonic.startswith("v_mfma_f32_16x16x16")]
        assert products and len(products) % 4 == 0


@pytest.mark.long
@pytest.mark.parametrize(
    ("arch", "tier"),
    [*((arch, tiers.HIPRTC6) for arch in tiers.OLD_ARCHS), *((arch, tiers.CLANG) for arch in tiers.ARCHS)],
    ids=lambda value: getattr(value, "name", value).split(" (")[0],
)
def test_the_other_compilers(arch, tier, device):
    """Those that `checked` does not ask: users have compilers of many versions."""
    if tier not in tiers.available():
        pytest.skip(f"{tier.name} is not here; {[each.name for each in tiers.available()]} serve in its place")
    where = target(arch)
    for spec in specs(where)[::7]:
        compiler.check_code(spec, where, tier.image(spec, where))


def test_there_is_a_tier_for_every_architecture(device, capsys):
    for arch in tiers.ARCHS:
        tiers.tier_for(arch)
    with capsys.disabled():
        print(f"\ncompilers: {', '.join([tiers.HIPRTC5.name, *(tier.name for tier in tiers.available())])}")


def test_a_compile_error_has_the_log(device):
    spec = linear.vector_spec(DTYPES[0], False, 1)
    where = target("gfx90a")
    with pytest.raises(CompileError) as caught:
        tiers.HIPRTC5.image(spec, where, "this is no kernel;")
    assert "HIPRTC_ERROR_COMPILATION" in str(caught.value) and "error:" in caught.value.log
    assert "--offload-arch=gfx90a" in caught.value.options


def test_code_for_another_wave_size_is_refused(device):
    where = target("gfx1030")
    spec = specs(where)[0]
    text, headers = program(spec)
    options = (*compiler.options_for(spec, where), "-mwavefrontsize64")
    image = compiler.compile_source(spec, text, headers, options)
    with pytest.raises(CompileError, match="waves of 64 lanes, gfx1030 runs 32"):
        compiler.check_code(spec, where, image)


def test_code_for_another_target_is_refused(device):
    spec = specs(target("gfx90a"))[0]
    image = tiers.HIPRTC5.image(spec, target("gfx90a"))
    with pytest.raises(CompileError, match="for gfx90a, not gfx1030"):
        compiler.check_code(spec, target("gfx1030"), image)
