// The images of a permutation as an array.

// out[i] = image(start + i)
extern "C" __global__ void permute(const long long* permutation, long long* out, long long count, long long start) {
    const Permutation p = *reinterpret_cast<const Permutation*>(permutation);
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step)
        out[i] = image(p, start + i);
}
