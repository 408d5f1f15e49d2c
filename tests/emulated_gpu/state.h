// The state of the emulated device, for its own sources: who owns what, and how a call of the API is made.
//
// One mutex guards all of it. No work (kernels, copies, host functions) runs under that mutex, so that two host threads
// compute at the same time, and a host function may wait for Python's lock. Work runs in the host thread that has to
// wait for it or, where the timing says so, that gives it to a stream.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <condition_variable>
#include <cstdint>
#include <ctime>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "device.h"

namespace emulated {

using Lock = std::unique_lock<std::mutex>;
extern std::mutex state;

// --- settings and devices -------------------------------------------------------------------------------------------

enum class Timing { early, late, copies, work };  // what runs as soon as it may; the rest runs when something waits

struct Device {
    size_t memory = 0, used = 0;
    cudaError_t broken = cudaSuccess;  // a fault of a kernel ends its context: whatever is called after it fails
};

struct Settings {
    Timing timing = Timing::early;
    bool late_pageable = false;  // copies from ordinary memory read it when they run, as where a GPU reads it itself
    int capability = 90;
    int process = 0;  // a forked child cannot use the device
};

extern Settings settings;
extern std::vector<Device> devices;
extern thread_local int current_device;

Device& device(int number);  // raises cudaErrorInvalidDevice

// --- errors ---------------------------------------------------------------------------------------------------------

struct Failure {
    cudaError_t code;
};

// Ends a call with an error. The sentence goes to stderr, for a reader who wonders which rule was broken.
[[noreturn]] void fail(cudaError_t code, const std::string& sentence = "");

extern thread_local cudaError_t last_error;
extern thread_local bool in_host_function;

// What every call has in common: `body(lock)` with the state locked, its Failure as the result.
template <class Body>
cudaError_t call(const char* name, Body&& body);

// --- handles --------------------------------------------------------------------------------------------------------

// Handles are numbers that are never given out twice, so that one of an object that is gone is noticed.
template <class T>
class Handles {
  public:
    void* add(std::shared_ptr<T> object) {
        void* handle = reinterpret_cast<void*>(next_ += 16);
        objects_[handle] = std::move(object);
        return handle;
    }
    std::shared_ptr<T> get(const void* handle) const {
        auto found = objects_.find(const_cast<void*>(handle));
        if (found == objects_.end())
            fail(cudaErrorInvalidResourceHandle, "a handle was used that is not, or no longer, valid");
        return found->second;
    }
    std::shared_ptr<T> remove(const void* handle) {
        auto object = get(handle);
        objects_.erase(const_cast<void*>(handle));
        return object;
    }

  private:
    static inline uintptr_t next_ = 0x50000000;  // one sequence for every T: a stream is never taken for an event
    std::map<void*, std::shared_ptr<T>> objects_;
};

// --- memory ---------------------------------------------------------------------------------------------------------

enum class Place { device, managed, pinned, registered, variable };

struct Allocation {
    uint64_t first = 0, last = 0;  // [first, last)
    Place place = Place::device;
    int device = 0;
    struct Pool* pool = nullptr;
    unsigned flags = 0;
};

bool find_allocation(uint64_t address, Allocation* found);
// Runs work on behalf of a device, whose memory alone its kernels may use.
void run_for(int device, const std::function<void()>& work);
void add_variable(uint64_t address, size_t size, int device);
// Raises cudaErrorIllegalAddress, and notes a fault, unless kernels of the device may use all of the bytes.
void check_device_range(const void* pointer, size_t size, int device, const char* what);

// --- streams and events ---------------------------------------------------------------------------------------------

struct Graph;
struct Capture;
struct Node;

enum class Kind { kernel, copy, fill, host, graph, mark };  // copy: between host and device

struct Stream;

struct Operation {
    Kind kind = Kind::mark;
    std::function<void()> work;       // of all but waits
    std::shared_ptr<Stream> awaited;  // of a wait, with how much of that stream must be done
    uint64_t place = 0;
};

struct Stream {
    int device = 0;
    bool legacy = false, blocking = true, destroyed = false, busy = false;
    unsigned flags = 0;
    int priority = 0, asked = 0;
    std::deque<Operation> queue;
    uint64_t given = 0, done = 0;  // operations
    std::shared_ptr<Capture> capture;
    std::vector<Node*> last;  // what the next node of the capture comes after
};

struct Event {
    unsigned flags = 0;
    int device = 0, asked = 0;
    std::shared_ptr<Stream> stream;  // where it was recorded, and how much of that must be done
    uint64_t place = 0;
    std::shared_ptr<timespec> time;
    std::shared_ptr<Capture> capture;  // the last record was in a capture, after these nodes
    std::vector<Node*> nodes;
};

extern Handles<Event> events;

std::shared_ptr<Stream> stream_of(void* handle);
std::vector<std::shared_ptr<Stream>> streams_of(int device);
void enqueue(Lock& lock, const std::shared_ptr<Stream>& stream, Kind kind, std::function<void()> work,
             const char* name = "");
void enqueue_wait(Lock& lock, const std::shared_ptr<Stream>& stream, std::shared_ptr<Stream> awaited, uint64_t place);
void complete(Lock& lock, const std::shared_ptr<Stream>& stream, uint64_t place);
void complete_device(Lock& lock, int device);

// --- captures and graphs --------------------------------------------------------------------------------------------

struct Node {
    Kind kind = Kind::kernel;
    std::string name;  // of the kernel or the library's function
    std::function<void()> work;
    std::vector<Node*> after;
};

struct Graph {
    std::vector<std::unique_ptr<Node>> nodes;
};

struct Capture {
    std::shared_ptr<Graph> graph;
    void* handle = nullptr;  // of the graph
    std::weak_ptr<Stream> origin;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
    std::thread::id thread;
    uint64_t id = 0;
    bool valid = true, over = false;
    std::vector<std::weak_ptr<Stream>> streams;
};

// A call that synchronises or allocates, which a capture may forbid to its own thread and to others.
void unsafe(const char* name);
void invalidate(Capture& capture);
void add_node(Stream& stream, Kind kind, std::function<void()> work, const char* name = "");
void record_in_capture(Stream& stream, Event& event);
// True if the wait concerned a capture and is dealt with.
bool wait_in_capture(const std::shared_ptr<Stream>& stream, Event& event);

// --- calls ----------------------------------------------------------------------------------------------------------

void enter(const char* name);

template <class Body>
cudaError_t call(const char* name, Body&& body) {
    try {
        enter(name);
        Lock lock(state);
        if (!devices.empty() && devices[current_device].broken) throw Failure{devices[current_device].broken};
        body(lock);
        return cudaSuccess;
    } catch (const Failure& failure) {
        return last_error = failure.code;
    }
}

template <class Body>
CUresult driver_call(const char* name, Body&& body) {
    return static_cast<CUresult>(call(name, body));  // the two APIs have the same numbers
}

}  // namespace emulated
