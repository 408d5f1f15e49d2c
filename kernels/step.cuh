// The progress of captured steps. A graph is launched again and again with the same arguments, so values that change
// from step to step are on the device. A step whose loss or gradient cannot be used sets HALTED: it and all later steps
// change nothing until the host, which checks from time to time, has handled it.

enum : int {
    SLOT,    // row in the tables of scalars and losses
    HALTED,  // whether a step must not be applied
    BATCH,   // number of the batch in the epoch
    STEP,    // step number, for dropout
    TICKET,  // for last_block(), 0 between launches
};

// End a step, in its last block: advance to the next one, or if halted restore the n running statistics from `before`.
__device__ inline void go_on(long long* progress, T* running, const T* before, long long n) {
    if (progress[HALTED]) {
        for (long long i = threadIdx.x; i < n; i += blockDim.x) running[i] = before[i];
    } else if (threadIdx.x == 0) {
        ++progress[SLOT];
        ++progress[BATCH];
        ++progress[STEP];
    }
}
