/* A libamdhip64 that has one made-up device and hands modules and launches to the emulator.

   Built by tests/rocm/gcn/standin.py, which also registers `handler`: hip-python calls the functions below as it calls
   the real ones, so what is tested is the unmodified path from Python to the driver's API. hipRTC is the real one,
   in a library of its own. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    uint32_t grid[3], threads[3], shared;
    const void *arguments;
    size_t size;
    void *stream;
} launch_t;

typedef int (*handler_t)(int what, const void *data, size_t size, int64_t handle, void *result);
enum { LOAD = 0, FUNCTION = 1, LAUNCH = 2, UNLOAD = 3 };
enum { INVALID_VALUE = 1, NOT_INITIALIZED = 3, NO_DEVICE = 100, NOT_SUPPORTED = 801 };

static handler_t handler;
static int version = 50221153, device_set;

void standin_register(handler_t function, int hip_version) { handler = function, version = hip_version; }

int hipInit(unsigned flags) { return flags ? INVALID_VALUE : 0; }
int hipRuntimeGetVersion(int *out) { return *out = version, 0; }
int hipDriverGetVersion(int *out) { return *out = version, 0; }
int hipGetDeviceCount(int *out) { return *out = 1, 0; }
int hipGetDevice(int *out) { return *out = 0, 0; }
int hipSetDevice(int index) { return index ? NO_DEVICE : (device_set = 1, 0); }
int hipStreamSynchronize(void *stream) { return (void)stream, 0; }
int hipDeviceSynchronize(void) { return 0; }
const char *hipGetErrorString(int error) { return error == 719 ? "emulated launch failed" : "stand-in error"; }
const char *hipGetErrorName(int error) { return (void)error, "hipErrorStandIn"; }

int hipModuleLoadData(void **module, const void *image) {
    const unsigned char *elf = image;
    uint64_t sections;
    uint16_t each, count;
    if (!handler || !device_set) return NOT_INITIALIZED;
    if (memcmp(elf, "\177ELF\2", 5)) return INVALID_VALUE;
    memcpy(&sections, elf + 40, 8), memcpy(&each, elf + 58, 2), memcpy(&count, elf + 60, 2); /* the last thing in it */
    return handler(LOAD, image, sections + (size_t)each * count, 0, module);
}

int hipModuleGetFunction(void **function, void *module, const char *name) {
    return handler ? handler(FUNCTION, name, strlen(name), (int64_t)module, function) : NOT_INITIALIZED;
}

int hipModuleUnload(void *module) { return handler ? handler(UNLOAD, 0, 0, (int64_t)module, 0) : NOT_INITIALIZED; }

int hipModuleLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared, void *stream, void **parameters, void **extra) {
    launch_t launch = {{gx, gy, gz}, {bx, by, bz}, shared, 0, 0, stream};
    if (!handler) return NOT_INITIALIZED;
    if (parameters || !extra) return NOT_SUPPORTED; /* the form that the backend uses: one buffer */
    for (; *extra != (void *)3; extra += 2) {
        if (*extra == (void *)1) launch.arguments = extra[1];
        else if (*extra == (void *)2) launch.size = *(size_t *)extra[1];
        else return INVALID_VALUE;
    }
    return handler(LAUNCH, &launch, sizeof launch, (int64_t)function, 0);
}
