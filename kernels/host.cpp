// gpubatch._host: the core's kernels for the CPU. A function takes NumPy arrays, distributes its loop over threads
// without the interpreter's lock, and returns True. If an array has an unsuitable type, shape or stride it returns
// False, and NumPy does the work.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#include <numpy/arrayobject.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include "host_kernels.h"
#include "sources.h"
#include "threads.h"

namespace nb = nanobind;

// --- SIMD levels ---

#if defined(__x86_64__)
extern const Kernels kernels_v2, kernels_v3, kernels_v4;

struct Level {
    const char* name;
    const Kernels* kernels;
    bool usable;
};

static std::vector<Level> levels() {
    __builtin_cpu_init();
    const bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
    const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    return {{"x86-64-v2", &kernels_v2, v2}, {"x86-64-v3", &kernels_v3, v3}, {"x86-64-v4", &kernels_v4, v4}};
}
#else
extern const Kernels kernels_plain;

struct Level {
    const char* name;
    const Kernels* kernels;
    bool usable;
};

static std::vector<Level> levels() { return {{"plain", &kernels_plain, true}}; }
#endif

static Level level;

static std::vector<std::string> usable_levels() {
    std::vector<std::string> names;
    for (const Level& one : levels())
        if (one.usable) names.push_back(one.name);
    return names;
}

static void use(const std::string& name) {
    for (const Level& one : levels())
        if (one.usable && name == one.name) {
            level = one;
            return;
        }
    std::string known;
    for (const std::string& one : usable_levels()) known += (known.empty() ? "" : ", ") + one;
    throw nb::value_error(("SIMD level must be one of " + known + "; got " + name).c_str());
}

template <class T>
static const Table<T>& table();
template <>
const Table<float>& table<float>() { return level.kernels->of_float; }
template <>
const Table<double>& table<double>() { return level.kernels->of_double; }

// --- threads ---

static int most_threads = processors();
constexpr Int WORTH = 1 << 15;  // least elements per thread that pay for waking it

// body(first, last) over pieces of [0, n), in threads; a row has `columns` elements. Results must not depend on pieces.
template <class Body>
static void in_pieces(Int n, Int columns, const Body& body) {
    const Int elements = n * std::max<Int>(columns, 1);
    const int workers = (int)std::min<Int>(most_threads, elements / WORTH);
    const Int pieces = workers <= 1 ? 1 : std::min<Int>(n, 4 * workers);
    pool().run(pieces, workers, [&](Int i) { body(n * i / pieces, n * (i + 1) / pieces); });
}

constexpr Int PARTS = 64;  // as in gpubatch/ops/grid.py

// The number of parts of a reduction over n rows; it depends on n alone, so the sums do not depend on the threads.
static Int parts_of(Int n, Int least) { return std::max<Int>(1, std::min<Int>(PARTS, n / least)); }

// body(part, first, last) over the parts of n rows, in threads.
template <class Body>
static void in_parts(Int n, Int columns, Int parts, const Body& body) {
    const int workers = (int)std::min<Int>(most_threads, n * columns / WORTH);
    pool().run(parts, workers, [&](Int i) { body(i, n * i / parts, n * (i + 1) / parts); });
}

// --- arrays ---

template <class T>
constexpr int TYPE = sizeof(T) == 4 ? NPY_FLOAT : NPY_DOUBLE;

static PyArrayObject* array(nb::handle x) {
    return PyArray_Check(x.ptr()) ? reinterpret_cast<PyArrayObject*>(x.ptr()) : nullptr;
}

// Whether x is a C-contiguous array of the given type and size, in native byte order.
static bool fits(nb::handle x, int type, Int size) {
    PyArrayObject* a = array(x);
    return a && PyArray_TYPE(a) == type && PyArray_ISCARRAY_RO(a) && PyArray_SIZE(a) == size;
}

// Whether x is a scratch array of at least `size` elements.
static bool has_room(nb::handle x, int type, Int size) {
    PyArrayObject* a = array(x);
    return a && PyArray_SIZE(a) >= size && fits(x, type, PyArray_SIZE(a));
}

template <class T>
static T* data(nb::handle x) {
    return x.is_none() ? nullptr : static_cast<T*>(PyArray_DATA(reinterpret_cast<PyArrayObject*>(x.ptr())));
}

static bool is_float(nb::handle x) { return PyArray_TYPE(reinterpret_cast<PyArrayObject*>(x.ptr())) == NPY_FLOAT; }

// f(zero of x's type), float or double.
template <class F>
static bool with_type(nb::handle x, const F& f) {
    return is_float(x) ? f(float()) : f(double());
}

// f(zero of x's type, rows, columns) if x is a matrix of float or double, otherwise False.
template <class F>
static bool with_matrix(nb::handle x, const F& f) {
    PyArrayObject* a = array(x);
    if (!a || PyArray_NDIM(a) != 2 || !PyArray_ISCARRAY_RO(a)) return false;
    if (PyArray_TYPE(a) != NPY_FLOAT && PyArray_TYPE(a) != NPY_DOUBLE) return false;
    return with_type(x, [&](auto zero) { return f(zero, (Int)PyArray_DIM(a, 0), (Int)PyArray_DIM(a, 1)); });
}

typedef nb::handle Any;

// --- calls that are made again ---

// Calls of kernels as they were made in a thread, between begin() and end(): run() makes them again, on what is in the
// same arrays by then, in one call from Python. They know addresses, so the arrays, and what else they use, are kept.
class Recording {
  public:
    // Add a call. Declined calls leave work to NumPy, of which nothing is known here.
    void add(std::initializer_list<Any> used, std::function<void()> call) {
        for (Any one : used) kept.append(one);
        calls.push_back(std::move(call));
    }
    void begin() { current() = this; }
    // Whether every call of a kernel that was made since begin() is here.
    bool end() {
        current() = nullptr;
        return whole;
    }
    // Make all calls in turn, up to `times` times; returns how often. It ends early after a tenth of a second, so that
    // Python sees an interrupt.
    Int run(Int times) const {
        nb::gil_scoped_release unlocked;
        const double until = now() + 0.1;
        Int made = 0;
        for (; made < times && (made == 0 || now() < until); ++made)
            for (const auto& call : calls) call();
        return made;
    }

    static Recording*& current() {
        static thread_local Recording* one = nullptr;
        return one;
    }
    std::size_t size() const { return calls.size(); }
    bool whole = true;

  private:
    std::vector<std::function<void()>> calls;
    nb::list kept;
};

// Run the body of a kernel, on these arrays, without the interpreter's lock. It is copied where calls are recorded, so
// it must hold no reference.
template <class Body>
static bool made(std::initializer_list<Any> arrays, const Body& body) {
    if (Recording* recording = Recording::current()) recording->add(arrays, body);
    nb::gil_scoped_release unlocked;
    body();
    return true;
}

// A kernel for Python: a recording of which it is no part has a gap.
template <class... A>
static auto noted(bool (*kernel)(A...)) {
    return [kernel](A... arguments) {
        Recording* recording = Recording::current();
        const std::size_t before = recording ? recording->size() : 0;
        const bool done = kernel(arguments...);
        if (recording && recording->size() == before) recording->whole = false;
        return done;
    };
}

// at = the numbers of `order` from *place on, which then is the place after them. For recordings, of which each run so
// takes the next rows.
static bool next_rows(Any order, Any place, Any at) {
    PyArrayObject *all = array(order), *some = array(at);
    if (!all || !some || !fits(place, NPY_INT64, 1) || !PyArray_ISWRITEABLE(array(place))) return false;
    const Int count = PyArray_SIZE(all), rows = PyArray_SIZE(some);
    if (!fits(order, NPY_INT64, count) || !fits(at, NPY_INT64, rows) || !PyArray_ISWRITEABLE(some)) return false;
    const Int* from = data<Int>(order);
    Int *next = data<Int>(place), *to = data<Int>(at);
    return made({order, place, at}, [=] {
        if (*next < 0 || *next + rows > count) throw nb::index_error("next_rows: order has no such rows");
        std::copy(from + *next, from + *next + rows, to);
        *next += rows;
    });
}

// total += factor x, of one element each; total is of double.
static bool add_to(Any x, double factor, Any total) {
    PyArrayObject* a = array(x);
    if (!a || (PyArray_TYPE(a) != NPY_FLOAT && PyArray_TYPE(a) != NPY_DOUBLE)) return false;
    if (!fits(total, NPY_DOUBLE, 1) || !PyArray_ISWRITEABLE(array(total))) return false;
    return with_type(x, [&](auto zero) {
        typedef decltype(zero) T;
        if (!fits(x, TYPE<T>, 1)) return false;
        const T* from = data<T>(x);
        double* to = data<double>(total);
        return made({x, total}, [=] { *to += factor * (double)*from; });
    });
}

// --- formulas ---

enum Kind { RULE, ACTIVATION, SCORE_LOSS };

static Kind kind_of(const std::string& name) {
    if (name == "rule") return RULE;
    if (name == "activation") return ACTIVATION;
    if (name == "score loss") return SCORE_LOSS;
    throw nb::value_error(("kind must be rule, activation or score loss; got " + name).c_str());
}

// A formula that was compiled on first use (gpubatch/ops/host_compiler.py): the functions of a row of its table, for
// one element type. Its library stays loaded. The interpreter's lock guards these lists.
struct Own {
    bool single;
    std::vector<std::uintptr_t> functions;
};
static std::vector<Own> own[3];

// The place of a formula in its table, the same for every element type and SIMD level; places of own formulas follow.
static Int count_of(Kind kind) {
    const Table<float>& t = table<float>();
    return kind == RULE ? t.formula_count : kind == ACTIVATION ? t.activation_count : t.score_loss_count;
}

static Int add_own(const std::string& kind, const std::string& dtype, const std::vector<std::uintptr_t>& functions) {
    const Kind k = kind_of(kind);
    if (functions.size() != (k == ACTIVATION ? 2 : 1)) throw nb::value_error("functions must be those of one formula");
    own[k].push_back({dtype == "float32", functions});
    return count_of(k) + (Int)own[k].size() - 1;
}

template <class Row>
static Int place_in(const Row* rows, Int count, const std::string& digest) {
    for (Int i = 0; i < count; ++i)
        if (digest == rows[i].name) return i;
    return -1;
}

// The place of a formula of the build; -1 if it has no such formula.
static Int place_of(const std::string& kind, const std::string& digest) {
    const Table<float>& t = table<float>();
    const Kind k = kind_of(kind);
    if (k == RULE) return place_in(t.formulas, t.formula_count, digest);
    if (k == ACTIVATION) return place_in(t.activations, t.activation_count, digest);
    return place_in(t.score_losses, t.score_loss_count, digest);
}

// Function `number` of the own formula at `place`; null if it was compiled for the other element type.
template <class T, class Function>
static void take_own(Kind kind, Int place, int number, Function& function) {
    const Own& found = own[kind].at(place - count_of(kind));
    function = found.single == (sizeof(T) == 4) ? reinterpret_cast<Function>(found.functions[number]) : nullptr;
}

template <class T>
static Formula<T> formula_at(Int place) {
    if (place < count_of(RULE)) return table<T>().formulas[place];
    Formula<T> row = {};
    take_own<T>(RULE, place, 0, row.run);
    return row;
}

template <class T>
static Activation<T> activation_at(Int place) {
    if (place < count_of(ACTIVATION)) return table<T>().activations[place];
    Activation<T> row = {};
    take_own<T>(ACTIVATION, place, 0, row.forward);
    take_own<T>(ACTIVATION, place, 1, row.backward);
    return row;
}

template <class T>
static ScoreLoss<T> score_loss_at(Int place) {
    if (place < count_of(SCORE_LOSS)) return table<T>().score_losses[place];
    ScoreLoss<T> row = {};
    take_own<T>(SCORE_LOSS, place, 0, row.run);
    return row;
}

// --- update rules ---

typedef std::vector<std::vector<std::string>> Names;

// Whether two arrays of so many bytes share memory.
static bool overlap(Int x, Int y, Int bytes) { return x < y + bytes && y < x + bytes; }

// A reduction of the array of `size` elements from the totals of its pieces, as gpubatch/formula/reductions.py has it.
static double combined(const std::string& reduction, double x, double y) {
    if (reduction == "max_abs") return x > y || x != x ? x : y;
    return x + y;
}

static double finished(const std::string& reduction, double total, Int size) {
    if (reduction == "norm") return std::sqrt(total);
    return reduction == "mean" ? total / (double)std::max<Int>(size, 1) : total;
}

// The rows of a formula's table, and what distinguishes them.
struct Pieces {
    std::vector<Int> rows;                 // of each piece its address in each array, then its size
    std::vector<Int> sizes, scalar_rows;   // of each tuple of arrays its size, and its row of scalars
    std::vector<Int> owners;               // of each piece the number of its tuple, if pieces are apart
    Int elements = 0;

    void clear() {
        for (auto* numbers : {&rows, &sizes, &scalar_rows, &owners}) numbers->clear();
        elements = 0;
    }
};

// An update rule for arrays of one element type. Every step checks the arrays again, in case one has moved or changed
// shape; that takes nanoseconds.
class Update {
  public:
    // reductions: the names of those of each pass but the last.
    Update(Int place, const std::string& dtype, int arrays, const Names& reductions)
        : arrays(arrays), single(dtype == "float32"), place(place), reductions(reductions) {
        if (place < 0) throw nb::value_error("place must be that of a rule, got -1");
    }

    // tuples: (w, g, state ...), arrays of the same size, w and g of the same shape. scalars: a row of the formula's
    // scalars for each group of parameters. row_of: the number of each tuple's row; None: all take the first. scale: what
    // g is multiplied by. Returns False, with nothing changed, if an array is unsuitable.
    bool run(nb::list tuples, nb::list scalars, Any row_of, double scale) {
        Pieces pieces = std::move(memory);  // a concurrent caller then allocates its own
        const bool apart = !row_of.is_none() || reduces();
        if (!collect(tuples, row_of, (Int)nb::len(scalars), apart, pieces)) return false;
        if (!update(pieces, scalars, scale, apart)) return false;
        memory = std::move(pieces);
        return true;
    }

    // The same with the scalars in a table of (steps, rows, numbers): those of step *step, which then is one more.
    // `self` is this object in Python.
    bool run_ahead(nb::handle self, nb::list tuples, Any table, Any row_of, Any step) const {
        return single ? ahead_as<float>(self, tuples, table, row_of, step)
                      : ahead_as<double>(self, tuples, table, row_of, step);
    }

    // Add the pieces of a tuple of arrays at these addresses. Pieces are all alike, unless several rows of scalars or
    // reductions set them apart.
    void add(Pieces& pieces, const Int* address, Int size, Int scalar_row, bool apart) const {
        for (Int start = 0; start < size; start += PIECE) {
            for (int i = 0; i < arrays; ++i) pieces.rows.push_back(address[i] + start * item());
            pieces.rows.push_back(std::min(PIECE, size - start));
            if (apart) pieces.owners.push_back((Int)pieces.sizes.size());
        }
        pieces.scalar_rows.push_back(scalar_row);
        pieces.sizes.push_back(size);
        pieces.elements += size;
    }

    // Update the arrays of these pieces.
    bool update(const Pieces& pieces, nb::list scalars, double scale, bool apart) const {
        return single ? update_as<float>(pieces, scalars, scale, apart)
                      : update_as<double>(pieces, scalars, scale, apart);
    }

    Int item() const { return single ? sizeof(float) : sizeof(double); }
    bool reduces() const { return !reductions.empty(); }

    static constexpr Int PIECE = 1 << 13;  // elements of each array in one row of the table
    static constexpr int MOST_ARRAYS = 16;
    const int arrays;
    const bool single;

  private:
    // The pieces of these tuples; false if an array is unsuitable.
    bool collect(nb::list tuples, Any row_of, Int rows, bool apart, Pieces& pieces) const {
        const int type = single ? NPY_FLOAT : NPY_DOUBLE;
        pieces.clear();
        for (nb::handle group : tuples) {
            const Int owner = row_of.is_none() ? 0 : nb::cast<Int>(row_of[pieces.sizes.size()]);
            if (owner < 0 || owner >= rows) throw nb::index_error("row_of must name rows of scalars");
            if (!PyTuple_Check(group.ptr()) || PyTuple_GET_SIZE(group.ptr()) != arrays) return false;
            if (arrays > MOST_ARRAYS) return false;
            Int address[MOST_ARRAYS];
            Int size = -1;
            for (int i = 0; i < arrays; ++i) {
                PyArrayObject* a = array(PyTuple_GET_ITEM(group.ptr(), i));
                if (!a || PyArray_TYPE(a) != type) return false;
                if (i == 1 ? !PyArray_ISCARRAY_RO(a) : !PyArray_ISCARRAY(a)) return false;
                if (size < 0) size = PyArray_SIZE(a);
                if (PyArray_SIZE(a) != size) return false;
                if (i == 1 && !PyArray_SAMESHAPE(a, array(PyTuple_GET_ITEM(group.ptr(), 0)))) return false;
                address[i] = reinterpret_cast<Int>(PyArray_DATA(a));
            }
            // A gradient that overlaps its parameter must be copied first, which NumPy's form does.
            if (overlap(address[0], address[1], size * item())) return false;
            add(pieces, address, size, owner, apart);
        }
        return true;
    }

    template <class T>
    bool ahead_as(nb::handle self, nb::list tuples, Any table, Any row_of, Any step) const {
        PyArrayObject* of_steps = array(table);
        if (!of_steps || PyArray_NDIM(of_steps) != 3 || !fits(table, TYPE<T>, PyArray_SIZE(of_steps))) return false;
        if (!fits(step, NPY_INT64, 1) || !PyArray_ISWRITEABLE(array(step))) return false;
        const Int steps = PyArray_DIM(of_steps, 0), rows = PyArray_DIM(of_steps, 1), numbers = PyArray_DIM(of_steps, 2);
        const bool apart = !row_of.is_none() || reduces();
        const Formula<T> formula = formula_at<T>(place);
        Pieces pieces;
        if (!formula.run || !collect(tuples, row_of, rows, apart, pieces)) return false;
        const T* scalars = data<T>(table);
        Int* next = data<Int>(step);
        return made({self, tuples, table, step}, [=] {
            if (*next < 0 || *next >= steps) throw nb::index_error("step must be one of the table");
            std::vector<T> k;
            for (Int row = 0; row < rows; ++row) {
                const T* from = scalars + (*next * rows + row) * numbers;
                k.insert(k.end(), from, from + numbers);
                k.push_back(1);  // the scale
            }
            compute(formula, pieces, k, numbers + 1, apart);
            ++*next;
        });
    }

    template <class T>
    bool update_as(const Pieces& pieces, nb::list scalars, double scale, bool apart) const {
        std::vector<T> k;
        for (nb::handle row : scalars) {
            for (nb::handle scalar : nb::cast<nb::tuple>(row)) k.push_back(nb::cast<T>(scalar));
            k.push_back((T)scale);
        }
        const Formula<T> formula = formula_at<T>(place);
        if (!formula.run) return false;
        const Int stride = (Int)(k.size() / nb::len(scalars));
        nb::gil_scoped_release unlocked;
        compute(formula, pieces, k, stride, apart);
        return true;
    }

    // Run the formula; k has rows of scalars, each with the scale at its end, `stride` numbers apart.
    template <class T>
    void compute(const Formula<T>& formula, const Pieces& pieces, const std::vector<T>& k, Int stride, bool apart) const {
        const Int rows = (Int)pieces.rows.size() / (arrays + 1);
        const int workers = (int)std::min<Int>(most_threads, pieces.elements / WORTH);
        Int count = 0, most = 0;  // of reductions, in all and in a pass
        for (const auto& names : reductions) {
            count += (Int)names.size();
            most = std::max(most, (Int)names.size());
        }
        std::vector<T> values(pieces.sizes.size() * count);
        std::vector<double> totals(rows * most);
        const std::vector<Int>& owners = pieces.owners;
        Int pass = 0, known = 0;
        const auto update = [&](Int first, Int last) {  // pieces of one tuple, or of any if they are alike
            const Int tuple = apart ? owners[first] : 0;
            formula.run(pieces.rows.data(), k.data() + pieces.scalar_rows[tuple] * stride,
                        values.data() + tuple * count, totals.data(), pass, first, last);
        };
        for (; pass <= (Int)reductions.size(); ++pass) {
            if (workers > 1)
                pool().run(rows, workers, [&](Int i) { update(i, i + 1); });
            else
                for (Int first = 0, last = 0; first < rows; first = last) {
                    for (last = first + 1; last < rows && (!apart || owners[last] == owners[first]);) ++last;
                    update(first, last);
                }
            if (pass == (Int)reductions.size()) break;
            const auto& names = reductions[pass];
            for (Int j = 0; j < (Int)names.size(); ++j, ++known)
                for (Int piece = 0; piece < rows;) {
                    const Int tuple = owners[piece];
                    double total = 0;
                    for (; piece < rows && owners[piece] == tuple; ++piece)
                        total = combined(names[j], totals[piece * (Int)names.size() + j], total);
                    values[tuple * count + known] = (T)finished(names[j], total, pieces.sizes[tuple]);
                }
        }
    }

    Int place;
    Names reductions;
    Pieces memory;  // reused from step to step
};

// --- matrix products ---

// The BLAS that NumPy uses, if it is OpenBLAS with threads of its own; Index is its type of integers.
template <class T, class Index>
struct Blas {
    typedef void Gemm(int, int, int, Index, Index, Index, T, const T*, Index, const T*, Index, T, T*, Index);
    typedef void Gemv(int, int, Index, Index, T, const T*, Index, const T*, Index, T, T*, Index);
};
constexpr int ROW_MAJOR = 101, PLAIN = 111, TRANSPOSED = 112;  // of cblas.h

static struct {
    std::uintptr_t gemm[2], gemv[2];  // of float and of double
    int (*threads)();
    void (*set_threads)(int);
    bool wide;      // whether its integers have 64 bits
    bool in_place;  // whether it has code for small products that reads the factors where they are
} blas;

// Meanwhile BLAS works on one thread, that of its caller. Its number of threads is the process's: as long as several
// products run at a time, it is that which the first one found that the last one restores.
class OneThread {
  public:
    OneThread() {
        Shared& all = shared();
        std::unique_lock<std::mutex> lock(all.guard);
        all.changed.wait(lock, [&] { return all.forks == 0; });
        if (all.inside++ == 0 && (all.before = blas.threads()) != 1) blas.set_threads(1);
        before = all.before;
    }
    ~OneThread() {
        Shared& all = shared();
        std::lock_guard<std::mutex> lock(all.guard);
        if (--all.inside > 0) return;
        if (all.before != 1) blas.set_threads(all.before);
        if (all.forks > 0) all.changed.notify_all();
    }
    int before;

    // A fork waits until no product is computed, and products wait for the fork: a lock that a thread of BLAS holds at
    // that moment would be locked in the child for ever. No product needs Python's lock, which a fork may hold.
    static void before_fork() {
        Shared& all = shared();
        std::unique_lock<std::mutex> lock(all.guard);
        ++all.forks;
        all.changed.wait(lock, [&] { return all.inside == 0; });
    }
    static void after_fork() {
        Shared& all = shared();
        std::lock_guard<std::mutex> lock(all.guard);
        if (--all.forks == 0) all.changed.notify_all();
    }
    // Threads that waited are not in the child, and its mutex may have been locked by one of them.
    static void in_child() { new (&shared()) Shared; }

  private:
    struct Shared {
        std::mutex guard;
        std::condition_variable changed;
        int inside = 0, before = 1, forks = 0;
    };
    static Shared& shared() {
        static Shared one;
        return one;
    }
};

static void use_blas(const std::vector<std::uintptr_t>& f, bool wide, bool in_place) {
    const bool first = !blas.threads;
    blas = {{f.at(0), f.at(1)}, {f.at(2), f.at(3)}, reinterpret_cast<int (*)()>(f.at(4)),
            reinterpret_cast<void (*)(int)>(f.at(5)), wide, in_place};
#if !defined(_WIN32)
    if (first) pthread_atfork(OneThread::before_fork, OneThread::after_fork, OneThread::in_child);
#endif
}

// A matrix as BLAS takes it: its rows, or with `transposed` its columns, are contiguous and `stride` elements apart.
struct Matrix {
    Int rows, columns, stride;
    bool transposed;
    char* at;
};

static bool as_matrix(nb::handle x, int type, Matrix& m) {
    PyArrayObject* a = array(x);
    if (!a || PyArray_TYPE(a) != type || PyArray_NDIM(a) != 2 || !PyArray_ISALIGNED(a) || !PyArray_ISNOTSWAPPED(a))
        return false;
    const Int size = PyArray_ITEMSIZE(a), down = PyArray_STRIDE(a, 0), across = PyArray_STRIDE(a, 1);
    m = {PyArray_DIM(a, 0), PyArray_DIM(a, 1), 0, false, PyArray_BYTES(a)};
    for (const bool transposed : {false, true}) {
        const Int rows = transposed ? m.columns : m.rows, columns = transposed ? m.rows : m.columns;
        const Int apart = transposed ? across : down, step = transposed ? down : across;
        m.transposed = transposed;
        m.stride = rows == 1 ? columns : apart / size;  // along an axis of one element a stride may be anything
        if ((columns == 1 || step == size) && (rows == 1 || (m.stride >= columns && apart % size == 0))) return true;
    }
    return false;
}

constexpr Int UNIT = 64;             // rows or columns: pieces end where BLAS's own blocks do
constexpr Int PIECE_WORK = 1 << 20;  // least multiplications of a piece: about as long as waking a thread takes

static Int power_of_two(Int most) {
    Int n = 1;
    while (2 * n <= most) n *= 2;
    return n;
}

// The pieces of `n` rows or columns, of whole units but for the last.
struct Cut {
    Int n, pieces, unit;
    Int start(Int i) const { return i == pieces ? n : n / unit * i / pieces * unit; }
};

static Cut at_most(Int n, Int most) {  // so many pieces
    return {n, power_of_two(std::max<Int>(1, std::min(most, n / UNIT))), UNIT};
}

// Other products than these, up to SMALL multiplications, BLAS begins by copying both factors into another order, which
// takes a sixth of the time in double precision and a tenth in single. Its code for small ones is not for a second
// factor that is transposed, nor for one so large that pieces have fewer than LEAST_ROWS rows. With more than DEEP terms
// in a sum it takes up to a third longer, since the rows of the second factor leave the first-level cache: longer sums
// are added up in parts, which pays for pieces of twice as many rows.
constexpr Int SMALL = 1000000, LEAST_ROWS = 24, DEEP = 100;

// The rows of m x n, and the terms of its sums, in pieces so small; one of each if it is not to be cut so.
struct InPlace {
    Cut rows, terms;
};

static InPlace in_place(Int m, Int n, Int k, Int work, bool transposed) {
    constexpr Int unit = 4, longest = 2 * unit - 1;  // by how much a piece may exceed the mean
    const Int parts = (k + DEEP - 1) / DEEP, most = SMALL / std::max<Int>(1, n * ((k + parts - 1) / parts));
    const Int least = parts == 1 ? LEAST_ROWS : 2 * LEAST_ROWS;
    if (!blas.in_place || transposed || m == 1 || n == 1 || most < least) return {{m, 1, 1}, {k, 1, 1}};
    const Int for_threads = std::min(work / 2, m / (2 * LEAST_ROWS));
    const Int pieces = std::max(m <= most ? 1 : (m + most - longest - 1) / (most - longest), for_threads);
    return {{m, std::max<Int>(1, pieces), unit}, {k, parts, 1}};
}

// body(first row, rows, first column, columns, terms) over the pieces of an m x n matrix, products along k, in threads.
// The pieces depend on m, n and k alone. Every piece packs its rows of one factor and columns of the other anew, which for
// `side` of them costs about 8 / side of its time: so the longer side of the matrix is cut first, and large pieces stay.
template <class Body>
static void in_blocks(Int m, Int n, Int k, bool transposed, const Body& body) {
    const Int work = std::max<Int>(1, (Int)((double)m * (double)n * (double)k / PIECE_WORK));
    const Int along = std::min(work, std::max<Int>(4, std::min<Int>(16, std::max(m, n) / 192)));
    const Cut longer = at_most(std::max(m, n), along);
    const Cut shorter = at_most(std::min(m, n), std::min(work / longer.pieces, std::min(m, n) / 512));
    Cut rows = m >= n ? longer : shorter, columns = m >= n ? shorter : longer;
    const InPlace small = in_place(m, n, k, work, transposed);
    if (small.rows.pieces > 1 || small.terms.pieces > 1) rows = small.rows, columns = {n, 1, 1};
    const OneThread blas;
    // Two pieces for a thread: in a step the other passes leave helpers asleep, and the matrices in the caller's cache.
    const int workers = (int)std::min<Int>({most_threads, blas.before, work / 2});
    pool().run(rows.pieces * columns.pieces, workers, [&](Int i) {
        const Int row = rows.start(i / columns.pieces), column = columns.start(i % columns.pieces);
        body(row, rows.start(i / columns.pieces + 1) - row, column, columns.start(i % columns.pieces + 1) - column,
             small.terms);
    });
}

constexpr Int COPIED = 1 << 12;  // elements of a transposed second factor that are copied, for the code for small products

// The matrix b, transposed in `copy`.
template <class T>
static Matrix straightened(const Matrix& b, T* copy) {
    const T* from = reinterpret_cast<const T*>(b.at);
    for (Int j = 0; j < b.columns; ++j)
        for (Int i = 0; i < b.rows; ++i) copy[i * b.columns + j] = from[j * b.stride + i];
    return {b.rows, b.columns, b.columns, false, reinterpret_cast<char*>(copy)};
}

template <class T, class Index>
static void multiply_as(const Matrix& a, const Matrix& b, T* out) {
    const auto gemm = reinterpret_cast<typename Blas<T, Index>::Gemm*>(blas.gemm[sizeof(T) == 8]);
    const auto gemv = reinterpret_cast<typename Blas<T, Index>::Gemv*>(blas.gemv[sizeof(T) == 8]);
    const Int m = a.rows, n = b.columns, k = a.columns;
    if (blas.in_place && b.transposed && m >= LEAST_ROWS && n > 1 && n * k <= COPIED) {
        T copy[COPIED];
        multiply_as<T, Index>(a, straightened(b, copy), out);
        return;
    }
    const T *A = reinterpret_cast<const T*>(a.at), *B = reinterpret_cast<const T*>(b.at);
    const int of_a = a.transposed ? TRANSPOSED : PLAIN, of_b = b.transposed ? TRANSPOSED : PLAIN;
    in_blocks(m, n, k, b.transposed, [&](Int row, Int rows, Int column, Int columns, const Cut& terms) {
        const T* from_a = A + row * (a.transposed ? 1 : a.stride);
        const T* from_b = B + column * (b.transposed ? b.stride : 1);
        T* to = out + row * n + column;
        const Int step_a = a.transposed ? a.stride : 1, step_b = b.transposed ? 1 : b.stride;  // along k
        if (n == 1)  // as NumPy does: for a vector this is faster
            gemv(ROW_MAJOR, of_a, (Index)(a.transposed ? k : rows), (Index)(a.transposed ? rows : k), 1, from_a,
                 (Index)a.stride, from_b, (Index)step_b, 0, to, 1);
        else if (m == 1)
            gemv(ROW_MAJOR, b.transposed ? PLAIN : TRANSPOSED, (Index)(b.transposed ? columns : k),
                 (Index)(b.transposed ? k : columns), 1, from_b, (Index)b.stride, from_a, (Index)step_a, 0, to, 1);
        else
            for (Int part = 0; part < terms.pieces; ++part) {
                const Int first = terms.start(part), count = terms.start(part + 1) - first;
                gemm(ROW_MAJOR, of_a, of_b, (Index)rows, (Index)columns, (Index)count, 1, from_a + first * step_a,
                     (Index)a.stride, from_b + first * step_b, (Index)b.stride, part ? 1 : 0, to, (Index)n);
            }
    });
}

// out = a b, matrices of float or double; a and b may be transposed views. BLAS computes pieces of it, each on one
// thread: with threads of its own it makes them wait for one another, spinning, and gives other bits.
static bool multiply(Any a, Any b, Any out) {
    PyArrayObject* c = array(out);
    if (!blas.threads || !c || PyArray_NDIM(c) != 2 || !PyArray_ISCARRAY(c)) return false;
    const int type = PyArray_TYPE(c);
    Matrix A, B;
    if ((type != NPY_FLOAT && type != NPY_DOUBLE) || !as_matrix(a, type, A) || !as_matrix(b, type, B)) return false;
    if (A.columns != B.rows || A.columns == 0 || A.rows != PyArray_DIM(c, 0) || B.columns != PyArray_DIM(c, 1)) return false;
    return with_type(out, [&](auto zero) {
        typedef decltype(zero) T;
        T* to = data<T>(out);
        return made({a, b, out}, [=] {
            if (blas.wide) multiply_as<T, std::int64_t>(A, B, to);
            else multiply_as<T, std::int32_t>(A, B, to);
        });
    });
}

// --- activations and biases ---

// The scalars of a formula as numbers of type T.
template <class T>
static std::vector<T> scalars_of(nb::tuple scalars) {
    std::vector<T> k;
    for (nb::handle scalar : scalars) k.push_back(nb::cast<T>(scalar));
    return k;
}

static bool activate(Int place, nb::tuple scalars, Any x, Any b, Any y, Any kept) {
    return with_matrix(x, [&](auto zero, Int rows, Int columns) {
        typedef decltype(zero) T;
        if (!fits(y, TYPE<T>, rows * columns) || !(b.is_none() || fits(b, TYPE<T>, columns))) return false;
        if (!(kept.is_none() || fits(kept, TYPE<T>, rows * columns))) return false;
        T *to = data<T>(y), *slope = data<T>(kept);
        const T *from = data<T>(x), *bias = data<T>(b);
        const std::vector<T> k = scalars_of<T>(scalars);
        const auto forward = activation_at<T>(place).forward;
        if (!forward) return false;
        return made({x, b, y, kept}, [=] {
            in_pieces(rows, columns, [&](Int first, Int last) {
                forward(from, bias, to, slope, k.data(), columns, first, last);
            });
        });
    });
}

// dx may be None for the identity activation: db is then the sum of dy.
static bool activation_gradient(Int place, nb::tuple scalars, Any kept, Any dy, Any dx, Any db, Any partial) {
    return with_matrix(dy, [&](auto zero, Int rows, Int columns) {
        typedef decltype(zero) T;
        if (!(dx.is_none() || (fits(dx, TYPE<T>, rows * columns) && fits(kept, TYPE<T>, rows * columns)))) return false;
        if (!(db.is_none() || (fits(db, TYPE<T>, columns) && has_room(partial, TYPE<T>, PARTS * columns))))
            return false;
        const T *from = data<T>(dy), *y = dx.is_none() ? nullptr : data<T>(kept);
        T *to = data<T>(dx), *bias = data<T>(db), *sums = data<T>(partial);
        const std::vector<T> k = scalars_of<T>(scalars);
        const auto backward = activation_at<T>(place).backward;
        if (!backward) return false;
        return made({kept, dy, dx, db, partial}, [=] {
            const auto gradient = [&](T* out, Int first, Int last) {
                if (to) backward(y, from, to, out, k.data(), columns, first, last);
                else table<T>().column_sums(from, out, columns, first, last);
            };
            if (!bias) {
                in_pieces(rows, columns, [&](Int first, Int last) { gradient(nullptr, first, last); });
                return;
            }
            const Int parts = parts_of(rows, 16);
            in_parts(rows, columns, parts, [&](Int part, Int first, Int last) {
                gradient(parts == 1 ? bias : sums + part * columns, first, last);
            });
            if (parts > 1) table<T>().add_parts(sums, 1, bias, parts, columns);
        });
    });
}

// --- weights of samples ---

// The sum of n numbers in the order in which NumPy adds them: in pairs of pairs, from blocks of eight sums.
template <class T>
static double sum_in_pairs(const T* x, Int n) {
    if (n > 128) {
        const Int half = n / 2 - n / 2 % 8;
        return sum_in_pairs(x, half) + sum_in_pairs(x + half, n - half);
    }
    double total = 0;
    Int i = 0;
    if (n >= 8) {
        double sums[8];
        for (int k = 0; k < 8; ++k) sums[k] = x[k];
        for (i = 8; i + 8 <= n; i += 8)
            for (int k = 0; k < 8; ++k) sums[k] += x[i + k];
        total = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    }
    for (; i < n; ++i) total += x[i];
    return total;
}

template <class T>
static void relative_weights(const T* weight, const Int* labels, Int ignored, T* out, double* sum, Int n) {
    constexpr Int CONVERTED = 8192;  // numbers that NumPy converts, and then adds, at a time
    bool right = true;
    for (Int i = 0; i < n; ++i) {
        out[i] = labels && labels[i] == ignored ? T(0) : weight ? weight[i] : T(1);
        right &= out[i] >= 0;
    }
    double total = 0;
    const Int step = sizeof(T) == sizeof(double) ? n : CONVERTED;
    for (Int i = 0; i < n; i += step) total += sum_in_pairs(out + i, std::min(step, n - i));
    *sum = right ? total : std::nan("");
    const double factor = 0 < *sum && *sum < INFINITY ? (double)n / *sum : std::nan("");
    for (Int i = 0; i < n; ++i) out[i] = (T)(out[i] * factor);
}

static bool weigh(Any weight, Any labels, Int ignored, Any out, Any sum) {
    PyArrayObject* a = array(out);
    if (!a || (PyArray_TYPE(a) != NPY_FLOAT && PyArray_TYPE(a) != NPY_DOUBLE)) return false;
    return with_type(out, [&](auto zero) {
        typedef decltype(zero) T;
        const Int n = PyArray_SIZE(a);
        if (!fits(out, TYPE<T>, n) || !fits(sum, NPY_DOUBLE, 1)) return false;
        if (!(weight.is_none() || fits(weight, TYPE<T>, n)) || !(labels.is_none() || fits(labels, NPY_INT64, n)))
            return false;
        relative_weights(data<T>(weight), data<Int>(labels), ignored, data<T>(out), data<double>(sum), n);
        return true;
    });
}

// --- losses ---

template <class T>
static void mean_of(const T* losses, Int rows, T* loss) {
    double total = 0;
    for (Int row = 0; row < rows; ++row) total += losses[row];
    *loss = (T)(total / (double)rows);
}

// Whether the arrays of a loss over rows of scores have the sizes that these ask for.
template <class T>
static bool fit_rows(Any dz, Any losses, Any loss, Any weights, Int rows, Int columns) {
    return fits(dz, TYPE<T>, rows * columns) && fits(losses, TYPE<T>, rows) && fits(loss, TYPE<T>, 1) &&
           (weights.is_none() || fits(weights, TYPE<T>, rows));
}

// Weights may be None in all of them: every row then counts 1.
static bool softmax_cross_entropy(Any z, Any labels, Any targets, Any dz, Any losses, Any loss, bool gradient,
                                  Any weights, double kept, double spread, bool relative) {
    return with_matrix(z, [&](auto zero, Int rows, Int columns) {
        typedef decltype(zero) T;
        if (!fit_rows<T>(dz, losses, loss, weights, rows, columns)) return false;
        if (labels.is_none() ? !fits(targets, TYPE<T>, rows * columns) : !fits(labels, NPY_INT64, rows)) return false;
        const T *scores = data<T>(z), *numbers = data<T>(targets), *of_rows = data<T>(weights);
        const Int* places = data<Int>(labels);
        T *to = data<T>(dz), *each = data<T>(losses), *mean = data<T>(loss);
        return made({z, labels, targets, dz, losses, loss, weights}, [=] {
            in_pieces(rows, 8 * columns, [&](Int first, Int last) {
                table<T>().softmax(scores, places, numbers, of_rows, (T)kept, (T)spread, relative, to, each,
                                   (T)(1.0 / rows), gradient, columns, first, last);
            });
            mean_of(each, rows, mean);
        });
    });
}

static bool softmax_focal(Any z, Any labels, Any dz, Any losses, Any loss, bool gradient, Any weights, double gamma,
                          Any alpha) {
    return with_matrix(z, [&](auto zero, Int rows, Int columns) {
        typedef decltype(zero) T;
        if (!fit_rows<T>(dz, losses, loss, weights, rows, columns)) return false;
        if (!fits(labels, NPY_INT64, rows) || !(alpha.is_none() || fits(alpha, TYPE<T>, columns))) return false;
        const T *scores = data<T>(z), *of_rows = data<T>(weights), *of_classes = data<T>(alpha);
        const Int* places = data<Int>(labels);
        T *to = data<T>(dz), *each = data<T>(losses), *mean = data<T>(loss);
        nb::gil_scoped_release unlocked;
        in_pieces(rows, 8 * columns, [&](Int first, Int last) {
            table<T>().focal(scores, places, of_rows, (T)gamma, of_classes, to, each, (T)(1.0 / rows), gradient,
                             columns, first, last);
        });
        mean_of(each, rows, mean);
        return true;
    });
}

// With `factor`, of one element, the gradient is multiplied by it.
static bool score_loss(Int place, nb::tuple scalars, Any z, Any targets, Any dz, Any partial, Any loss, bool gradient,
                       Any weights, Any factor) {
    return with_matrix(z, [&](auto zero, Int rows, Int columns) {
        typedef decltype(zero) T;
        const Int n = rows * columns, parts = parts_of(n, 1 << 12);
        if (!fits(targets, TYPE<T>, n) || !fits(dz, TYPE<T>, n) || !fits(loss, TYPE<T>, 1)) return false;
        if (!has_room(partial, NPY_DOUBLE, PARTS) || !(factor.is_none() || fits(factor, TYPE<T>, 1))) return false;
        if (!(weights.is_none() || fits(weights, TYPE<T>, rows))) return false;
        const T *scores = data<T>(z), *y = data<T>(targets), *of_rows = data<T>(weights), *scale = data<T>(factor);
        T *to = data<T>(dz), *mean = data<T>(loss);
        double* sums = data<double>(partial);
        const std::vector<T> k = scalars_of<T>(scalars);
        const auto run = score_loss_at<T>(place).run;
        if (!run) return false;
        return made({z, targets, dz, partial, loss, weights, factor}, [=] {
            const T share = (T)(1.0 / (double)n) * (scale ? *scale : 1);
            in_parts(n, 8, parts, [&](Int part, Int first, Int last) {
                sums[part] = run(scores, y, to, k.data(), share, of_rows, columns, gradient, first, last);
            });
            double total = 0;
            for (Int part = 0; part < parts; ++part) total += sums[part];
            *mean = (T)(total / (double)n);
        });
    });
}

// The sum of the margins' violations, or the largest alone.
static bool svm(Any z, Any labels, Any dz, Any losses, Any loss, bool gradient, Any weights, double delta,
                bool largest) {
    return with_matrix(z, [&](auto zero, Int rows, Int columns) {
        typedef decltype(zero) T;
        if (!fit_rows<T>(dz, losses, loss, weights, rows, columns) || !fits(labels, NPY_INT64, rows)) return false;
        const T *scores = data<T>(z), *of_rows = data<T>(weights);
        const Int* places = data<Int>(labels);
        T *to = data<T>(dz), *each = data<T>(losses), *mean = data<T>(loss);
        const auto run = largest ? table<T>().crammer_singer : table<T>().svm;
        nb::gil_scoped_release unlocked;
        in_pieces(rows, 2 * columns, [&](Int first, Int last) {
            run(scores, places, of_rows, (T)delta, to, each, (T)(1.0 / rows), gradient, columns, first, last);
        });
        mean_of(each, rows, mean);
        return true;
    });
}

// --- batch norm ---

template <class T>
static void inverse_roots(const T* var, T eps, T* out, Int n) {
    for (Int j = 0; j < n; ++j) out[j] = 1 / std::sqrt(var[j] + eps);
}

static bool normalise(Any x, Any mean, Any var, double eps, Any gamma, Any beta, Any y, Any inverse) {
    return with_matrix(x, [&](auto zero, Int rows, Int columns) {
        typedef decltype(zero) T;
        for (Any one : {mean, var, gamma, beta, inverse})
            if (!fits(one, TYPE<T>, columns)) return false;
        if (!fits(y, TYPE<T>, rows * columns)) return false;
        const T *from = data<T>(x), *m = data<T>(mean), *v = data<T>(var), *g = data<T>(gamma), *b = data<T>(beta);
        T *to = data<T>(y), *i = data<T>(inverse);
        nb::gil_scoped_release unlocked;
        inverse_roots(v, (T)eps, i, columns);
        in_pieces(rows, columns, [&](Int first, Int last) {
            table<T>().normalise(from, m, i, g, b, to, columns, first, last);
        });
        return true;
    });
}

static bool batch_norm(Any x, double eps, Any gamma, Any beta, Any y, Any normalised, Any mean, Any var, Any inverse,
                       Any partial) {
    return with_matrix(x, [&](auto zero, Int rows, Int columns) {
        typedef decltype(zero) T;
        for (Any one : {mean, var, gamma, beta, inverse})
            if (!fits(one, TYPE<T>, columns)) return false;
        for (Any one : {y, normalised})
            if (!fits(one, TYPE<T>, rows * columns)) return false;
        if (!has_room(partial, TYPE<T>, 2 * PARTS * columns)) return false;
        const T *from = data<T>(x), *g = data<T>(gamma), *b = data<T>(beta);
        T *to = data<T>(y), *n = data<T>(normalised), *m = data<T>(mean), *v = data<T>(var), *i = data<T>(inverse);
        T* sums = data<T>(partial);
        const Table<T>& t = table<T>();
        nb::gil_scoped_release unlocked;
        const Int parts = parts_of(rows, 16);
        in_parts(rows, columns, parts, [&](Int part, Int first, Int last) {
            t.column_sums(from, sums + part * columns, columns, first, last);
        });
        t.add_parts(sums, (T)(1.0 / rows), m, parts, columns);
        in_parts(rows, columns, parts, [&](Int part, Int first, Int last) {
            t.deviations(from, m, n, sums + part * columns, columns, first, last);
        });
        t.add_parts(sums, (T)(1.0 / rows), v, parts, columns);
        inverse_roots(v, (T)eps, i, columns);
        in_pieces(rows, columns, [&](Int first, Int last) {
            t.scale_and_shift(n, i, g, b, to, columns, first, last);
        });
        return true;
    });
}

static bool batch_norm_gradient(Any dy, Any gamma, Any dgamma, Any dbeta, Any dx, Any normalised, Any inverse,
                                Any partial) {
    return with_matrix(dy, [&](auto zero, Int rows, Int columns) {
        typedef decltype(zero) T;
        for (Any one : {gamma, dgamma, dbeta, inverse})
            if (!fits(one, TYPE<T>, columns)) return false;
        if (!fits(normalised, TYPE<T>, rows * columns)) return false;
        if (!has_room(partial, TYPE<T>, 2 * PARTS * columns)) return false;
        if (!(dx.is_none() || fits(dx, TYPE<T>, rows * columns))) return false;
        const T *from = data<T>(dy), *n = data<T>(normalised), *g = data<T>(gamma), *i = data<T>(inverse);
        T *dg = data<T>(dgamma), *db = data<T>(dbeta), *to = data<T>(dx), *sums = data<T>(partial);
        T* products = sums + PARTS * columns;
        const Table<T>& t = table<T>();
        nb::gil_scoped_release unlocked;
        const Int parts = parts_of(rows, 16);
        in_parts(rows, columns, parts, [&](Int part, Int first, Int last) {
            t.batch_norm_sums(n, from, sums + part * columns, products + part * columns, columns, first, last);
        });
        t.add_parts(sums, 1, db, parts, columns);
        t.add_parts(products, 1, dg, parts, columns);
        if (!to) return true;
        T *mean_dy = sums, *mean_product = sums + columns, *factor = products;  // reuse: the parts are summed already
        for (Int j = 0; j < columns; ++j) {
            mean_dy[j] = db[j] / rows;
            mean_product[j] = dg[j] / rows;
            factor[j] = g[j] * i[j];
        }
        in_pieces(rows, columns, [&](Int first, Int last) {
            t.batch_norm_gradient(n, from, factor, mean_dy, mean_product, to, columns, first, last);
        });
        return true;
    });
}

// --- dropout ---

static bool dropout(Any x, Any y, Any mask, Word seed, Word layer, Word step, Word number, double rate) {
    return with_matrix(x, [&](auto zero, Int rows, Int columns) {
        typedef decltype(zero) T;
        const Int n = rows * columns;
        if (!fits(y, TYPE<T>, n) || !fits(mask, TYPE<T>, n)) return false;
        const T* from = data<T>(x);
        T *to = data<T>(y), *kept = data<T>(mask);
        nb::gil_scoped_release unlocked;
        in_pieces(((Int)(number % 8) + n + 7) / 8, 8, [&](Int first, Int last) {
            table<T>().dropout(from, to, kept, seed, layer, step, number, (float)rate, (T)(1 / (1 - rate)), n, first,
                               last);
        });
        return true;
    });
}

// --- samples ---

static int stored_type(PyArrayObject* a) {
    switch (PyArray_DESCR(a)->kind) {
        case 'b':
        case 'u':
        case 'i': {
            const Int size = PyArray_ITEMSIZE(a);
            const int place = size == 1 ? 0 : size == 2 ? 2 : size == 4 ? 4 : 6;
            return place + (PyArray_DESCR(a)->kind == 'i');
        }
        case 'f':
            return PyArray_ITEMSIZE(a) == 2 ? 8 : PyArray_ITEMSIZE(a) == 4 ? 9 : PyArray_ITEMSIZE(a) == 8 ? 10 : -1;
        default:
            return -1;
    }
}

static void check_index(const Int* at, Int rows, Int samples) {
    for (Int row = 0; row < rows; ++row)
        if (at[row] < 0 || at[row] >= samples) {
            const std::string range = "[0, " + std::to_string(samples) + ")";
            throw nb::index_error(("gather: index must be in " + range + ", got " + std::to_string(at[row])).c_str());
        }
}

// Labels, of integers, are copied: scale must be 1 and shift 0.
static bool gather(Any source, Any index, Any out, double scale, double shift) {
    PyArrayObject *s = array(source), *i = array(index), *o = array(out);
    if (!s || !i || !o || !PyArray_ISCARRAY_RO(s) || !PyArray_ISCARRAY(o) || PyArray_NDIM(s) < 1) return false;
    const Int samples = PyArray_DIM(s, 0), rows = PyArray_SIZE(i);
    const Int columns = samples ? PyArray_SIZE(s) / samples : 0;
    const int type = stored_type(s);
    if (type < 0 || !fits(index, NPY_INT64, rows) || PyArray_SIZE(o) != rows * columns) return false;
    const Int* at = data<Int>(index);
    const char* from = PyArray_BYTES(s);
    if (PyArray_ISINTEGER(o)) {
        const Int bytes = columns * PyArray_ITEMSIZE(s);
        char* to = PyArray_BYTES(o);
        if (PyArray_TYPE(o) != PyArray_TYPE(s) || scale != 1 || shift != 0) return false;
        return made({source, index, out}, [=] {
            check_index(at, rows, samples);
            for (Int row = 0; row < rows; ++row) std::memcpy(to + row * bytes, from + at[row] * bytes, bytes);
        });
    }
    if (PyArray_TYPE(o) != NPY_FLOAT && PyArray_TYPE(o) != NPY_DOUBLE) return false;
    return with_type(out, [&](auto zero) {
        typedef decltype(zero) T;
        T* to = data<T>(out);
        return made({source, index, out}, [=] {
            check_index(at, rows, samples);
            in_pieces(rows, columns, [&](Int first, Int last) {
                table<T>().gather[type](from, at, to, (T)scale, (T)shift, columns, first, last);
            });
        });
    });
}

// out[i] = the image of start + i under the permutation with these numbers, int64 (12,).
static bool permute(Any permutation, Int start, Any out) {
    PyArrayObject* o = array(out);
    if (!fits(permutation, NPY_INT64, 12) || !o || !PyArray_ISCARRAY(o)) return false;
    const Int count = PyArray_SIZE(o);
    if (!fits(out, NPY_INT64, count)) return false;
    const Word* numbers = data<Word>(permutation);
    Int* to = data<Int>(out);
    nb::gil_scoped_release unlocked;
    in_pieces(count, 8, [&](Int first, Int last) { level.kernels->permute(numbers, start, to, first, last); });
    return true;
}

// places[i] = the number there on one side of a split, int64; the side's numbers are int64 (14,).
static bool in_cells(Any side, Any places) {
    PyArrayObject* p = array(places);
    if (!fits(side, NPY_INT64, 14) || !p || !PyArray_ISCARRAY(p)) return false;
    const Int count = PyArray_SIZE(p);
    if (!fits(places, NPY_INT64, count)) return false;
    const Word* numbers = data<Word>(side);
    Int* to = data<Int>(places);
    nb::gil_scoped_release unlocked;
    in_pieces(count, 16, [&](Int first, Int last) { level.kernels->in_cells(numbers, to, first, last); });
    return true;
}

// call(zero of w's type, size of w, number of parts, their spans), where w is of float or double, and the parts between
// spans[i][0] and spans[i][1] are within it.
template <class Call>
static bool with_spans(Any w, Any spans, const Call& call) {
    PyArrayObject *a = array(w), *s = array(spans);
    if (!a || (PyArray_TYPE(a) != NPY_FLOAT && PyArray_TYPE(a) != NPY_DOUBLE)) return false;
    if (!s || !fits(spans, NPY_INT64, PyArray_SIZE(s))) return false;
    const Int n = PyArray_SIZE(a), parts = PyArray_SIZE(s) / 2, *span = data<Int>(spans);
    for (Int i = 0; i < parts; ++i)
        if (span[2 * i] < 0 || span[2 * i + 1] > n) return false;
    return with_type(w, [&](auto zero) { return call(zero, n, parts, span); });
}

// g += factor w on the parts of both that the spans name.
static bool l2_gradient(Any w, Any spans, double factor, Any g) {
    return with_spans(w, spans, [&](auto zero, Int n, Int parts, const Int* span) {
        typedef decltype(zero) T;
        if (!fits(w, TYPE<T>, n) || !fits(g, TYPE<T>, n) || !PyArray_ISWRITEABLE(array(g))) return false;
        const T* from = data<T>(w);
        T* to = data<T>(g);
        return made({w, spans, g}, [=] {
            for (Int i = 0; i < parts; ++i) {
                const Int start = span[2 * i];
                in_pieces(span[2 * i + 1] - start, 1, [&](Int first, Int last) {
                    table<T>().l2_gradient(from + start, (T)factor, to + start, first, last);
                });
            }
        });
    });
}

// loss += factor times the sum of the squares of the same parts of w; loss may be of double where w is of float.
static bool l2_loss(Any w, Any spans, double factor, Any loss) {
    return with_spans(w, spans, [&](auto zero, Int n, Int parts, const Int* span) {
        typedef decltype(zero) T;
        const bool wide = fits(loss, NPY_DOUBLE, 1);
        if (!fits(w, TYPE<T>, n) || !(wide || fits(loss, TYPE<T>, 1)) || !PyArray_ISWRITEABLE(array(loss))) return false;
        const T* from = data<T>(w);
        void* to = data<void>(loss);
        return made({w, spans, loss}, [=] {
            double total = 0;
            for (Int i = 0; i < parts; ++i) {
                const Int start = span[2 * i], size = span[2 * i + 1] - start, pieces = parts_of(size, 1 << 14);
                double sums[PARTS], not_finite[PARTS];
                in_parts(size, 1, pieces, [&](Int piece, Int first, Int last) {
                    table<T>().square_sum(from + start, sums + piece, not_finite + piece, first, last);
                });
                for (Int piece = 0; piece < pieces; ++piece) total += sums[piece];
            }
            if (wide) *static_cast<double*>(to) += factor * total;
            else *static_cast<T*>(to) += (T)(factor * total);
        });
    });
}

static bool square_sum(Any x, Any out) {
    PyArrayObject* a = array(x);
    if (!a || !PyArray_ISCARRAY_RO(a) || !has_room(out, NPY_DOUBLE, 2 + 2 * PARTS)) return false;
    if (PyArray_TYPE(a) != NPY_FLOAT && PyArray_TYPE(a) != NPY_DOUBLE) return false;
    return with_type(x, [&](auto zero) {
        typedef decltype(zero) T;
        const Int n = PyArray_SIZE(a), parts = parts_of(n, 1 << 14);
        const T* from = data<T>(x);
        double* found = data<double>(out);
        nb::gil_scoped_release unlocked;
        in_parts(n, 1, parts, [&](Int part, Int first, Int last) {
            table<T>().square_sum(from, found + 2 + part, found + 2 + PARTS + part, first, last);
        });
        for (Int part = 0; part < parts; ++part) {
            found[0] += found[2 + part];
            found[1] += found[2 + PARTS + part];
        }
        return true;
    });
}

// --- tensors of other libraries ---

// What DLPack 1 defines (dlpack.h), as far as it is used here.
struct DLTensor {
    void* data;
    std::int32_t device_type, device_id, ndim;
    std::uint8_t code, bits;
    std::uint16_t lanes;
    std::int64_t *shape, *strides;
    std::uint64_t byte_offset;
};

struct DLPackExchangeAPI {
    std::uint32_t major, minor;
    void *previous, *allocator, *managed_from_object, *managed_to_object;
    int (*tensor_from_object)(void* object, DLTensor* out);
};

// The C functions of a library's tensors, which have them as __dlpack_c_exchange_api__; null if they are another version's.
static const DLPackExchangeAPI* exchange_api(nb::handle capsule) {
    const void* pointer = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (!pointer) throw nb::python_error();
    const auto* api = static_cast<const DLPackExchangeAPI*>(pointer);
    return api->major == 1 ? api : nullptr;
}

static bool is_dense(const DLTensor& t) {
    return t.device_type == 1 && t.code == 2 && t.lanes == 1 && t.ndim <= NPY_MAXDIMS && (t.bits == 32 || t.bits == 64);
}

// A dense float32 or float64 tensor in main memory; false if it is something else.
static bool describe(const DLPackExchangeAPI* api, nb::handle tensor, DLTensor& t) {
    if (api->tensor_from_object(tensor.ptr(), &t)) {
        PyErr_Clear();
        return false;
    }
    return is_dense(t);
}

static char* address_of(const DLTensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

// NumPy's views of float32 or float64 tensors in main memory, by DLPack's C functions; None if one of them is something
// else. This takes a sixth of the time of a method's call for each tensor.
static nb::object tensor_views(nb::handle capsule, nb::list tensors) {
    const DLPackExchangeAPI* api = exchange_api(capsule);
    if (!api) return nb::none();
    nb::list views;
    for (nb::handle tensor : tensors) {
        DLTensor t;
        if (!describe(api, tensor, t)) return nb::none();
        npy_intp shape[NPY_MAXDIMS], strides[NPY_MAXDIMS];
        npy_intp contiguous = t.bits / 8;
        for (int i = t.ndim - 1; i >= 0; --i) {
            shape[i] = t.shape[i];
            strides[i] = t.strides ? t.strides[i] * t.bits / 8 : contiguous;
            contiguous *= t.shape[i];
        }
        nb::object view = nb::steal(PyArray_New(&PyArray_Type, t.ndim, shape, t.bits == 32 ? NPY_FLOAT : NPY_DOUBLE,
                                                strides, address_of(t), 0, NPY_ARRAY_WRITEABLE, nullptr));
        if (!view.is_valid()) throw nb::python_error();
        Py_INCREF(tensor.ptr());  // the view keeps the tensor
        if (PyArray_SetBaseObject(reinterpret_cast<PyArrayObject*>(view.ptr()), tensor.ptr()) < 0)
            throw nb::python_error();
        views.append(view);
    }
    return views;
}

// The parameters of an optimizer for another library's tensors, and where they, their state and their counts are. Each
// step compares all of it with what there is, and takes the addresses of the gradients. The objects are the caller's:
// here are no references to them, which Python's garbage collector would not see.
class Tensors {
  public:
    // update: the rule. exchange: as for tensor_views. grad: the descriptor of the attribute. is_negated: whether a
    // gradient has its sign in a bit that DLPack does not show. inner: where C++'s tensor is in its object, and the
    // addresses of the functions that is_negated and exchange call with that; empty if they are unknown. params:
    // contiguous tensors. arrays: for each (w, state ...), or None if it has no gradient. counts: for each the address of
    // its count of steps. row_of: for each its row of scalars.
    Tensors(nb::object update, nb::handle exchange, nb::object grad, nb::object is_negated,
            const std::vector<std::uintptr_t>& inner, nb::list params, nb::list arrays,
            const std::vector<std::uintptr_t>& counts, const std::vector<Int>& row_of)
        : owner(update), rule(nb::cast<const Update&>(update)), api(exchange_api(exchange)), grad(grad),
          is_negated(is_negated),
          apart(rule.reduces() || std::any_of(row_of.begin(), row_of.end(), [](Int row) { return row > 0; })) {
        usable = api != nullptr;
        if (inner.size() == 3) {
            inner_at = inner[0];
            inner_is_negated = reinterpret_cast<IsNegated*>(inner[1]);
            inner_describe = reinterpret_cast<Describe*>(inner[2]);
        }
        for (std::size_t i = 0; usable && i < nb::len(params); ++i) {
            DLTensor t;
            usable = describe(api, params[i], t) && described_alike(params[i], t);
            if (!usable) break;
            known.push_back({address_of(t), extents.size(), t.ndim, 1, arrays[i].is_none(),
                             (Int)(pieces.rows.size() / (rule.arrays + 1)), reinterpret_cast<Int*>(counts.at(i)),
                             row_of.at(i)});
            Known& one = known.back();
            extents.insert(extents.end(), t.shape, t.shape + t.ndim);
            for (int axis = 0; axis < t.ndim; ++axis) one.size *= t.shape[axis];
            if (one.idle) continue;
            const nb::tuple tuple = nb::cast<nb::tuple>(arrays[i]);
            Int address[Update::MOST_ARRAYS] = {};
            for (int j = 0; j < rule.arrays; ++j)
                if (j != 1) address[j] = reinterpret_cast<Int>(data<char>(tuple[j ? j - 1 : 0]));
            usable = is_like(t, one) && (one.size == 0 || address[0] == reinterpret_cast<Int>(one.at));
            rule.add(pieces, address, one.size, one.row, apart);
        }
    }

    // Update the parameters, and count the step. objects: the parameters, then of the state its keys, its values, and
    // what is in these. lists: those of the parameters. steps: for each row of scalars the count before. Returns False,
    // with nothing changed, if anything is not as it was, or a gradient is unsuitable.
    bool step(nb::list objects, nb::list lists, nb::handle state, const std::vector<Int>& steps, nb::list scalars,
              double scale) {
        if (!usable || busy || !same(objects, lists, state)) return false;
        std::vector<nb::object> gradients;  // references, until the update is done
        gradients.reserve(known.size());
        PlainType type = {};
        for (std::size_t i = 0; i < known.size(); ++i)
            if (!take(PyList_GET_ITEM(objects.ptr(), i), known[i], steps, type, gradients)) return false;
        struct Busy {
            bool& flag;
            Busy(bool& flag) : flag(flag) { flag = true; }
            ~Busy() { flag = false; }
        } during(busy);
        if (!rule.update(pieces, scalars, scale, apart)) return false;
        for (const Known& one : known)
            if (!one.idle) ++*one.count;
        return true;
    }

    bool usable;

  private:
    typedef bool IsNegated(const void* tensor);
    typedef void Describe(const void* tensor, DLTensor* out);

    struct Known {
        const char* at;
        std::size_t shape;  // where its extents are among all
        int ndim;
        Int size;
        bool idle;  // whether it has no gradient
        Int piece;  // the first of its pieces
        Int* count;
        Int row;
    };

    bool is_like(const DLTensor& t, const Known& one) const {
        if (t.bits / 8 != rule.item() || t.ndim != one.ndim) return false;
        const Int* shape = extents.data() + one.shape;
        Int contiguous = 1;
        for (int i = t.ndim - 1; i >= 0; --i) {
            if (t.shape[i] != shape[i]) return false;
            if (t.strides && t.shape[i] != 1 && t.strides[i] != contiguous && one.size) return false;
            contiguous *= t.shape[i];
        }
        return true;
    }

    static bool same(nb::list objects, nb::list lists, nb::handle state) {
        if (!PyDict_Check(state.ptr())) return false;
        const Py_ssize_t size = PyList_GET_SIZE(objects.ptr());
        Py_ssize_t i = 0;
        const auto next_is = [&](PyObject* object) { return i < size && PyList_GET_ITEM(objects.ptr(), i++) == object; };
        for (nb::handle list : lists) {
            if (!PyList_Check(list.ptr())) return false;
            for (Py_ssize_t j = 0; j < PyList_GET_SIZE(list.ptr()); ++j)
                if (!next_is(PyList_GET_ITEM(list.ptr(), j))) return false;
        }
        PyObject *key, *value, *name, *item;
        for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &key, &value);) {
            if (!next_is(key) || !next_is(value) || !PyDict_Check(value)) return false;
            for (Py_ssize_t inner = 0; PyDict_Next(value, &inner, &name, &item);)
                if (!next_is(item)) return false;
        }
        return i == size;
    }

    // A type of parameters, and whether their gradient is what the descriptor gives: a subclass may have its own.
    struct PlainType {
        PyTypeObject* type;
        bool plain;
    };

    // The gradient of a parameter, of the type that was asked last in most cases.
    nb::object gradient_of(nb::handle param, PlainType& last) const {
        PyTypeObject* type = Py_TYPE(param.ptr());
        const descrgetfunc get = Py_TYPE(grad.ptr())->tp_descr_get;
        if (type != last.type) {
            const nb::object found = nb::getattr(nb::handle((PyObject*)type), name);
            last = {type, get && found.is(grad) && type->tp_getattro == PyObject_GenericGetAttr};
        }
        nb::object g = nb::steal(last.plain ? get(grad.ptr(), param.ptr(), (PyObject*)type)
                                            : PyObject_GetAttr(param.ptr(), name.ptr()));
        if (!g.is_valid()) throw nb::python_error();
        return g;
    }

    const void* inner_of(nb::handle tensor) const { return reinterpret_cast<const char*>(tensor.ptr()) + inner_at; }

    // As describe(), at a quarter of its time: no reference is taken, which PyTorch does with Python's lock.
    bool describe_tensor(nb::handle tensor, bool plain, DLTensor& t) const {
        if (!plain || !inner_describe) return describe(api, tensor, t);
        try {
            inner_describe(inner_of(tensor), &t);
        } catch (...) {  // what DLPack has no form for, such as a sparse tensor
            return false;
        }
        return is_dense(t);
    }

    // Whether the function in libtorch says of a tensor what DLPack's interface said.
    bool described_alike(nb::handle tensor, const DLTensor& t) const {
        DLTensor other;
        return describe_tensor(tensor, true, other) && address_of(other) == address_of(t) && other.ndim == t.ndim &&
               other.bits == t.bits && std::equal(t.shape, t.shape + t.ndim, other.shape);
    }

    bool has_negated(nb::handle g, bool plain) const {
        if (plain && inner_is_negated) return inner_is_negated(inner_of(g));
        PyObject* argument = g.ptr();
        nb::object negated = nb::steal(PyObject_Vectorcall(is_negated.ptr(), &argument, 1, nullptr));
        if (!negated.is_valid()) throw nb::python_error();
        return negated.ptr() != Py_False;
    }

    // Check a parameter, and take the address of its gradient.
    bool take(nb::handle param, const Known& one, const std::vector<Int>& steps, PlainType& type,
              std::vector<nb::object>& gradients) {
        DLTensor t;
        nb::object g = gradient_of(param, type);
        if (!describe_tensor(param, type.plain, t) || address_of(t) != one.at) return false;
        if (one.idle || g.is_none()) return one.idle && g.is_none();
        if (!is_like(t, one) || *one.count != steps.at(one.row)) return false;
        if (!describe_tensor(g, type.plain, t) || !is_like(t, one)) return false;
        const Int from = reinterpret_cast<Int>(address_of(t));
        if (overlap(reinterpret_cast<Int>(one.at), from, one.size * rule.item())) return false;
        if (has_negated(g, type.plain)) return false;
        for (Int start = 0, piece = one.piece; start < one.size; start += Update::PIECE, ++piece)
            pieces.rows[piece * (rule.arrays + 1) + 1] = from + start * rule.item();
        gradients.push_back(std::move(g));
        return true;
    }

    nb::object owner;
    const Update& rule;
    const DLPackExchangeAPI* api;
    nb::object grad, is_negated;
    std::size_t inner_at = 0;
    IsNegated* inner_is_negated = nullptr;
    Describe* inner_describe = nullptr;
    nb::object name = nb::steal(PyUnicode_InternFromString("grad"));
    bool apart, busy = false;
    std::vector<Known> known;
    std::vector<Int> extents;  // of all parameters, one after another
    Pieces pieces;
};

// --- the module ---

NB_MODULE(_host, m) {
    nb::set_leak_warnings(false);  // objects that a traceback holds at exit would be reported to the user as leaks
    if (_import_array() < 0) throw nb::python_error();
    if (usable_levels().empty()) throw nb::import_error("this processor lacks SSE 4.2");
    use(usable_levels().back());
    m.attr("sources") = SOURCES;
    m.def("levels", usable_levels, "The SIMD levels that were built and that this processor supports.");
    m.def("level", [] { return std::string(level.name); }, "The SIMD level in use; initially the widest.");
    m.def("use", use, "Set the SIMD level, for tests.");
    m.def("threads", [] { return most_threads; }, "The maximal number of threads of a loop.");
    m.def("set_threads", [](int n) { most_threads = std::max(1, n); }, "Set the maximal number of threads of a loop.");
    m.def("place_of", place_of, "The place of a formula by its kind and digest; -1 if it is not built in.");
    m.def("add", add_own, "Add a formula by its kind, dtype and the addresses of its functions; returns its place.");
    nb::class_<Update>(m, "Update")
        .def(nb::init<Int, const std::string&, int, const Names&>())
        .def("run", &Update::run, nb::arg(), nb::arg(), nb::arg().none(), nb::arg())
        .def("run_ahead", [](nb::handle self, nb::list tuples, Any table, Any row_of, Any step) {
            return nb::cast<Update&>(self).run_ahead(self, tuples, table, row_of, step);
        }, nb::arg(), nb::arg(), nb::arg().none(), nb::arg());
    nb::class_<Tensors>(m, "Tensors")
        .def(nb::init<nb::object, nb::handle, nb::object, nb::object, const std::vector<std::uintptr_t>&, nb::list,
                      nb::list, const std::vector<std::uintptr_t>&, const std::vector<Int>&>())
        .def_ro("usable", &Tensors::usable)
        .def("step", &Tensors::step);
    m.def("use_blas", use_blas,
          "Set the addresses of OpenBLAS's functions, whether its integers have 64 bits, and whether it has code for "
          "small products.");
    m.def("multiply", noted(multiply), "Write the product of two matrices to a third one.");
    nb::class_<Recording>(m, "Recording")
        .def(nb::init<>())
        .def("begin", &Recording::begin)
        .def("end", &Recording::end)
        .def("size", &Recording::size)
        .def("run", &Recording::run);
    nb::class_<Crew>(m, "Crew").def(nb::init<>()).def("size", &Crew::size).def("report", &Crew::report);
    m.def("activate", noted(activate), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg().none());
    m.def("activation_gradient", noted(activation_gradient), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(),
          nb::arg().none(), nb::arg().none(), nb::arg().none());
    m.def("weigh", noted(weigh), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg());
    m.def("softmax_cross_entropy", noted(softmax_cross_entropy), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg(),
          nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg());
    m.def("softmax_focal", noted(softmax_focal), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
          nb::arg().none(), nb::arg(), nb::arg().none());
    m.def("score_loss", noted(score_loss), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
          nb::arg(), nb::arg().none(), nb::arg().none());
    m.def("svm", noted(svm), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(),
          nb::arg());
    m.def("normalise", noted(normalise));
    m.def("batch_norm", noted(batch_norm));
    m.def("batch_norm_gradient", noted(batch_norm_gradient), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
          nb::arg(), nb::arg(), nb::arg());
    m.def("dropout", noted(dropout));
    m.def("gather", noted(gather));
    m.def("permute", permute);
    m.def("in_cells", in_cells);
    m.def("l2_gradient", noted(l2_gradient));
    m.def("l2_loss", noted(l2_loss));
    m.def("next_rows", noted(next_rows));
    m.def("add_to", noted(add_to));
    m.def("square_sum", noted(square_sum));
    m.def("tensor_views", tensor_views, "NumPy's views of tensors by DLPack's C functions, or None.");
}
