// Rows of an array by number. Sample is the type in which they are stored, Target that in which they are wanted.

constexpr int LARGER = sizeof(Sample) > sizeof(Target) ? sizeof(Sample) : sizeof(Target);
constexpr int LANES = 16 / LARGER;  // elements of which the larger ones have sixteen bytes

template <class E, int N>
struct alignas(N * sizeof(E)) Lanes {
    E at[N];
};

// out = convert(source[index]), of `features` elements a row, N of them at a time: so many divide the rows, and the
// arrays are aligned for them.
template <int N, class F>
__device__ inline void take_some(const Sample* source, const long long* index, Target* out, long long rows,
                                 long long features, long long width, F convert) {
    const Tile tile(rows, features / N, width);
    const auto* from = reinterpret_cast<const Lanes<Sample, N>*>(source);
    auto* to = reinterpret_cast<Lanes<Target, N>*>(out);
    tile.each([&](long long row) { return from[tile.at(index[row])]; },
              [&](long long row, const Lanes<Sample, N>& values) {
                  Lanes<Target, N> made;
                  for (int lane = 0; lane < N; ++lane) made.at[lane] = convert(values.at[lane]);
                  to[tile.at(row)] = made;
              });
}

// By as many as `lanes` says, LANES or one.
template <class F>
__device__ inline void take_rows(const Sample* source, const long long* index, Target* out, long long rows,
                                 long long features, long long width, long long lanes, F convert) {
    if (lanes == LANES) take_some<LANES>(source, index, out, rows, features, width, convert);
    else take_some<1>(source, index, out, rows, features, width, convert);
}
