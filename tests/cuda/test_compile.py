"""Every GPU kernel compiles for every architecture with NVRTC, which needs no GPU; registers, spills, shared memory."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import pytest
import torch

import fourbit_gpu
from fourbit.testing.inputs import BLOCKSIZES, DTYPES
from fourbit_cuda import libraries, matmul, plan, route, targets
from fourbit_cuda.tile import Shape
from fourbit_gpu import elementwise
from fourbit_gpu.compilation import CompileError, RuntimeCompiler
from fourbit_gpu.device import DeviceProps
from fourbit_gpu.pieces import slice_spec
from fourbit_gpu.program import program
from fourbit_gpu.spec import KernelSpec
from tests.cuda import cubin
from tests.support import skip_or_fail

ARCHS = (75, 80, 86, 89, 90, 100, 120)
BOOLS = (False, True)
STATIC_SHARED = 48 << 10
RESERVED = 1 << 10  # what sm_90 and newer keep of every block's shared memory


@pytest.fixture(scope="session", autouse=True)
def compiler():
    """The compiler module, with an NVRTC that can be loaded."""
    from fourbit_cuda import compiler

    try:
        libraries.version()
    except Exception as error:
        skip_or_fail(f"NVRTC: {type(error).__name__}: {error}")
    return compiler


def elementwise_specs() -> list[KernelSpec]:
    """All variants of the kernels that move elements."""
    specs = [elementwise.quantize_spec(d, b, s) for d in DTYPES for b in BLOCKSIZES for s in BOOLS]
    specs += [elementwise.dequantize_spec(d, nested) for d in DTYPES for nested in BOOLS]
    specs += [slice_spec(d, nested) for d in DTYPES for nested in BOOLS]
    specs += [elementwise.embedding_spec(d, nested, wide) for d in DTYPES for nested in BOOLS for wide in BOOLS]
    for name in ("quantize_blockwise", "dequantize_blockwise"):
        specs += [elementwise.blockwise_spec(name, d, b) for d in DTYPES for b in BLOCKSIZES]
    return specs


def props_of(arch: int) -> DeviceProps:
    """A GPU of that arch, roughly: shared memory is what the architecture has."""
    shared = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}[arch] << 10
    return DeviceProps(0, f"sm_{arch}", arch, 100, 40 << 20, shared, 32, 2000.0)


def linear_specs(arch: int) -> list[KernelSpec]:
    """What the launch plans choose on such a GPU, over shapes, numbers of rows, blocksizes and kinds of scales."""
    found: dict[KernelSpec, None] = {}
    for n, k in ((4096, 4096), (8192, 28672), (192, 320)):
        for rows in (1, 5, 16, 64):
            for dtype in DTYPES:
                for blocksize, nested in ((64, False), (64, True), (32, False), (256, False)):
                    shape = Shape(rows, n, k, elementwise.DTYPE_CODES[dtype], blocksize, nested)
                    chosen = plan.plan_linear(props_of(arch), shape)
                    if chosen is not None:
                        found[chosen.spec] = None
                        if chosen.arrange is not None:
                            found[chosen.arrange[0]] = None
    return list(found)


def matmul_specs(arch: int) -> list[KernelSpec]:
    """What the routes of many rows choose on such a GPU, and every kind of block; the forms of scales in turn."""
    found: dict[KernelSpec, None] = {}
    forms = itertools.cycle(itertools.product((1, 2), ((64, False), (64, True), (32, True), (256, False)), (0, 8)))
    kinds = [None, *matmul.BLOCKS] * 4
    for kind, (dtype, (blocksize, nested), experts) in zip(kinds, forms, strict=False):
        shape = Shape(600, 4096, 4096, dtype, blocksize, nested, experts, kind is not None and kind.transposed)
        if kind is None:
            chosen = route.route(props_of(arch), shape)
        else:
            chosen = matmul.make_plan(props_of(arch), shape, kind) if matmul.fits(props_of(arch), shape) else None
        if isinstance(chosen, matmul.Plan):
            found[chosen.spec] = None
    return list(found)


@cache
def build(spec: KernelSpec, arch: int) -> cubin.Usage:
    """Compile, without the cache on disk, and read the result; one compilation for both kernels of a source."""
    from fourbit_cuda import compiler

    options = compiler.options_for(spec, targets.target(arch, spec.arch_specific))
    code = _compile(spec.source, spec.package, options, arch)
    return cubin.usage(code)[spec.name]


@cache
def _compile(source: str, package: str, options: tuple[str, ...], arch: int) -> bytes:
    spec = KernelSpec(source, source, package=package)
    text, headers = program(spec)
    assert headers and text
    code, log = compiled(spec, text, headers, options)
    assert cubin.arch(code) == arch
    assert "Performance Loss" not in log, f"{source} {options}: {log}"  # products that wait for one another
    return code


def compiled(spec: KernelSpec, text: str, headers: dict[str, str], options: tuple[str, ...]) -> tuple[bytes, str]:
    """The code, and what NVRTC says of it."""
    from fourbit_cuda import compiler

    logs: list[str] = []
    read = RuntimeCompiler._bytes

    def read_both(self, name, handle):
        if name == "GetCUBIN":
            logs.append(read(self, "GetProgramLog", handle)[1].decode())
        return read(self, name, handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RuntimeCompiler, "_bytes", read_both)
        return compiler.compile_source(spec, text, headers, options, False), logs[0]


def test_products_that_wait_for_one_another_would_be_seen():
    """Sums that other code changes in a path that not all threads take."""
    text = """
#define PRODUCT asm volatile( \\
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;" \\
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
    extern "C" __global__ void k(float* p, unsigned long long a, unsigned long long b, int n) {
        float d[4] = {};
        for (int tile = 0; tile < p[threadIdx.x]; ++tile) {
            for (int i = 0; i < n; ++i) {
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                PRODUCT PRODUCT
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            }
            if (p[threadIdx.x + 7] > 0) { d[0] += p[1]; continue; }
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            p[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
        }
    }"""
    _, log = compiled(KernelSpec("k.cu", "k"), text, {}, ("--gpu-architecture=sm_90a",))
    assert "Performance Loss" in log


BACKENDS = Path(fourbit_gpu.__file__).parents[1]
PACKAGES = ("fourbit_gpu", "fourbit_cuda")
SOURCES = ("quantize.cu", "dequantize.cu", "dequantize_slice.cu", "embedding.cu", "blockwise.cu")


def check_elementwise(spec: KernelSpec, arch: int) -> None:
    """No spills, and few enough registers for three blocks of 256 threads, or one of 512, to share 65536."""
    found = build(spec, arch)
    assert found.frame_bytes == 0, f"{spec.label()} on sm_{arch} spills: {found}"
    assert found.registers <= 80, f"{spec.label()} on sm_{arch}: {found}"
    assert found.shared_bytes <= 8192, f"{spec.label()} on sm_{arch}: {found}"


def check_linear(spec: KernelSpec, arch: int) -> None:
    """What the plans choose fits the GPU: no spills, threads times registers, static and dynamic shared memory."""
    found = build(spec, arch)
    assert found.frame_bytes == 0, f"{spec.label()} on sm_{arch} spills: {found}"
    assert found.registers <= 255
    assert found.shared_bytes - RESERVED <= STATIC_SHARED <= props_of(arch).shared_per_block


def check_matmul(spec: KernelSpec, arch: int) -> None:
    """Registers for all threads of a block; what is spilled is what only the change from tile to tile needs."""
    found = build(spec, arch)
    threads = 128 * (2 + int(dict(spec.defines).get("DECODERS", 1)))
    assert found.registers * threads <= 65536, f"{spec.label()} on sm_{arch}: {found}"
    assert found.frame_bytes <= 256, f"{spec.label()} on sm_{arch} spills: {found}"
    assert found.shared_bytes <= RESERVED


@pytest.mark.long
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("arch", ARCHS)
def test_elementwise_kernels(arch, source):
    specs = [spec for spec in elementwise_specs() if spec.source == source]
    assert specs
    for spec in specs:
        check_elementwise(spec, arch)


@pytest.mark.long
@pytest.mark.parametrize("arch", ARCHS)
def test_linear_kernels(arch):
    specs = linear_specs(arch)
    assert bool(specs) == (arch >= plan.MIN_ARCH)
    for spec in specs:
        check_linear(spec, arch)


@pytest.mark.long
@pytest.mark.parametrize("arch", ARCHS)
def test_matmul_kernels(arch):
    specs = matmul_specs(arch)
    assert bool(specs) == (arch == matmul.ARCH)
    for spec in specs:
        check_matmul(spec, arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_one_kernel_of_each_kind(arch):
    """The short form of the two above: a product, and one of the other sources in turn."""
    for spec in linear_specs(arch)[:1]:
        check_linear(spec, arch)
    for spec in matmul_specs(arch)[:1]:
        check_matmul(spec, arch)
    source = SOURCES[ARCHS.index(arch) % len(SOURCES)]
    check_elementwise(next(spec for spec in elementwise_specs() if spec.source == source), arch)


def test_every_source_is_compiled_here():
    """But for rocm's own, which tests/rocm compiles."""
    compiled = {(spec.package, spec.source) for spec in (*elementwise_specs(), *linear_specs(90), *matmul_specs(90))}
    found = {(folder, path.name) for folder in PACKAGES for path in (BACKENDS / folder).glob("kernels/*.cu")}
    assert found == compiled


def test_no_source_includes_a_system_header():
    """Neither NVRTC's wheel nor hipRTC has any."""
    for path in (*BACKENDS.glob("fourbit_*/kernels/*.cu"), *BACKENDS.glob("fourbit_*/include/*.h")):
        assert "#include <" not in path.read_text(), path.name


def test_spills_would_be_seen(compiler):
    """The reader of cubins finds a frame where there is one."""
    text = """extern "C" __global__ void __launch_bounds__(1024) spill(float* p) {
    __shared__ float s[37];
    float x[100];
    for (int i = 0; i < 100; i++) x[i] = p[i * 7 + threadIdx.x];
    for (int j = 0; j < 100; j++) for (int i = 0; i < 99; i++) x[i] = x[i] * x[i + 1] + p[j];
    float t = 0;
    for (int i = 0; i < 100; i++) t += x[i] * i;
    s[threadIdx.x % 37] = t;
    __syncthreads();
    p[0] = s[3];
}"""
    for arch in (75, 90):
        options = (f"--gpu-architecture=sm_{arch}",)
        code = compiler.compile_source(KernelSpec("spill.cu", "spill"), text, {}, options, False)
        found = cubin.usage(code)["spill"]
        assert found.frame_bytes > 0 and 16 <= found.registers <= 64
        assert found.shared_bytes in (148, 148 + RESERVED)


def test_an_error_has_the_log_the_options_and_the_name(compiler):
    spec = KernelSpec.of("quantize.cu", "quantize_4bit", {"DTYPE": 1, "BLOCKSIZE": "oops", "SIGNED": 0})
    text, headers = program(spec)
    options = compiler.options_for(spec, targets.target(90))
    with pytest.raises(CompileError) as caught:
        compiler.compile_source(spec, text, headers, options, False)
    message = str(caught.value)
    assert "kernel quantize_4bit[BLOCKSIZE=oops, DTYPE=1, SIGNED=0] does not compile" in message
    assert (
        "NVRTC_ERROR_COMPILATION" in message and "--gpu-architecture=sm_90" in message and "-DBLOCKSIZE=oops" in message
    )
    assert 'identifier "oops" is undefined' in message and "blocks.h" in message


def test_target():
    known = (75, 80, 90, 120)
    assert targets.target(90, known=known) == targets.Target("sm_90", 90, False)
    assert targets.target(90, True, known).option == "sm_90a"
    assert targets.target(100, known=known) == targets.Target("compute_90", 90, True)  # newer than this NVRTC
    assert targets.target(130, known=known) == targets.Target("compute_120", 120, True)
    with pytest.raises(RuntimeError, match="does not compile for sm_70, only for 75, 80, 90, 120"):
        targets.target(70, known=known)
    with pytest.raises(RuntimeError, match="does not compile for sm_100a"):
        targets.target(100, True, known)


def test_ptx_for_a_newer_arch(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("FOURBIT_CACHE_DIR", str(tmp_path))
    code, where = compiler.compiled(elementwise.dequantize_spec(torch.bfloat16, True), 999)
    assert where.is_ptx and b".target sm_" in code and b".entry dequantize_4bit" in code


def test_compiled_code_is_kept_by_all_that_it_depends_on(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("FOURBIT_CACHE_DIR", str(tmp_path))
    spec = elementwise.dequantize_spec(torch.float16, False)

    def entries() -> int:
        return len(list((tmp_path / "jit").glob("*.code")))

    first, _ = compiler.compiled(spec, 80)
    assert compiler.compiled(spec, 80)[0] == first and entries() == 1
    compiler.compiled(spec, 90)
    compiler.compiled(elementwise.dequantize_spec(torch.float16, True), 80)
    assert entries() == 3
    monkeypatch.setattr(libraries, "version_text", lambda: "99.9")
    compiler.compiled(spec, 80)
    assert entries() == 4
