// What the libraries of the emulated device share with each other.
#pragma once
#include <cstdint>

extern "C" {
// Puts work into a stream (a cudaStream_t; null and 1: the legacy default stream, 2: the thread's own). It runs when
// the stream comes to it, at once or later; while the stream is captured it becomes a node of the graph, which may run
// many times or never. Returns a cudaError_t.
int emulated_enqueue(void* stream, void (*work)(void*), void* context);

// Releases the context of work given to emulated_enqueue_owned, once it can run no more.
int emulated_enqueue_owned(void* stream, void (*work)(void*), void* context, void (*release)(void*), const char* name);

// The allocation that the current device's kernels may use and that holds the address: [first, last). 0 if none.
int emulated_range(uint64_t address, uint64_t* first, uint64_t* last);

// Notes a fault of the tested program: printed on stderr after "emulated GPU: ", and kept for emulated_gpu.faults().
void emulated_fault(const char* sentence);
}
