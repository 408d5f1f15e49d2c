// The last block of a launch combines the results of all blocks, which saves a second launch. It reads them in a fixed
// order, so the bits do not depend on which block is last.

enum : int { MOST_THREADS = 1024 };  // per block; kernels without launch bounds run with 256

// Whether this block is the last of `blocks` to arrive; it then sees all earlier writes of the others. *ticket is 0
// before and after a launch. All threads must call it.
__device__ inline bool last_block(unsigned* ticket, unsigned blocks) {
    __shared__ bool last;
    __syncthreads();  // all threads have written before the first one's fence
    if (blocks == 1) return true;
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicInc(ticket, blocks - 1) == blocks - 1;  // the last increment wraps to 0
        __threadfence();
    }
    __syncthreads();
    return last;
}

__device__ inline bool last_block(unsigned* ticket) { return last_block(ticket, gridDim.x * gridDim.y); }
