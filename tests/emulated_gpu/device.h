// What the libraries of the emulated device share with each other.
#pragma once
#include <cstdint>

extern "C" {
// Puts work into a stream (a cudaStream_t; null and 1: the legacy default stream, 2: the thread's own). It runs when
// the stream comes to it, at once or later; while the stream is captured it becomes a node of the graph, which may run
// many times or never. Returns a cudaError_t.
int emulated_enqueue(void* stream, void (*work)(void*), void* context);

// The same; `release` is called with the context once the work cannot run any more. `name` is that of the graph's node.
int emulated_enqueue_owned(void* stream, void (*work)(void*), void* context, void (*release)(void*), const char* name);

// The allocation that the current device's kernels may use and that holds the address: [first, last). 0 if none.
int emulated_range(uint64_t address, uint64_t* first, uint64_t* last);

// Notes a fault of the tested program: printed on stderr after "emulated GPU: ", and kept for emulated_gpu.faults().
void emulated_fault(const char* sentence);
}

// What a kernel's library needs of the device that it is launched on (block.cpp).
struct Hooks {
    int (*range)(uint64_t address, uint64_t* first, uint64_t* last);  // as emulated_range
    int reverse;  // whether blocks and threads take turns from the last to the first: shows a barrier that is missing
};
