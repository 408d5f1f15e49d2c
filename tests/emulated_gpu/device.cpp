// Devices and what they say of themselves; settings, errors and faults.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "state.h"

namespace emulated {

std::mutex state;
Settings settings;
std::vector<Device> devices;
thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local bool in_host_function = false;

namespace {

std::mutex fault_lock;
std::vector<std::string> noted;

}  // namespace

Device& device(int number) {
    if (number < 0 || number >= static_cast<int>(devices.size())) fail(cudaErrorInvalidDevice);
    return devices[number];
}

void fail(cudaError_t code, const std::string& sentence) {
    if (!sentence.empty()) std::fprintf(stderr, "emulated GPU: %s\n", sentence.c_str());
    throw Failure{code};
}

void enter(const char* name) {
    if (getpid() != settings.process)
        fail(cudaErrorInitializationError, std::string(name) + " was called in a forked child");
    if (in_host_function) {
        emulated_fault((std::string(name) + " was called by a host function, which must not call CUDA").c_str());
        throw Failure{cudaErrorNotPermitted};
    }
}

}  // namespace emulated

using namespace emulated;

extern "C" {

// --- for Python -----------------------------------------------------------------------------------------------------

void emulated_configure(int count, const uint64_t* memory, int timing, int late_pageable, int capability) {
    Lock lock(state);
    settings = {static_cast<Timing>(timing), late_pageable != 0, capability, getpid()};
    devices.resize(count);
    for (int i = 0; i < count; i++) devices[i].memory = memory[i];
}

void emulated_fault(const char* sentence) {
    std::fprintf(stderr, "emulated GPU: %s\n", sentence);
    std::lock_guard<std::mutex> guard(fault_lock);
    noted.push_back(sentence);
}

// Copies the first fault into the text and forgets it; 0 if there is none.
int emulated_take_fault(char* text, size_t size) {
    std::lock_guard<std::mutex> guard(fault_lock);
    if (noted.empty()) return 0;
    std::snprintf(text, size, "%s", noted.front().c_str());
    noted.erase(noted.begin());
    return 1;
}

// Lets devices work again that a fault had ended: CUDA needs a new process for that.
void emulated_mend() {
    Lock lock(state);
    for (Device& each : devices) each.broken = cudaSuccess;
}

// Called in place of every function of the runtime that is not emulated.
int emulated_unknown(const char* name) {
    emulated_fault((std::string(name) + " was called, which is not emulated").c_str());
    return last_error = cudaErrorNotSupported;
}

// --- errors ---------------------------------------------------------------------------------------------------------

cudaError_t cudaGetLastError() {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

// --- devices --------------------------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) {
    *count = static_cast<int>(devices.size());
    return devices.empty() ? cudaErrorNoDevice : cudaSuccess;
}

cudaError_t cudaGetDevice(int* number) {
    *number = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int number) {
    if (number < 0 || number >= static_cast<int>(devices.size())) return last_error = cudaErrorInvalidDevice;
    current_device = number;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
    return call(__func__, [](Lock& lock) {
        // Whatever the capture's mode: a device with a captured stream cannot be waited for, and the attempt ends the
        // captures of all threads on it.
        bool captured = false;
        for (auto& stream : streams_of(current_device)) {
            if (!stream->capture) continue;
            invalidate(*stream->capture);
            captured = true;
        }
        if (captured)
            fail(cudaErrorStreamCaptureUnsupported, "cudaDeviceSynchronize while a stream of the device is captured");
        unsafe("cudaDeviceSynchronize");
        complete_device(lock, current_device);
    });
}

// Devices do not see each other's memory.
cudaError_t cudaDeviceCanAccessPeer(int* can, int one, int other) {
    return call(__func__, [&](Lock&) {
        device(one), device(other);
        *can = 0;
    });
}

cudaError_t cudaDeviceEnablePeerAccess(int other, unsigned) {
    return call(__func__, [&](Lock&) {
        device(other);
        throw Failure{cudaErrorPeerAccessUnsupported};
    });
}

cudaError_t cudaDeviceDisablePeerAccess(int other) {
    return call(__func__, [&](Lock&) {
        device(other);
        throw Failure{cudaErrorPeerAccessNotEnabled};
    });
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int number) {
    return call(__func__, [&](Lock&) {
        device(number);
        std::snprintf(text, size, "0000:%02x:00.0", number + 1);
    });
}

cudaError_t cudaDeviceGetByPCIBusId(int* number, const char* text) {
    return call(__func__, [&](Lock&) {
        unsigned domain = 0, bus = 0;
        if (std::sscanf(text, "%x:%x", &domain, &bus) != 2) fail(cudaErrorInvalidValue);
        device(static_cast<int>(bus) - 1);
        *number = static_cast<int>(bus) - 1;
    });
}

cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

}  // extern "C"

// --- properties: an H200's, but for what its compute capability decides ----------------------------------------------

namespace {

struct Generation {
    int capability, shared_optin, shared_multiprocessor, threads_multiprocessor, blocks_multiprocessor;
};

// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; shared memory in KiB.
constexpr Generation generations[] = {
    {70, 96, 96, 2048, 32},    {72, 96, 96, 2048, 32},    {75, 64, 64, 1024, 16},   {80, 163, 164, 2048, 32},
    {86, 99, 100, 1536, 16},   {87, 163, 164, 1536, 16},  {89, 99, 100, 1536, 24},  {90, 227, 228, 2048, 32},
    {100, 227, 228, 2048, 32}, {103, 227, 228, 2048, 32}, {120, 99, 100, 1536, 24}, {121, 99, 100, 1536, 24},
};

const Generation& generation() {
    for (const Generation& each : generations)
        if (each.capability == settings.capability) return each;
    fail(cudaErrorInvalidValue, "no compute capability " + std::to_string(settings.capability) + " is known");
}

std::map<int, int> attributes() {
    const Generation& here = generation();
    return {
        {cudaDevAttrMaxThreadsPerBlock, 1024},
        {cudaDevAttrMaxBlockDimX, 1024},
        {cudaDevAttrMaxBlockDimY, 1024},
        {cudaDevAttrMaxBlockDimZ, 64},
        {cudaDevAttrMaxGridDimX, 2147483647},
        {cudaDevAttrMaxGridDimY, 65535},
        {cudaDevAttrMaxGridDimZ, 65535},
        {cudaDevAttrMaxSharedMemoryPerBlock, 48 << 10},
        {cudaDevAttrTotalConstantMemory, 64 << 10},
        {cudaDevAttrWarpSize, 32},
        {cudaDevAttrMaxRegistersPerBlock, 65536},
        {cudaDevAttrClockRate, 1980000},
        {cudaDevAttrGpuOverlap, 1},
        {cudaDevAttrMultiProcessorCount, 132},
        {cudaDevAttrKernelExecTimeout, 0},
        {cudaDevAttrIntegrated, 0},
        {cudaDevAttrCanMapHostMemory, 1},
        {cudaDevAttrComputeMode, 0},
        {cudaDevAttrConcurrentKernels, 1},
        {cudaDevAttrEccEnabled, 1},
        {cudaDevAttrMemoryClockRate, 3201000},
        {cudaDevAttrGlobalMemoryBusWidth, 6144},
        {cudaDevAttrL2CacheSize, 60 << 20},
        // The two that CuPy asks for one by one on CUDA 13, whose properties have them no longer.
        {cudaDevAttrMaxTexture1DLinearWidth, 1 << 28},
        {cudaDevAttrSingleToDoublePrecisionPerfRatio, 2},
        {cudaDevAttrMaxThreadsPerMultiProcessor, here.threads_multiprocessor},
        {cudaDevAttrAsyncEngineCount, 3},
        {cudaDevAttrUnifiedAddressing, 1},
        {cudaDevAttrComputeCapabilityMajor, settings.capability / 10},
        {cudaDevAttrComputeCapabilityMinor, settings.capability % 10},
        {cudaDevAttrStreamPrioritiesSupported, 1},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, here.shared_multiprocessor << 10},
        {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
        {cudaDevAttrManagedMemory, 1},
        {cudaDevAttrPageableMemoryAccess, settings.late_pageable},
        {cudaDevAttrConcurrentManagedAccess, 1},
        {cudaDevAttrPageableMemoryAccessUsesHostPageTables, settings.late_pageable},
        {cudaDevAttrCooperativeLaunch, 1},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, here.shared_optin << 10},
        {cudaDevAttrHostRegisterSupported, 1},
        {cudaDevAttrMaxBlocksPerMultiprocessor, here.blocks_multiprocessor},
        {cudaDevAttrReservedSharedMemoryPerBlock, settings.capability >= 80 ? 1024 : 0},
        {cudaDevAttrMemoryPoolsSupported, 1},
    };
}

}  // namespace

extern "C" cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int number) {
    return call(__func__, [&](Lock&) {
        device(number);
        auto known = attributes();
        auto found = known.find(attribute);
        if (found == known.end()) {
            emulated_fault(("attribute " + std::to_string(attribute) + " of the device is not emulated").c_str());
            throw Failure{cudaErrorInvalidValue};
        }
        *value = found->second;
    });
}

// The headers of CUDA 12 name it cudaGetDeviceProperties_v2.
extern "C" cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int number) {
    return call(__func__, [&](Lock&) {
        Device& here = device(number);
        auto known = attributes();
        *properties = {};
        std::snprintf(properties->name, sizeof properties->name, "Emulated GPU of compute capability %d.%d",
                      settings.capability / 10, settings.capability % 10);
        properties->uuid.bytes[15] = static_cast<char>(number + 1);
        properties->totalGlobalMem = here.memory;
        properties->sharedMemPerBlock = known[cudaDevAttrMaxSharedMemoryPerBlock];
        properties->regsPerBlock = known[cudaDevAttrMaxRegistersPerBlock];
        properties->warpSize = known[cudaDevAttrWarpSize];
        properties->maxThreadsPerBlock = known[cudaDevAttrMaxThreadsPerBlock];
        properties->totalConstMem = known[cudaDevAttrTotalConstantMemory];
        for (int i = 0; i < 3; i++) {
            properties->maxThreadsDim[i] = known[cudaDevAttrMaxBlockDimX + i];
            properties->maxGridSize[i] = known[cudaDevAttrMaxGridDimX + i];
        }
        properties->major = settings.capability / 10;
        properties->minor = settings.capability % 10;
        properties->multiProcessorCount = known[cudaDevAttrMultiProcessorCount];
        properties->canMapHostMemory = 1;
        properties->concurrentKernels = 1;
        properties->ECCEnabled = 1;
        properties->pciBusID = number + 1;
        properties->asyncEngineCount = known[cudaDevAttrAsyncEngineCount];
        properties->unifiedAddressing = 1;
        properties->memoryBusWidth = known[cudaDevAttrGlobalMemoryBusWidth];
        properties->l2CacheSize = known[cudaDevAttrL2CacheSize];
        properties->maxThreadsPerMultiProcessor = known[cudaDevAttrMaxThreadsPerMultiProcessor];
        properties->streamPrioritiesSupported = 1;
        properties->sharedMemPerMultiprocessor = known[cudaDevAttrMaxSharedMemoryPerMultiprocessor];
        properties->regsPerMultiprocessor = known[cudaDevAttrMaxRegistersPerMultiprocessor];
        properties->managedMemory = 1;
        properties->pageableMemoryAccess = settings.late_pageable;
        properties->concurrentManagedAccess = 1;
        properties->cooperativeLaunch = 1;
        properties->sharedMemPerBlockOptin = known[cudaDevAttrMaxSharedMemoryPerBlockOptin];
        properties->pageableMemoryAccessUsesHostPageTables = settings.late_pageable;
        properties->maxBlocksPerMultiProcessor = known[cudaDevAttrMaxBlocksPerMultiprocessor];
        properties->reservedSharedMemPerBlock = known[cudaDevAttrReservedSharedMemoryPerBlock];
        properties->memoryPoolsSupported = 1;
#if CUDART_VERSION < 13000
        properties->clockRate = known[cudaDevAttrClockRate];
        properties->deviceOverlap = 1;
        properties->memoryClockRate = known[cudaDevAttrMemoryClockRate];
#endif
    });
}

// --- the driver's view: contexts are devices -------------------------------------------------------------------------

namespace {

constexpr uintptr_t context_base = 0x1000;

CUcontext context(int number) { return reinterpret_cast<CUcontext>(context_base + number); }

struct Named {
    int code;
    const char *name, *text;
};

constexpr Named driver_errors[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {218, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {401, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {716, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {800, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {902, "CUDA_ERROR_STREAM_CAPTURE_MERGE", "operation would result in a merge of separate capture sequences"},
    {903, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not ended in the same stream as it began"},
    {904, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work"},
    {905, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream"},
    {906, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {907, "CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream"},
    {908, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
     "attempt to terminate a thread-local capture sequence from another thread"},
};

CUresult describe(CUresult error, const char** text, const char* Named::* which) {
    for (const Named& each : driver_errors) {
        if (each.code != error) continue;
        *text = each.*which;
        return CUDA_SUCCESS;
    }
    *text = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

}  // namespace

extern "C" {

CUresult cuGetErrorName(CUresult error, const char** text) { return describe(error, text, &Named::name); }
CUresult cuGetErrorString(CUresult error, const char** text) { return describe(error, text, &Named::text); }

CUresult cuInit(unsigned) { return devices.empty() ? CUDA_ERROR_NO_DEVICE : CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int* version) {
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) { return static_cast<CUresult>(cudaGetDeviceCount(count)); }

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }

CUresult cuCtxGetCurrent(CUcontext* current) {
    *current = context(current_device);
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext given) {
    return static_cast<CUresult>(cudaSetDevice(static_cast<int>(reinterpret_cast<uintptr_t>(given) - context_base)));
}

CUresult cuCtxGetDevice(CUdevice* number) {
    *number = current_device;
    return CUDA_SUCCESS;
}

CUresult cuStreamGetCtx(CUstream handle, CUcontext* found) {
    return driver_call(__func__, [&](Lock&) { *found = context(stream_of(handle)->device); });
}

// CuPy's runtime asks for it before it looks a word for an error up, and goes on without. Another runtime cannot.
CUresult cuGetExportTable(const void**, const CUuuid*) { return CUDA_ERROR_NOT_SUPPORTED; }

}  // extern "C"
