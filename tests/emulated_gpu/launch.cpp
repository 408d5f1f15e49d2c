// Modules and launches. What a kernel does is compiled elsewhere (modules.py); here is what may be launched, and what
// happens when it goes wrong.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "state.h"

namespace emulated {

namespace {

using Launch = const char* (*)(const uint32_t grid[3], const uint32_t block[3], uint64_t dynamic_shared_bytes,
                               const char* parameters, const Hooks* hooks);

struct Parameter {
    size_t offset, size;
};

struct Kernel {
    std::string name;
    void* module = nullptr;
    int device = 0;
    Launch launch = nullptr;
    std::vector<Parameter> parameters;
    size_t parameter_bytes = 0, shared_bytes = 0, dynamic_limit = 0;
    unsigned max_threads = 1024;
    int registers = -1;  // asked for when they are needed
};

struct Variable {
    uint64_t address;
    size_t size;
};

struct Module {
    int device = 0;
    std::map<std::string, void*> kernels;
    std::map<std::string, Variable> variables;
};

constexpr size_t usual_shared = 48 << 10;
constexpr unsigned register_file = 65536;
// As many registers as a thread can have fit for a block of this size: only more threads need to be counted.
constexpr unsigned threads_that_always_fit = 256;

Handles<Module> modules;
Handles<Kernel> kernels;

// Python's: compiles the PTX and calls emulated_add_kernel for each kernel; 0, or a CUresult.
int (*load_module)(void* module, const char* image) = nullptr;
// Python's: the registers of a kernel, found by compiling it for real; negative if that failed.
int (*count_registers)(void* module, const char* name) = nullptr;

int registers_of(Lock& lock, Kernel& kernel) {
    if (kernel.registers >= 0) return kernel.registers;
    lock.unlock();
    int found = count_registers(kernel.module, kernel.name.c_str());
    lock.lock();
    if (found < 0) throw Failure{cudaErrorUnknown};
    return kernel.registers = found;
}

size_t shared_optin() {
    int bytes = 0;
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
    return bytes;
}

std::string shape(const uint32_t dim[3]) {
    char text[64];
    std::snprintf(text, sizeof text, "(%u, %u, %u)", dim[0], dim[1], dim[2]);
    return text;
}

// Raises unless the device can run such blocks.
void check_launch(Lock& lock, Kernel& kernel, const uint32_t grid[3], const uint32_t block[3], size_t dynamic_shared) {
    std::string what =
        "a launch of " + kernel.name + " with a grid of " + shape(grid) + " blocks of " + shape(block) + " threads";
    uint64_t threads = uint64_t{block[0]} * block[1] * block[2];
    bool empty = !threads || !grid[0] || !grid[1] || !grid[2];
    if (empty || grid[0] > 2147483647u || grid[1] > 65535 || grid[2] > 65535)
        fail(cudaErrorInvalidValue, what + ": a grid has 1 to 2147483647, 65535, 65535 blocks");
    if (block[0] > 1024 || block[1] > 1024 || block[2] > 64 || threads > 1024)
        fail(cudaErrorInvalidValue, what + ": a block has at most 1024 threads, 64 in its third dimension");
    if (threads > kernel.max_threads)
        fail(cudaErrorLaunchOutOfResources, what + ": its launch bounds allow " + std::to_string(kernel.max_threads));
    size_t allowed = std::max(kernel.dynamic_limit, usual_shared - std::min(usual_shared, kernel.shared_bytes));
    if (dynamic_shared > allowed)
        fail(cudaErrorInvalidValue,
             what + ": " + std::to_string(dynamic_shared) + " bytes of shared memory besides its own " +
                 std::to_string(kernel.shared_bytes) + ", allowed are " + std::to_string(allowed));
    if (threads > threads_that_always_fit) {
        // Registers are given out by eights for a thread, to warps by fours.
        unsigned each = (registers_of(lock, kernel) + 7) / 8 * 8, whole = (threads + 127) / 128 * 128;
        if (each * whole > register_file)
            fail(cudaErrorLaunchOutOfResources,
                 what + ": " + std::to_string(each) + " registers a thread are more than 65536");
    }
}

// What CUDA would call a kernel's end with this sentence (block.cpp, thread.h).
cudaError_t error_of(const std::string& sentence) {
    auto has = [&](const char* words) { return sentence.find(words) != std::string::npos; };
    if (has(": misaligned")) return cudaErrorMisalignedAddress;
    if (has(" are in no allocation") || has(" are not within ") || has(" are not in ")) return cudaErrorIllegalAddress;
    return cudaErrorLaunchFailure;
}

}  // namespace

}  // namespace emulated

using namespace emulated;

extern "C" {

// --- for Python -----------------------------------------------------------------------------------------------------

void emulated_set_hooks(int (*load)(void*, const char*), int (*registers)(void*, const char*)) {
    load_module = load;
    count_registers = registers;
}

void emulated_add_kernel(void* module, const char* name, void* launch, int count, const size_t* offsets,
                         const size_t* sizes, size_t parameter_bytes, unsigned max_threads, size_t shared_bytes) {
    Lock lock(state);
    auto of = modules.get(module);
    auto kernel = std::make_shared<Kernel>();
    kernel->name = name;
    kernel->module = module;
    kernel->device = of->device;
    kernel->launch = reinterpret_cast<Launch>(launch);
    for (int i = 0; i < count; i++) kernel->parameters.push_back({offsets[i], sizes[i]});
    kernel->parameter_bytes = parameter_bytes;
    kernel->max_threads = max_threads;
    kernel->shared_bytes = shared_bytes;
    of->kernels[name] = kernels.add(kernel);
}

void emulated_add_variable(void* module, const char* name, void* address, size_t size) {
    Lock lock(state);
    auto of = modules.get(module);
    of->variables[name] = {reinterpret_cast<uint64_t>(address), size};
    add_variable(reinterpret_cast<uint64_t>(address), size, of->device);
}

// --- modules --------------------------------------------------------------------------------------------------------

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    return driver_call(__func__, [&](Lock& lock) {
        unsafe("cuModuleLoadData");
        auto made = std::make_shared<Module>();
        made->device = current_device;
        void* handle = modules.add(made);
        lock.unlock();
        int error = load_module(handle, static_cast<const char*>(image));
        lock.lock();
        if (error) {
            modules.remove(handle);
            throw Failure{static_cast<cudaError_t>(error)};
        }
        *module = static_cast<CUmodule>(handle);
    });
}

CUresult cuModuleUnload(CUmodule module) {
    return driver_call(__func__, [&](Lock&) {
        auto gone = modules.remove(module);
        for (auto& [name, kernel] : gone->kernels) kernels.remove(kernel);
    });
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    return driver_call(__func__, [&](Lock&) {
        auto of = modules.get(module);
        auto found = of->kernels.find(name);
        if (found == of->kernels.end()) fail(cudaErrorSymbolNotFound);
        *function = static_cast<CUfunction>(found->second);
    });
}

CUresult cuModuleGetGlobal_v2(CUdeviceptr* address, size_t* size, CUmodule module, const char* name) {
    return driver_call(__func__, [&](Lock&) {
        auto of = modules.get(module);
        auto found = of->variables.find(name);
        if (found == of->variables.end()) fail(cudaErrorSymbolNotFound);
        if (address) *address = found->second.address;
        if (size) *size = found->second.size;
    });
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
    return driver_call(__func__, [&](Lock& lock) {
        auto kernel = kernels.get(function);
        switch (attribute) {
            case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = static_cast<int>(kernel->max_threads); return;
            case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = static_cast<int>(kernel->shared_bytes); return;
            case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = registers_of(lock, *kernel); return;
            case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
                *value = static_cast<int>(
                    std::max(kernel->dynamic_limit, usual_shared - std::min(usual_shared, kernel->shared_bytes)));
                return;
            default:
                emulated_fault(("attribute " + std::to_string(attribute) + " of a kernel is not emulated").c_str());
                throw Failure{cudaErrorInvalidValue};
        }
    });
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    size_t most = shared_optin();
    return driver_call(__func__, [&](Lock&) {
        auto kernel = kernels.get(function);
        switch (attribute) {
            case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
                if (value < 0 || value + kernel->shared_bytes > most)
                    fail(cudaErrorInvalidValue,
                         kernel->name + " may have at most " + std::to_string(most) + " bytes of shared memory");
                kernel->dynamic_limit = value;
                return;
            case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT: return;  // a hint
            default:
                emulated_fault(("attribute " + std::to_string(attribute) + " of a kernel is not emulated").c_str());
                throw Failure{cudaErrorInvalidValue};
        }
    });
}

// --- launches -------------------------------------------------------------------------------------------------------

CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                        unsigned bz, unsigned dynamic_shared, CUstream handle, void** arguments, void** extra) {
    return driver_call(__func__, [&](Lock& lock) {
        auto kernel = kernels.get(function);
        auto stream = stream_of(handle);
        if (extra) {
            emulated_fault("cuLaunchKernel with `extra`, which is not emulated");
            throw Failure{cudaErrorNotSupported};
        }
        if (kernel->device != stream->device)
            fail(cudaErrorInvalidResourceHandle, kernel->name + " of one device is launched in a stream of another");
        struct {
            uint32_t grid[3], block[3];
        } size = {{gx, gy, gz}, {bx, by, bz}};
        check_launch(lock, *kernel, size.grid, size.block, dynamic_shared);
        std::vector<char> parameters(kernel->parameter_bytes + 16);
        for (size_t i = 0; i < kernel->parameters.size(); i++)
            std::memcpy(parameters.data() + kernel->parameters[i].offset, arguments[i], kernel->parameters[i].size);
        enqueue(
            lock, stream, Kind::kernel,
            [kernel, size, dynamic_shared, parameters] {
                const Hooks hooks = {emulated_range,
                                     settings.timing == Timing::late || settings.timing == Timing::work};
                const char* wrong = kernel->launch(size.grid, size.block, dynamic_shared, parameters.data(), &hooks);
                if (!wrong) return;
                emulated_fault(wrong);
                throw Failure{error_of(wrong)};
            },
            kernel->name.c_str());
    });
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* count, CUfunction function, int threads, size_t) {
    return driver_call(__func__, [&](Lock&) {
        kernels.get(function);
        if (threads < 1 || threads > 1024) fail(cudaErrorInvalidValue);
        *count = 2048 / ((threads + 31) / 32 * 32);
    });
}

}  // extern "C"
