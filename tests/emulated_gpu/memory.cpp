// Memory: allocations with poison and guard pages, pools, and copies.
//
// An address is never given out twice, and what is freed cannot be read any more: whoever uses memory after its end is
// noticed, however late.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "state.h"

namespace emulated {

namespace {

constexpr size_t page = 4096;
constexpr size_t poison_size = size_t{4} << 20;

std::mutex table_lock;  // of its own, since kernels look allocations up while they run
std::map<uint64_t, Allocation> table;  // by the first address

// Addresses that nothing else uses; whatever does is stepped over.
constexpr uintptr_t first_address = uintptr_t{1} << 45, last_address = uintptr_t{3} << 45, step = uintptr_t{1} << 36;
uintptr_t next_address = first_address;

thread_local int running_device = -1;  // of the work that this thread runs

// Fresh memory shows 0xFF, which is NaN in every floating-point type: pages of this file until they are written to.
int poison_file() {
    static int file = [] {
        int made = memfd_create("poison", 0);
        std::vector<char> bytes(poison_size, '\xFF');
        if (made < 0 || write(made, bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size())) {
            std::perror("emulated GPU: no file for fresh memory");
            std::abort();
        }
        return made;
    }();
    return file;
}

size_t whole_pages(size_t size) { return (size + page - 1) / page * page; }

bool was_given_out(const void* pointer) {
    return pointer >= reinterpret_cast<void*>(first_address) && pointer < reinterpret_cast<void*>(next_address);
}

// A page before and one after it are guards.
char* map_poisoned(size_t size) {
    size_t length = whole_pages(size), whole = length + 2 * page;
    for (;; next_address += step) {
        if (next_address + whole > last_address)
            fail(cudaErrorMemoryAllocation, "all addresses for the device's memory were given out once");
        void* wanted = reinterpret_cast<void*>(next_address);
        void* got =
            mmap(wanted, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
        if (got == wanted) break;
        if (got != MAP_FAILED) munmap(got, whole);  // a kernel that does not know the flag
    }
    char* first = reinterpret_cast<char*>(next_address) + page;
    for (size_t at = 0; at < length; at += poison_size) {
        size_t part = std::min(poison_size, length - at);
        void* got =
            mmap(first + at, part, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, poison_file(), 0);
        if (got == MAP_FAILED) fail(cudaErrorMemoryAllocation, "the host has no memory for the device's");
    }
    next_address += whole;
    return first;
}

void unmap(const Allocation& gone) {
    mmap(reinterpret_cast<void*>(gone.first), whole_pages(gone.last - gone.first), PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

bool counts(Place place) { return place == Place::device || place == Place::managed; }

void* allocate(size_t size, Place place, unsigned flags = 0, Pool* pool = nullptr) {
    if (!size) return nullptr;
    Device& here = devices[current_device];
    if (counts(place) && size > here.memory - here.used) throw Failure{cudaErrorMemoryAllocation};
    Allocation made;
    made.first = reinterpret_cast<uint64_t>(map_poisoned(size));
    made.last = made.first + size;
    made.place = place;
    made.device = current_device;
    made.flags = flags;
    made.pool = pool;
    if (counts(place)) here.used += size;
    std::lock_guard<std::mutex> guard(table_lock);
    table[made.first] = made;
    return reinterpret_cast<void*>(made.first);
}

Allocation take(const void* pointer) {
    std::lock_guard<std::mutex> guard(table_lock);
    auto found = table.find(reinterpret_cast<uint64_t>(pointer));
    if (found == table.end()) fail(cudaErrorInvalidValue, "memory was freed that is not, or no longer, allocated");
    Allocation gone = found->second;
    table.erase(found);
    return gone;
}

void release(const void* pointer) {
    Allocation gone = take(pointer);
    if (counts(gone.place)) devices[gone.device].used -= gone.last - gone.first;
    unmap(gone);
}

bool usable(const Allocation& found, int device) {
    return found.device == device || (found.place != Place::device && found.place != Place::variable);
}

}  // namespace

bool find_allocation(uint64_t address, Allocation* found) {
    std::lock_guard<std::mutex> guard(table_lock);
    auto next = table.upper_bound(address);
    if (next == table.begin()) return false;
    *found = std::prev(next)->second;
    return address < found->last;
}

void add_variable(uint64_t address, size_t size, int device) {
    std::lock_guard<std::mutex> guard(table_lock);
    Allocation made;
    made.first = address;
    made.last = address + size;
    made.place = Place::variable;
    made.device = device;
    table[address] = made;
}

void check_device_range(const void* pointer, size_t size, int device, const char* what) {
    Allocation found;
    uint64_t address = reinterpret_cast<uint64_t>(pointer);
    if (size == 0 || (find_allocation(address, &found) && usable(found, device) && address + size <= found.last))
        return;
    char sentence[200];
    std::snprintf(sentence, sizeof sentence, "%s of %zu bytes at %p, where device %d has no such memory", what, size,
                  pointer, device);
    emulated_fault(sentence);
    throw Failure{cudaErrorIllegalAddress};
}

}  // namespace emulated

using namespace emulated;

extern "C" {

int emulated_range(uint64_t address, uint64_t* first, uint64_t* last) {
    Allocation found;
    int device = running_device >= 0 ? running_device : current_device;
    if (!find_allocation(address, &found) || !usable(found, device)) return 0;
    *first = found.first;
    *last = found.last;
    return 1;
}

// Overwrites memory that a pool keeps, in the order of a stream, with what fresh memory has. CUDA knows nothing of it:
// where a call of CUDA's would be refused, or end a capture, nothing is done.
void emulated_poison(void* pointer, size_t size, void* handle) {
    if (in_host_function || getpid() != settings.process) return;
    call(__func__, [&](Lock& lock) {
        auto stream = stream_of(handle);
        if (stream->capture) return;
        for (auto& other : streams_of(stream->device))
            if (stream->legacy && other->blocking && other->capture) return;
        enqueue(lock, stream, Kind::fill, [=] {
            Allocation found;
            uint64_t address = reinterpret_cast<uint64_t>(pointer);
            if (find_allocation(address, &found) && address + size <= found.last) std::memset(pointer, 0xFF, size);
        });
    });
}

// --- allocations ----------------------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** pointer, size_t size) {
    return call(__func__, [&](Lock&) {
        unsafe("cudaMalloc");
        *pointer = allocate(size, Place::device);
    });
}

cudaError_t cudaMallocManaged(void** pointer, size_t size, unsigned) {
    return call(__func__, [&](Lock&) {
        unsafe("cudaMallocManaged");
        if (!size) fail(cudaErrorInvalidValue);
        *pointer = allocate(size, Place::managed);
    });
}

cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned flags) {
    return call(__func__, [&](Lock&) {
        unsafe("cudaHostAlloc");
        *pointer = allocate(size, Place::pinned, flags);
    });
}

cudaError_t cudaMallocHost(void** pointer, size_t size) { return cudaHostAlloc(pointer, size, 0); }

// Waits for the work of the device that has the memory, as CUDA does.
static cudaError_t free_when_idle(const char* name, void* pointer) {
    return call(name, [&](Lock& lock) {
        if (!pointer) return;
        unsafe(name);
        Allocation found;
        if (find_allocation(reinterpret_cast<uint64_t>(pointer), &found)) complete_device(lock, found.device);
        release(pointer);
    });
}

cudaError_t cudaFree(void* pointer) { return free_when_idle(__func__, pointer); }
cudaError_t cudaFreeHost(void* pointer) { return free_when_idle(__func__, pointer); }

cudaError_t cudaHostRegister(void* pointer, size_t size, unsigned flags) {
    return call(__func__, [&](Lock&) {
        unsafe("cudaHostRegister");
        Allocation made;
        made.first = reinterpret_cast<uint64_t>(pointer);
        made.last = made.first + size;
        made.place = Place::registered;
        made.device = current_device;
        made.flags = flags;
        std::lock_guard<std::mutex> guard(table_lock);
        auto next = table.lower_bound(made.last);
        if (next != table.begin() && std::prev(next)->second.last > made.first)
            fail(cudaErrorHostMemoryAlreadyRegistered);
        table[made.first] = made;
    });
}

cudaError_t cudaHostUnregister(void* pointer) {
    return call(__func__, [&](Lock& lock) {
        unsafe("cudaHostUnregister");
        complete_device(lock, current_device);
        Allocation found;
        if (!find_allocation(reinterpret_cast<uint64_t>(pointer), &found) || found.place != Place::registered)
            fail(cudaErrorHostMemoryNotRegistered);
        take(pointer);
    });
}

cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
    return call(__func__, [&](Lock&) {
        *total = devices[current_device].memory;
        *available = *total - devices[current_device].used;
    });
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
    return call(__func__, [&](Lock&) {
        *attributes = {};
        attributes->device = -2;  // of memory that CUDA does not know
        Allocation found;
        if (!find_allocation(reinterpret_cast<uint64_t>(pointer), &found)) return;
        bool host = found.place == Place::pinned || found.place == Place::registered;
        attributes->type = host                            ? cudaMemoryTypeHost
                           : found.place == Place::managed ? cudaMemoryTypeManaged
                                                           : cudaMemoryTypeDevice;
        attributes->device = found.device;
        attributes->devicePointer = const_cast<void*>(pointer);
        if (host || found.place == Place::managed) attributes->hostPointer = const_cast<void*>(pointer);
    });
}

}  // extern "C"

// --- pools: memory in the order of a stream --------------------------------------------------------------------------

namespace emulated {

// What a pool gives back goes to the device at once: what it keeps in reserve is what is in use.
struct Pool {
    int device = 0;
    uint64_t used = 0, most_used = 0, threshold = 0;
    int reuse[3] = {1, 1, 1};
};

namespace {

Handles<Pool> pools;
std::map<int, void*> default_pools, chosen_pools;

void* default_pool(int number) {
    device(number);
    auto found = default_pools.find(number);
    if (found != default_pools.end()) return found->second;
    auto made = std::make_shared<Pool>();
    made->device = number;
    return default_pools[number] = pools.add(made);
}

void* chosen_pool(int number) {
    auto found = chosen_pools.find(number);
    return found == chosen_pools.end() ? default_pool(number) : found->second;
}

void refuse_capture(const Stream& stream, const char* name) {
    if (!stream.capture) return;
    invalidate(*stream.capture);
    emulated_fault((std::string(name) + " in a captured stream, which is not emulated").c_str());
    throw Failure{cudaErrorNotSupported};
}

cudaError_t allocate_in_order(const char* name, void** pointer, size_t size, cudaMemPool_t pool, cudaStream_t handle) {
    return call(name, [&](Lock&) {
        auto stream = stream_of(handle);
        refuse_capture(*stream, name);
        auto from = pools.get(pool ? static_cast<void*>(pool) : chosen_pool(stream->device));
        int caller = current_device;
        current_device = from->device;
        try {
            *pointer = allocate(size, Place::device, 0, from.get());
        } catch (const Failure&) {
            current_device = caller;
            throw;
        }
        current_device = caller;
        from->used += size;
        from->most_used = std::max(from->most_used, from->used);
    });
}

}  // namespace

}  // namespace emulated

extern "C" {

cudaError_t cudaMallocAsync(void** pointer, size_t size, cudaStream_t stream) {
    return allocate_in_order(__func__, pointer, size, nullptr, stream);
}

cudaError_t cudaMallocFromPoolAsync(void** pointer, size_t size, cudaMemPool_t pool, cudaStream_t stream) {
    return allocate_in_order(__func__, pointer, size, pool, stream);
}

cudaError_t cudaFreeAsync(void* pointer, cudaStream_t handle) {
    return call(__func__, [&](Lock& lock) {
        auto stream = stream_of(handle);
        refuse_capture(*stream, "cudaFreeAsync");
        Allocation found;
        uint64_t address = reinterpret_cast<uint64_t>(pointer);
        if (!find_allocation(address, &found) || found.first != address)
            fail(cudaErrorInvalidValue, "cudaFreeAsync of what is not allocated");
        enqueue(lock, stream, Kind::mark, [pointer] {
            Lock inner(state);
            Allocation freed;
            find_allocation(reinterpret_cast<uint64_t>(pointer), &freed);
            if (freed.pool) freed.pool->used -= freed.last - freed.first;
            release(pointer);
        });
    });
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int number) {
    return call(__func__, [&](Lock&) { *pool = static_cast<cudaMemPool_t>(default_pool(number)); });
}

cudaError_t cudaDeviceGetMemPool(cudaMemPool_t* pool, int number) {
    return call(__func__, [&](Lock&) {
        device(number);
        *pool = static_cast<cudaMemPool_t>(chosen_pool(number));
    });
}

cudaError_t cudaDeviceSetMemPool(int number, cudaMemPool_t pool) {
    return call(__func__, [&](Lock&) {
        if (pools.get(pool)->device != number) fail(cudaErrorInvalidValue);
        chosen_pools[number] = pool;
    });
}

cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps* properties) {
    return call(__func__, [&](Lock&) {
        device(properties->location.id);
        auto made = std::make_shared<Pool>();
        made->device = properties->location.id;
        *pool = static_cast<cudaMemPool_t>(pools.add(made));
    });
}

cudaError_t cudaMemPoolDestroy(cudaMemPool_t pool) {
    return call(__func__, [&](Lock&) {
        auto gone = pools.get(pool);
        if (gone->used) fail(cudaErrorInvalidValue, "a memory pool was destroyed while memory of it is in use");
        for (auto& [number, chosen] : chosen_pools)
            if (chosen == pool) chosen = default_pool(number);
        pools.remove(pool);
    });
}

cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t) {
    return call(__func__, [&](Lock&) { pools.get(pool); });
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, cudaMemPoolAttr attribute, void* value) {
    return call(__func__, [&](Lock&) {
        auto of = pools.get(pool);
        switch (attribute) {
            case cudaMemPoolReuseFollowEventDependencies:
            case cudaMemPoolReuseAllowOpportunistic:
            case cudaMemPoolReuseAllowInternalDependencies:
                of->reuse[attribute - 1] = *static_cast<int*>(value);
                return;
            case cudaMemPoolAttrReleaseThreshold: of->threshold = *static_cast<uint64_t*>(value); return;
            case cudaMemPoolAttrReservedMemHigh:
            case cudaMemPoolAttrUsedMemHigh:
                if (*static_cast<uint64_t*>(value)) fail(cudaErrorInvalidValue);
                of->most_used = of->used;
                return;
            default: fail(cudaErrorInvalidValue, "this attribute of a memory pool cannot be set");
        }
    });
}

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, cudaMemPoolAttr attribute, void* value) {
    return call(__func__, [&](Lock&) {
        auto of = pools.get(pool);
        switch (attribute) {
            case cudaMemPoolReuseFollowEventDependencies:
            case cudaMemPoolReuseAllowOpportunistic:
            case cudaMemPoolReuseAllowInternalDependencies:
                *static_cast<int*>(value) = of->reuse[attribute - 1];
                return;
            case cudaMemPoolAttrReleaseThreshold: *static_cast<uint64_t*>(value) = of->threshold; return;
            case cudaMemPoolAttrReservedMemCurrent:
            case cudaMemPoolAttrUsedMemCurrent: *static_cast<uint64_t*>(value) = of->used; return;
            case cudaMemPoolAttrReservedMemHigh:
            case cudaMemPoolAttrUsedMemHigh: *static_cast<uint64_t*>(value) = of->most_used; return;
            default: fail(cudaErrorInvalidValue, "this attribute of a memory pool is not emulated");
        }
    });
}

}  // extern "C"

// --- copies ---------------------------------------------------------------------------------------------------------

namespace emulated {

namespace {

// Where one end of a copy lies.
struct End {
    bool device = false, pinned = false;  // managed memory is both
    int number = 0;                       // of the device
};

End end_of(const void* pointer) {
    Allocation found;
    if (!find_allocation(reinterpret_cast<uint64_t>(pointer), &found)) {
        if (was_given_out(pointer)) fail(cudaErrorInvalidValue, "a copy or cudaMemset uses memory that was freed");
        return {};
    }
    bool managed = found.place == Place::managed;
    bool host = found.place == Place::pinned || found.place == Place::registered;
    return {!host, host || managed, found.device};
}

struct Copy {
    char* to;
    const char* from;
    size_t size;
    End source, target;
};

void check_kind(const Copy& copy, cudaMemcpyKind kind) {
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    if (kind == cudaMemcpyDefault) return;
    if (from_device && !copy.source.device)
        fail(cudaErrorInvalidValue, "a copy from the device reads what is not device memory");
    if (to_device && !copy.target.device)
        fail(cudaErrorInvalidValue, "a copy to the device writes what is not device memory");
    if (kind == cudaMemcpyHostToDevice && copy.source.device && !copy.source.pinned)
        fail(cudaErrorInvalidValue, "a copy from the host reads device memory");
    if (kind == cudaMemcpyDeviceToHost && copy.target.device && !copy.target.pinned)
        fail(cudaErrorInvalidValue, "a copy to the host writes device memory");
}

// Both ends once more, when the copy runs: memory may have been freed since it was given to the stream.
void perform(const Copy& copy) {
    if (copy.source.device || copy.source.pinned)
        check_device_range(copy.from, copy.size, copy.source.number, "a copy reads");
    if (copy.target.device || copy.target.pinned)
        check_device_range(copy.to, copy.size, copy.target.number, "a copy writes");
    std::memmove(copy.to, copy.from, copy.size);
}

// `waits`: as cudaMemcpy, which returns when its source may be changed and, but for copies to the device, it is done.
void copy_in(Lock& lock, const std::shared_ptr<Stream>& stream, void* to, const void* from, size_t size,
             cudaMemcpyKind kind, bool waits) {
    if (!size) return;
    Copy copy{static_cast<char*>(to), static_cast<const char*>(from), size, end_of(from), end_of(to)};
    check_kind(copy, kind);
    bool pageable_source = !copy.source.device && !copy.source.pinned;
    bool pageable_target = !copy.target.device && !copy.target.pinned;
    if (stream->capture && (pageable_source || pageable_target)) {
        invalidate(*stream->capture);
        fail(cudaErrorStreamCaptureUnsupported, "a copy from or to pageable memory in a captured stream");
    }
    Kind what = copy.source.device && copy.target.device ? Kind::kernel : Kind::copy;
    if (pageable_source && (waits || !settings.late_pageable)) {
        // The driver copies the source before it returns, and the device reads the copy.
        if (waits) complete(lock, stream, stream->given);
        auto staged = std::make_shared<std::vector<char>>(copy.from, copy.from + size);
        enqueue(lock, stream, what, [copy, staged]() mutable {
            copy.from = staged->data();
            perform(copy);
        });
    } else {
        enqueue(lock, stream, what, [copy] { perform(copy); });
        if (copy.source.device && copy.target.device) return;
    }
    if (pageable_target || (waits && !pageable_source)) complete(lock, stream, stream->given);
}

void fill(Lock& lock, const std::shared_ptr<Stream>& stream, void* pointer, int value, size_t size) {
    if (!size) return;
    End target = end_of(pointer);
    if (!target.device) fail(cudaErrorInvalidValue, "cudaMemset of what is not device memory");
    enqueue(lock, stream, Kind::fill, [=] {
        check_device_range(pointer, size, target.number, "cudaMemset");
        std::memset(pointer, value, size);
    });
}

}  // namespace

void run_for(int device, const std::function<void()>& work) {
    int before = running_device;
    running_device = device;
    try {
        work();
    } catch (...) {
        running_device = before;
        throw;
    }
    running_device = before;
}

}  // namespace emulated

extern "C" {

cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
    return call(__func__, [&](Lock& lock) {
        unsafe("cudaMemcpy");
        copy_in(lock, stream_of(nullptr), to, from, size, kind, true);
    });
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind, cudaStream_t stream) {
    return call(__func__, [&](Lock& lock) { copy_in(lock, stream_of(stream), to, from, size, kind, false); });
}

cudaError_t cudaMemcpyPeer(void* to, int, const void* from, int, size_t size) {
    return call(__func__, [&](Lock& lock) {
        unsafe("cudaMemcpyPeer");
        copy_in(lock, stream_of(nullptr), to, from, size, cudaMemcpyDeviceToDevice, true);
    });
}

cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t stream) {
    return call(__func__,
                [&](Lock& lock) { copy_in(lock, stream_of(stream), to, from, size, cudaMemcpyDeviceToDevice, false); });
}

cudaError_t cudaMemset(void* pointer, int value, size_t size) {
    return call(__func__, [&](Lock& lock) {
        unsafe("cudaMemset");
        fill(lock, stream_of(nullptr), pointer, value, size);
    });
}

cudaError_t cudaMemsetAsync(void* pointer, int value, size_t size, cudaStream_t stream) {
    return call(__func__, [&](Lock& lock) { fill(lock, stream_of(stream), pointer, value, size); });
}

}  // extern "C"
