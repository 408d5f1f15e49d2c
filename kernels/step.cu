// Whether a captured step is applied: its loss and its gradient are looked at.

// One thread. total += share * loss, in double precision, rounded as on the host.
extern "C" __global__ void add_loss(const T* loss, double* total, double share) {
    *total = __dadd_rn(*total, __dmul_rn(share, (double)*loss));
}

// `control` is what update_arrays reads: what the gradients, n numbers, are multiplied by, so that their norm is
// `max_norm` at most (0: whatever it is), and whether nothing is to be done. The loss is *loss, or where that is null
// *total. `squares` is as square_sum.cuh has it; its first two and the total are zero again afterwards. The gradients
// are *factor times what they should be, or where that is null once. A sum of squares beyond `largest` may overflow in
// the update.
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
