// Copy rows of an array in some order. Sample is the type of the source, Target that of the result, and Order, one of
// orders.cuh, finds the sample at a place.

constexpr int LARGER = sizeof(Sample) > sizeof(Target) ? sizeof(Sample) : sizeof(Target);
constexpr int LANES = 16 / LARGER;  // elements in sixteen bytes of the larger type

template <class E, int N>
struct alignas(N * sizeof(E)) Lanes {
    E at[N];
};

// out = convert(source[order]): rows of `features` elements, N at a time; N divides `features`, and the arrays are
// aligned to N elements.
template <int N, class F>
__device__ inline void take_some(const Sample* source, const Order& order, Target* out, long long rows,
                                 long long features, long long width, F convert) {
    const Tile tile(rows, features / N, width);
    const auto* from = reinterpret_cast<const Lanes<Sample, N>*>(source);
    auto* to = reinterpret_cast<Lanes<Target, N>*>(out);
    tile.each([&](long long row) { return from[tile.at(order.at(row))]; },
              [&](long long row, const Lanes<Sample, N>& values) {
                  Lanes<Target, N> made;
                  for (int lane = 0; lane < N; ++lane) made.at[lane] = convert(values.at[lane]);
                  to[tile.at(row)] = made;
              });
}

// Take rows `lanes` elements at a time: LANES or one.
template <class F>
__device__ inline void take_rows(const Sample* source, const Order& order, Target* out, long long rows,
                                 long long features, long long width, long long lanes, F convert) {
    if (lanes == LANES) take_some<LANES>(source, order, out, rows, features, width, convert);
    else take_some<1>(source, order, out, rows, features, width, convert);
}
