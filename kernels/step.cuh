// The progress of captured steps. A graph is launched again and again with the same arguments, so what differs from
// step to step lies on the device. A step whose loss or gradient is not what it should be halts: it and all that come
// after it leave everything as it is, until the host, which looks at some time, has dealt with it.

enum : int {
    SLOT,    // the row of the tables of scalars and of losses
    HALTED,  // whether a step was found that must not be applied
    BATCH,   // of the epoch
    STEP,    // of dropout
    TICKET,  // of last_block(), 0 between launches
};

// The end of a step, for its last block: on to the next one, or back to the n running statistics from before it.
__device__ inline void go_on(long long* progress, T* running, const T* before, long long n) {
    if (progress[HALTED]) {
        for (long long i = threadIdx.x; i < n; i += blockDim.x) running[i] = before[i];
    } else if (threadIdx.x == 0) {
        ++progress[SLOT];
        ++progress[BATCH];
        ++progress[STEP];
    }
}
