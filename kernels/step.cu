// The control of captured steps. A graph is launched again and again with the same arguments, so what differs from step
// to step lies on the device, in `progress`. A step whose loss or gradient is not what it should be halts: it and all
// that come after it leave everything as it is, until the host, which looks at some time, has dealt with it.

enum {
    SLOT,    // the row of the tables of scalars and of losses
    HALTED,  // whether a step was found that must not be applied
    BATCH,   // of the epoch
    STEP,    // of dropout
};

// One thread. total += share * loss, in double precision, rounded as on the host.
extern "C" __global__ void add_loss(const T* loss, double* total, double share) {
    *total = __dadd_rn(*total, __dmul_rn(share, (double)*loss));
}

// One thread: whether the step is applied. `control` is what update_arrays reads: what the gradients are multiplied by,
// so that their norm is `max_norm` at most (0: whatever it is), and whether nothing is to be done. The loss is *loss, or
// where that is null *total. `squares` are those of square_sum, or null: then nothing is looked at. They and the total
// are zero again afterwards. The gradients are *factor times what they should be, or where that is null once. A sum of
// squares beyond `largest` may overflow in the update.
extern "C" __global__ void judge(const T* loss, double* total, double* squares, const T* factor, long long* progress,
                                 double* losses, T* control, double max_norm, double largest) {
    const double cost = loss ? (double)*loss : *total;
    if (total) *total = 0;
    const double times = factor ? (double)*factor : 1;
    double scale = 1 / times;
    bool fine = true;
    if (squares) {
        const double sum = squares[0], norm = sqrt(sum);
        fine = cost - cost == 0 && sum - sum == 0 && squares[1] == 0;
        if (max_norm > 0 && norm / times > max_norm) scale = max_norm / norm;
        else if (times == 1) fine = fine && sum <= largest;
        squares[0] = squares[1] = 0;
    }
    if (!fine) progress[HALTED] = 1;
    if (!progress[HALTED]) losses[progress[SLOT]] = cost;
    control[0] = T(scale);
    control[1] = T(progress[HALTED] != 0);
}

// One block, the last of a step: on to the next one, or back to the n running statistics from before it.
extern "C" __global__ void go_on(long long* progress, T* running, const T* before, long long n) {
    if (progress[HALTED]) {
        for (long long i = threadIdx.x; i < n; i += blockDim.x) running[i] = before[i];
    } else if (threadIdx.x == 0) {
        ++progress[SLOT];
        ++progress[BATCH];
        ++progress[STEP];
    }
}
