// What hipRTC defines before a source, for clang alone, which has no HIP headers: only what the kernels use.
#define __HIPCC_RTC__ 1
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __host__ __attribute__((host))
#define __shared__ __attribute__((shared))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(threads) __attribute__((amdgpu_flat_work_group_size(1, threads)))

struct fb_thread {
    __declspec(property(get = get)) unsigned x;
    __device__ unsigned get() const { return __builtin_amdgcn_workitem_id_x(); }
};
struct fb_block {
    __declspec(property(get = get_x)) unsigned x;
    __declspec(property(get = get_y)) unsigned y;
    __device__ unsigned get_x() const { return __builtin_amdgcn_workgroup_id_x(); }
    __device__ unsigned get_y() const { return __builtin_amdgcn_workgroup_id_y(); }
};
struct fb_threads {
    __declspec(property(get = get)) unsigned x;
    __device__ unsigned get() const { return __builtin_amdgcn_workgroup_size_x(); }
};
struct fb_grid {
    __declspec(property(get = get_x)) unsigned x;
    __declspec(property(get = get_y)) unsigned y;
    __device__ unsigned get_x() const { return __builtin_amdgcn_grid_size_x() / __builtin_amdgcn_workgroup_size_x(); }
    __device__ unsigned get_y() const { return __builtin_amdgcn_grid_size_y() / __builtin_amdgcn_workgroup_size_y(); }
};
static const __attribute__((device)) fb_thread threadIdx = {};
static const __attribute__((device)) fb_block blockIdx = {};
static const __attribute__((device)) fb_threads blockDim = {};
static const __attribute__((device)) fb_grid gridDim = {};
