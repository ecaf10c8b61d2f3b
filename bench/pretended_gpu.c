/* A CUDA runtime and driver that report one idle GPU of the capability in PRETENDED_CAPABILITY; loaded before the real
 * ones by bench/pretended_gpu.py. PyTorch asks these before it traces a graph; nothing can be allocated or launched. */
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define CUDART_CB
#define __host__
#define __device__
#define __device_builtin__
#define __cudart_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __builtin_align__(n) __attribute__((aligned(n)))
#define __align__(n) __attribute__((aligned(n)))
#define __location__(place)

#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = *greatest = 0, cudaSuccess; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    int capability = atoi(getenv("PRETENDED_CAPABILITY"));
    memset(p, 0, sizeof *p);
    strcpy(p->name, "pretended GPU");
    p->major = capability / 10, p->minor = capability % 10;
    p->warpSize = 32, p->maxThreadsPerBlock = 1024;
    /* Of an RTX 4090, which Inductor's choices follow: SMs, memory, L2; shared memory per SM comes from the caller. */
    p->multiProcessorCount = 128, p->totalGlobalMem = 24UL << 30, p->l2CacheSize = 72 << 20;
    p->regsPerMultiprocessor = 65536, p->sharedMemPerBlock = 49152;
    p->maxThreadsPerMultiProcessor = atoi(getenv("PRETENDED_SM_THREADS"));
    p->sharedMemPerMultiprocessor = atoi(getenv("PRETENDED_SM_SHARED_BYTES"));
    p->sharedMemPerBlockOptin = p->sharedMemPerMultiprocessor - 1024;
    return cudaSuccess;
}

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { return *flags = *active = 0; }

/* What PyTorch's library links to and must never reach. */
#define NEVER(name) int name(void) { abort(); }
NEVER(cuCtxGetCurrent) NEVER(cuCtxSetCurrent) NEVER(cuDeviceGet) NEVER(cuDeviceGetAttribute)
NEVER(cuDevicePrimaryCtxRetain) NEVER(cuFuncGetAttribute) NEVER(cuFuncSetAttribute) NEVER(cuFuncSetCacheConfig)
NEVER(cuGetErrorString) NEVER(cuLaunchCooperativeKernel) NEVER(cuLaunchKernel) NEVER(cuLinkAddData_v2)
NEVER(cuLinkComplete) NEVER(cuLinkCreate_v2) NEVER(cuModuleGetFunction) NEVER(cuModuleLoad) NEVER(cuModuleLoadData)
NEVER(cuModuleLoadDataEx) NEVER(cuModuleUnload) NEVER(cuOccupancyMaxActiveBlocksPerMultiprocessor)
NEVER(cuPointerGetAttribute) NEVER(cuTensorMapEncodeTiled)
