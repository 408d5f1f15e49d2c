// Streams as queues of operations, and events as places in them.
//
// The timing says which operations run as soon as they may; the others run when something waits for them, and then as
// few as that needs. So a program that forgot to wait is told apart from one that did not, again and again the same
// way.
#include <algorithm>

#include "state.h"

namespace emulated {

Handles<Event> events;

namespace {

constexpr int patience = 8;  // queries that are answered "not ready" before the work is done: polling has an end

Handles<Stream> handles;
std::vector<std::shared_ptr<Stream>> streams;  // those that may have work
std::map<int, std::shared_ptr<Stream>> legacy_streams;
thread_local std::map<int, std::shared_ptr<Stream>> thread_streams;  // cudaStreamPerThread
std::condition_variable progressed;

std::shared_ptr<Stream> new_stream(unsigned flags, int priority) {
    auto made = std::make_shared<Stream>();
    made->device = current_device;
    made->flags = flags;
    made->blocking = !(flags & cudaStreamNonBlocking);
    made->priority = priority;
    streams.push_back(made);
    return made;
}

bool runs_early(Kind kind) {
    switch (settings.timing) {
        case Timing::early: return true;
        case Timing::late: return false;
        case Timing::copies: return kind == Kind::copy || kind == Kind::mark;
        case Timing::work: return kind != Kind::copy;
    }
    return false;
}

bool may_run(const Stream& stream) {
    if (stream.busy || stream.queue.empty()) return false;
    const Operation& front = stream.queue.front();
    return front.awaited ? front.awaited->done >= front.place : runs_early(front.kind);
}

void run_front(Lock& lock, const std::shared_ptr<Stream>& stream) {
    Operation operation = std::move(stream->queue.front());
    stream->queue.pop_front();
    Device& here = devices[stream->device];
    if (operation.work && !here.broken) {
        stream->busy = true;
        cudaError_t error = cudaSuccess;
        lock.unlock();
        try {
            run_for(stream->device, operation.work);
        } catch (const Failure& failure) {
            error = failure.code;
        }
        operation = {};  // what the work holds is let go without the lock
        lock.lock();
        stream->busy = false;
        if (error && !here.broken) here.broken = error;
    }
    stream->done++;
    progressed.notify_all();
}

// Everything that may run now, in all streams.
void settle(Lock& lock) {
    for (bool moved = true; moved;) {
        moved = false;
        for (size_t i = 0; i < streams.size(); i++) {
            auto stream = streams[i];
            for (; may_run(*stream); moved = true) run_front(lock, stream);
        }
    }
    auto over = [](const auto& stream) { return stream->destroyed && stream->queue.empty() && !stream->busy; };
    streams.erase(std::remove_if(streams.begin(), streams.end(), over), streams.end());
}

void push(const std::shared_ptr<Stream>& stream, Operation operation) {
    stream->queue.push_back(std::move(operation));
    stream->given++;
}

// The legacy default stream waits for all blocking streams of its device, and they for it.
void wait_for_legacy(const std::shared_ptr<Stream>& stream) {
    for (auto& other : streams) {
        if (other == stream || other->device != stream->device) continue;
        if (!(stream->legacy ? other->blocking : stream->blocking && other->legacy)) continue;
        if (stream->legacy && other->capture) {
            invalidate(*other->capture);
            fail(cudaErrorStreamCaptureImplicit,
                 "the legacy default stream is used while a blocking stream is captured");
        }
        if (other->done < other->given) push(stream, {Kind::mark, nullptr, other, other->given});
    }
}

void give(Lock& lock, const std::shared_ptr<Stream>& stream, Operation operation) {
    wait_for_legacy(stream);
    push(stream, std::move(operation));
    settle(lock);
}

void check_idle(bool ready, int& asked, Lock& lock, const std::shared_ptr<Stream>& stream, uint64_t place) {
    if (ready) {
        asked = 0;
        return;
    }
    if (++asked >= patience) complete(lock, stream, place);
    throw Failure{cudaErrorNotReady};
}

void refuse_captured(Stream& stream, const char* name) {
    if (!stream.capture) return;
    invalidate(*stream.capture);
    fail(cudaErrorStreamCaptureUnsupported, std::string(name) + " of a stream that is captured");
}

void refuse_captured(Event& event, const char* name) {
    if (!event.capture) return;
    if (!event.capture->over) invalidate(*event.capture);
    fail(cudaErrorCapturedEvent, std::string(name) + " of an event that was recorded in a capture");
}

}  // namespace

std::shared_ptr<Stream> stream_of(void* handle) {
    if (!handle || handle == cudaStreamLegacy) {
        auto& legacy = legacy_streams[current_device];
        if (!legacy) {
            legacy = new_stream(0, 0);
            legacy->legacy = true;
        }
        return legacy;
    }
    if (handle == cudaStreamPerThread) {
        auto& own = thread_streams[current_device];
        if (!own) own = new_stream(0, 0);
        return own;
    }
    return handles.get(handle);
}

std::vector<std::shared_ptr<Stream>> streams_of(int device) {
    std::vector<std::shared_ptr<Stream>> found;
    for (auto& stream : streams)
        if (stream->device == device) found.push_back(stream);
    return found;
}

void enqueue(Lock& lock, const std::shared_ptr<Stream>& stream, Kind kind, std::function<void()> work,
             const char* name) {
    if (stream->capture) {
        add_node(*stream, kind, std::move(work), name);
        return;
    }
    give(lock, stream, {kind, std::move(work), nullptr, 0});
}

void enqueue_wait(Lock& lock, const std::shared_ptr<Stream>& stream, std::shared_ptr<Stream> awaited, uint64_t place) {
    if (awaited == stream || awaited->done >= place) return;
    give(lock, stream, {Kind::mark, nullptr, std::move(awaited), place});
}

void complete(Lock& lock, const std::shared_ptr<Stream>& stream, uint64_t place) {
    while (stream->done < place) {
        if (stream->busy) {
            progressed.wait(lock);  // another thread runs it
        } else if (Operation& front = stream->queue.front(); front.awaited && front.awaited->done < front.place) {
            auto awaited = front.awaited;
            complete(lock, awaited, front.place);
        } else {
            run_front(lock, stream);
        }
    }
    settle(lock);
    if (devices[stream->device].broken) throw Failure{devices[stream->device].broken};
}

void complete_device(Lock& lock, int device) {
    for (auto& stream : streams_of(device)) complete(lock, stream, stream->given);
}

}  // namespace emulated

using namespace emulated;

extern "C" {

// --- for the libraries ----------------------------------------------------------------------------------------------

int emulated_enqueue_owned(void* stream, void (*work)(void*), void* context, void (*release)(void*), const char* name) {
    std::shared_ptr<void> owned(context, release);
    return call(__func__, [&](Lock& lock) {
        enqueue(lock, stream_of(stream), Kind::kernel, [work, owned] { work(owned.get()); }, name);
    });
}

int emulated_enqueue(void* stream, void (*work)(void*), void* context) {
    return emulated_enqueue_owned(stream, work, context, [](void*) {}, "");
}

// --- streams --------------------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
    return call(__func__,
                [&](Lock&) { *stream = static_cast<cudaStream_t>(handles.add(new_stream(flags, priority))); });
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }

// Returns at once; what the stream was given is still done.
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    return call(__func__, [&](Lock& lock) {
        auto gone = handles.remove(stream);
        if (gone->capture) invalidate(*gone->capture);
        gone->destroyed = true;
        settle(lock);
    });
}

cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
    return call(__func__, [&](Lock&) { *flags = stream_of(stream)->flags; });
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
    return call(__func__, [&](Lock&) { *priority = stream_of(stream)->priority; });
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    return call(__func__, [&](Lock& lock) {
        auto stream = stream_of(handle);
        refuse_captured(*stream, "cudaStreamSynchronize");
        unsafe("cudaStreamSynchronize");
        if (stream->legacy) wait_for_legacy(stream);
        complete(lock, stream, stream->given);
    });
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
    return call(__func__, [&](Lock& lock) {
        auto stream = stream_of(handle);
        refuse_captured(*stream, "cudaStreamQuery");
        unsafe("cudaStreamQuery");
        if (stream->legacy) wait_for_legacy(stream);
        check_idle(stream->done >= stream->given, stream->asked, lock, stream, stream->given);
    });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t given, unsigned flags) {
    return call(__func__, [&](Lock& lock) {
        auto stream = stream_of(handle);
        auto event = events.get(given);
        if (flags) {
            emulated_fault("cudaStreamWaitEvent with flags, which is not emulated");
            throw Failure{cudaErrorNotSupported};
        }
        if (wait_in_capture(stream, *event) || !event->stream) return;
        enqueue_wait(lock, stream, event->stream, event->place);
    });
}

cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
    return call(__func__, [&](Lock& lock) {
        enqueue(lock, stream_of(handle), Kind::host, [function, data] {
            in_host_function = true;
            function(data);
            in_host_function = false;
        });
    });
}

cudaError_t cudaStreamAddCallback(cudaStream_t handle, cudaStreamCallback_t callback, void* data, unsigned) {
    return call(__func__, [&](Lock& lock) {
        auto stream = stream_of(handle);
        refuse_captured(*stream, "cudaStreamAddCallback");
        enqueue(lock, stream, Kind::host, [handle, callback, data] {
            in_host_function = true;
            callback(handle, cudaSuccess, data);
            in_host_function = false;
        });
    });
}

// --- events ---------------------------------------------------------------------------------------------------------

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
    return call(__func__, [&](Lock&) {
        auto made = std::make_shared<Event>();
        made->flags = flags;
        made->device = current_device;
        *event = static_cast<cudaEvent_t>(events.add(made));
    });
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    return call(__func__, [&](Lock&) { events.remove(event); });
}

cudaError_t cudaEventRecord(cudaEvent_t given, cudaStream_t handle) {
    return call(__func__, [&](Lock& lock) {
        auto stream = stream_of(handle);
        auto event = events.get(given);
        if (event->device != stream->device)
            fail(cudaErrorInvalidResourceHandle, "an event of one device is recorded in a stream of another");
        if (stream->capture) {
            record_in_capture(*stream, *event);
            return;
        }
        auto time = std::make_shared<timespec>();
        wait_for_legacy(stream);
        push(stream, {Kind::mark, [time] { clock_gettime(CLOCK_MONOTONIC, time.get()); }, nullptr, 0});
        event->capture = nullptr;
        event->nodes.clear();
        event->stream = stream;
        event->place = stream->given;
        event->time = time;
        event->asked = 0;
        settle(lock);
    });
}

cudaError_t cudaEventSynchronize(cudaEvent_t given) {
    return call(__func__, [&](Lock& lock) {
        auto event = events.get(given);
        refuse_captured(*event, "cudaEventSynchronize");
        unsafe("cudaEventSynchronize");
        auto stream = event->stream;
        if (stream) complete(lock, stream, event->place);
    });
}

cudaError_t cudaEventQuery(cudaEvent_t given) {
    return call(__func__, [&](Lock& lock) {
        auto event = events.get(given);
        refuse_captured(*event, "cudaEventQuery");
        unsafe("cudaEventQuery");
        auto stream = event->stream;
        if (stream) check_idle(stream->done >= event->place, event->asked, lock, stream, event->place);
    });
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
    return call(__func__, [&](Lock&) {
        auto start = events.get(from), stop = events.get(to);
        for (auto& event : {start, stop}) {
            refuse_captured(*event, "cudaEventElapsedTime");
            if ((event->flags & cudaEventDisableTiming) || !event->stream)
                throw Failure{cudaErrorInvalidResourceHandle};
            if (event->stream->done < event->place) throw Failure{cudaErrorNotReady};
        }
        *milliseconds =
            (stop->time->tv_sec - start->time->tv_sec) * 1e3f + (stop->time->tv_nsec - start->time->tv_nsec) * 1e-6f;
    });
}

}  // extern "C"
