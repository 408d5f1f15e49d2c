// The last block of a launch: it finishes what needs the work of all, so that no second launch has to. What it adds up
// stands in memory in an order of its own, so the bits do not depend on which block comes last.

enum : int { MOST_THREADS = 1024 };  // of a block; kernels without bounds are launched with 256

// Whether this block is the last one to come here, for which everything is there that the others wrote before. *ticket
// is 0 when a launch begins, and again when it ends. All threads must come here.
__device__ inline bool last_block(unsigned* ticket) {
    __shared__ bool last;
    const unsigned blocks = gridDim.x * gridDim.y;
    __syncthreads();  // the threads' work comes before the fence of the first
    if (blocks == 1) return true;
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicInc(ticket, blocks - 1) == blocks - 1;  // that one makes it 0 again
        __threadfence();
    }
    __syncthreads();
    return last;
}
