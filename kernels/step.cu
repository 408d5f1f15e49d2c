// Decide whether a captured step is applied, by its loss and its gradient.

// total += share * loss, in double precision, rounded as on the host. Launched with one thread.
extern "C" __global__ void add_loss(const T* loss, double* total, double share) {
    *total = __dadd_rn(*total, __dmul_rn(share, (double)*loss));
}

// Write `control` for update_arrays: control[0] scales the n gradients so that their norm is at most `max_norm` (0: no
// limit); if control[1] is non-zero the step is skipped. The loss is *loss, or *total if `loss` is null. The gradients
// were multiplied by *factor (null: by 1). `squares` is laid out as in square_sum.cuh; squares[0], squares[1] and
// *total are reset to 0. Unscaled gradients whose sum of squares is above `largest` halt the step: the update may
// overflow.
extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1)
    judge(const S* gradient, long long n, double* squares, const T* loss, double* total, const T* factor,
          long long* progress, double* losses, T* control, double max_norm, double largest) {
    if (!add_squares(gradient, n, squares)) return;
    const double cost = loss ? (double)*loss : *total, sum = squares[0], norm = sqrt(sum);
    const double times = factor ? (double)*factor : 1;
    double scale = 1 / times;
    bool fine = cost - cost == 0 && sum - sum == 0 && squares[1] == 0;
    if (max_norm > 0 && norm / times > max_norm) scale = max_norm / norm;
    else if (times == 1) fine = fine && sum <= largest;
    squares[0] = squares[1] = *total = 0;
    if (!fine) progress[HALTED] = 1;
    if (!progress[HALTED]) losses[progress[SLOT]] = cost;
    control[0] = T(scale);
    control[1] = T(progress[HALTED] != 0);
}
