// See square_sum.cuh.
extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1) square_sum(const S* x, long long n, double* out) {
    add_squares(x, n, out);
}
