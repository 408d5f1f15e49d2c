// Captures and graphs: operations given to a captured stream become nodes, which run when the graph is launched.
//
// The rules are those of the CUDA Programming Guide, "Creating a Graph Using Stream Capture", and of the reference of
// each function. A rule that is broken ends the capture: what comes later fails, the end of the capture included.
#include <algorithm>
#include <set>

#include "state.h"

namespace emulated {

namespace {

struct Executable {
    std::shared_ptr<Graph> graph;
    std::shared_ptr<Stream> stream;  // of the last launch: one graph does not run beside itself
    uint64_t place = 0;
};

Handles<Graph> graphs;
Handles<Executable> executables;
std::vector<std::shared_ptr<Capture>> captures;  // under way
uint64_t capture_count = 0;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

void check_valid(const Capture& capture) {
    if (!capture.valid) throw Failure{cudaErrorStreamCaptureInvalidated};
}

void enter_capture(const std::shared_ptr<Stream>& stream, const std::shared_ptr<Capture>& capture) {
    stream->capture = capture;
    stream->last.clear();
    capture->streams.push_back(stream);
}

// The nodes that come before these, and these.
std::set<const Node*> all_before(const std::vector<Node*>& nodes) {
    std::set<const Node*> found;
    std::vector<const Node*> left(nodes.begin(), nodes.end());
    while (!left.empty()) {
        const Node* node = left.back();
        left.pop_back();
        if (found.insert(node).second) left.insert(left.end(), node->after.begin(), node->after.end());
    }
    return found;
}

bool all_joined(const Capture& capture, const Stream& origin) {
    std::set<const Node*> joined = all_before(origin.last);
    for (auto& weak : capture.streams) {
        auto stream = weak.lock();
        if (!stream || stream->capture.get() != &capture) continue;
        for (Node* node : stream->last)
            if (!joined.count(node)) return false;
    }
    return true;
}

void end(Capture& capture) {
    capture.over = true;
    for (auto& weak : capture.streams) {
        auto stream = weak.lock();
        if (!stream || stream->capture.get() != &capture) continue;
        stream->last.clear();
        stream->capture = nullptr;
    }
    captures.erase(std::remove_if(captures.begin(), captures.end(), [](auto& each) { return each->over; }),
                   captures.end());
}

// One after another, each after those it depends on. Where several could be next, the one captured first goes first
// and, with a late device, the one captured last: a join that was forgotten shows in one of the two.
void run_nodes(const Graph& graph) {
    std::set<const Node*> done;
    std::vector<Node*> left;
    for (auto& node : graph.nodes) left.push_back(node.get());
    if (settings.timing == Timing::late || settings.timing == Timing::work) std::reverse(left.begin(), left.end());
    while (!left.empty()) {
        auto ready = [&](Node* node) {
            return std::all_of(node->after.begin(), node->after.end(),
                               [&](Node* before) { return done.count(before); });
        };
        auto next = std::find_if(left.begin(), left.end(), ready);
        if ((*next)->work) (*next)->work();
        done.insert(*next);
        left.erase(next);
    }
}

cudaGraphNodeType type_of(Kind kind) {
    switch (kind) {
        case Kind::kernel: return cudaGraphNodeTypeKernel;
        case Kind::copy: return cudaGraphNodeTypeMemcpy;
        case Kind::fill: return cudaGraphNodeTypeMemset;
        case Kind::host: return cudaGraphNodeTypeHost;
        case Kind::graph: return cudaGraphNodeTypeGraph;
        case Kind::mark: return cudaGraphNodeTypeEmpty;
    }
    return cudaGraphNodeTypeEmpty;
}

}  // namespace

void invalidate(Capture& capture) { capture.valid = false; }

void unsafe(const char* name) {
    if (thread_mode == cudaStreamCaptureModeRelaxed) return;
    bool forbidden = false;
    for (auto& capture : captures) {
        bool own = capture->thread == std::this_thread::get_id() && capture->mode != cudaStreamCaptureModeRelaxed;
        bool other = capture->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
        if (!own && !other) continue;
        invalidate(*capture);
        forbidden = true;
    }
    if (forbidden) fail(cudaErrorStreamCaptureUnsupported, std::string(name) + " while a stream is captured");
}

void add_node(Stream& stream, Kind kind, std::function<void()> work, const char* name) {
    check_valid(*stream.capture);
    auto node = std::make_unique<Node>();
    node->kind = kind;
    node->name = name;
    node->work = std::move(work);
    node->after = stream.last;
    stream.last = {node.get()};
    stream.capture->graph->nodes.push_back(std::move(node));
}

void record_in_capture(Stream& stream, Event& event) {
    check_valid(*stream.capture);
    event.capture = stream.capture;
    event.nodes = stream.last;
    event.stream = nullptr;
}

bool wait_in_capture(const std::shared_ptr<Stream>& stream, Event& event) {
    if (event.capture && event.capture->over)
        fail(cudaErrorCapturedEvent, "a wait for an event that was recorded in a capture that is over");
    if (!event.capture) {
        if (!stream->capture) return false;
        check_valid(*stream->capture);
        if (!event.stream) return true;  // never recorded: nothing to wait for
        invalidate(*stream->capture);
        fail(cudaErrorStreamCaptureIsolation, "a captured stream waits for an event from outside of the capture");
    }
    check_valid(*event.capture);
    if (stream->legacy) {
        invalidate(*event.capture);
        fail(cudaErrorStreamCaptureImplicit,
             "the legacy default stream waits for an event that was recorded in a capture");
    }
    if (!stream->capture) {
        enter_capture(stream, event.capture);
    } else if (stream->capture != event.capture) {
        invalidate(*stream->capture);
        invalidate(*event.capture);
        fail(cudaErrorStreamCaptureMerge, "a captured stream waits for an event of another capture");
    }
    for (Node* node : event.nodes)
        if (std::find(stream->last.begin(), stream->last.end(), node) == stream->last.end())
            stream->last.push_back(node);
    return true;
}

}  // namespace emulated

using namespace emulated;

extern "C" {

// --- captures -------------------------------------------------------------------------------------------------------

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    return call(__func__, [&](Lock&) { std::swap(*mode, thread_mode); });
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
    return call(__func__, [&](Lock&) {
        auto stream = stream_of(handle);
        if (stream->legacy) fail(cudaErrorStreamCaptureUnsupported, "the legacy default stream cannot be captured");
        if (stream->capture) fail(cudaErrorIllegalState, "a stream that is captured is to be captured");
        auto capture = std::make_shared<Capture>();
        capture->graph = std::make_shared<Graph>();
        capture->handle = graphs.add(capture->graph);
        capture->origin = stream;
        capture->mode = mode;
        capture->thread = std::this_thread::get_id();
        capture->id = ++capture_count;
        captures.push_back(capture);
        enter_capture(stream, capture);
    });
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
    *graph = nullptr;
    return call(__func__, [&](Lock&) {
        auto stream = stream_of(handle);
        auto capture = stream->capture;
        if (!capture) fail(cudaErrorIllegalState, "the end of a capture in a stream that is not captured");
        if (capture->origin.lock() != stream) {
            invalidate(*capture);
            fail(cudaErrorStreamCaptureUnmatched, "the end of a capture in a stream that only joined it");
        }
        if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id())
            fail(cudaErrorStreamCaptureWrongThread, "the end of a capture in another thread than began it");
        bool joined = all_joined(*capture, *stream);
        end(*capture);
        if (capture->valid && joined) {
            *graph = static_cast<cudaGraph_t>(capture->handle);
            return;
        }
        graphs.remove(capture->handle);
        check_valid(*capture);
        fail(cudaErrorStreamCaptureUnjoined,
             "a stream that joined the capture has work that its first stream does not wait for");
    });
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
    return call(__func__, [&](Lock&) {
        auto stream = stream_of(handle);
        if (stream->legacy)
            for (auto& other : streams_of(stream->device))
                if (other->capture && other->blocking) throw Failure{cudaErrorStreamCaptureImplicit};
        *status = !stream->capture         ? cudaStreamCaptureStatusNone
                  : stream->capture->valid ? cudaStreamCaptureStatusActive
                                           : cudaStreamCaptureStatusInvalidated;
    });
}

// Graph and dependencies are those of the capture under way.
CUresult cuStreamGetCaptureInfo_v2(CUstream handle, CUstreamCaptureStatus* status, cuuint64_t* id, CUgraph* graph,
                                   const CUgraphNode** dependencies, size_t* count) {
    return driver_call(__func__, [&](Lock&) {
        auto stream = stream_of(handle);
        auto& capture = stream->capture;
        *status = !capture         ? CU_STREAM_CAPTURE_STATUS_NONE
                  : capture->valid ? CU_STREAM_CAPTURE_STATUS_ACTIVE
                                   : CU_STREAM_CAPTURE_STATUS_INVALIDATED;
        if (!capture) return;
        if (id) *id = capture->id;
        if (graph) *graph = static_cast<CUgraph>(capture->handle);
        if (dependencies) *dependencies = reinterpret_cast<const CUgraphNode*>(stream->last.data());
        if (count) *count = stream->last.size();
    });
}

// --- graphs ---------------------------------------------------------------------------------------------------------

// How many nodes there are, and as many of them as `nodes` has room for.
CUresult cuGraphGetNodes(CUgraph handle, CUgraphNode* nodes, size_t* count) {
    return driver_call(__func__, [&](Lock&) {
        auto graph = graphs.get(handle);
        size_t found = graph->nodes.size();
        for (size_t i = 0; nodes && i < std::min(found, *count); i++)
            nodes[i] = reinterpret_cast<CUgraphNode>(graph->nodes[i].get());
        *count = found;
    });
}

cudaError_t cudaGraphGetNodes(cudaGraph_t handle, cudaGraphNode_t* nodes, size_t* count) {
    return static_cast<cudaError_t>(cuGraphGetNodes(handle, nodes, count));
}

CUresult cuGraphNodeGetType(CUgraphNode node, CUgraphNodeType* type) {
    *type = static_cast<CUgraphNodeType>(type_of(reinterpret_cast<Node*>(node)->kind));
    return CUDA_SUCCESS;
}

// The kernel or the library's function that a node calls; empty for others.
const char* emulated_node_name(void* node) { return static_cast<Node*>(node)->name.c_str(); }

cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type) {
    *type = type_of(reinterpret_cast<Node*>(node)->kind);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    return call(__func__, [&](Lock&) { graphs.remove(graph); });
}

// A graph is not changed any more once it is captured: what runs shares its nodes.
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t handle, unsigned long long) {
    return call(__func__, [&](Lock&) {
        auto executable = std::make_shared<Executable>();
        executable->graph = graphs.get(handle);
        *made = static_cast<cudaGraphExec_t>(executables.add(executable));
    });
}

#if CUDART_VERSION >= 12000
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t handle, unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(made, handle, flags);
}
#endif

// A launch that is under way goes on.
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    return call(__func__, [&](Lock&) { executables.remove(executable); });
}

cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t stream) {
    return call(__func__, [&](Lock&) { executables.get(executable), stream_of(stream); });
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t handle, cudaStream_t into) {
    return call(__func__, [&](Lock& lock) {
        auto executable = executables.get(handle);
        auto stream = stream_of(into);
        auto graph = executable->graph;
        auto run = [graph] { run_nodes(*graph); };
        if (stream->capture) {
            add_node(*stream, Kind::graph, run);
            return;
        }
        if (executable->stream) enqueue_wait(lock, stream, executable->stream, executable->place);
        executable->stream = stream;
        executable->place = stream->given + 1;
        enqueue(lock, stream, Kind::graph, run);
        executable->place = stream->given;
    });
}

}  // extern "C"
