// The samples of an order that is computed, as an array.

// out[i] = the sample at place start + i; `order` has the numbers of Order.
extern "C" __global__ void permute(const long long* order, long long* out, long long count, long long start) {
    const Order samples(order, start);
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) out[i] = samples.at(i);
}
