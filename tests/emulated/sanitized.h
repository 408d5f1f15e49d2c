// A program around one launch, since the sanitizers cannot be loaded into Python; see `sanitized` in tests/emulate.py.
// Every array gets an allocation of its own, which ends where the array ends; the array starts as far behind a multiple
// of 16 bytes as it did in Python, so what is misaligned there is so here.
#include "grid.h"
#include <vector>

struct Array {
    unsigned long long was, bytes, is_table;  // its address in Python, its size, whether it holds addresses of others
    char *start, *now;                        // of the allocation, of the array in it
};

struct Argument {
    emulated::Value value;
    long long array;  // its number, or -1: the argument is `value`
};

constexpr char GAP = 0x5A;  // before an array that does not start at a multiple of 16 bytes

static void read(void* to, size_t bytes) {
    if (bytes && fread(to, bytes, 1, stdin) != 1) abort();
}

static void relocate(unsigned long long* table, const std::vector<Array>& arrays) {
    for (const Array& array : arrays)
        if (*table - array.was < array.bytes) {
            *table += (unsigned long long)array.now - array.was;
            return;
        }
}

int main() {
    unsigned long long blocks_x, blocks_y, threads, reverse, n, m;
    for (auto* x : {&blocks_x, &blocks_y, &threads, &reverse, &n, &m}) read(x, sizeof *x);
    std::vector<Array> arrays(n);
    for (Array& array : arrays) {
        read(&array, 3 * sizeof array.was);
        const size_t gap = array.was % 16;
        array.start = (char*)malloc(gap + array.bytes);
        array.now = array.start + gap;
        memset(array.start, GAP, gap);
        read(array.now, array.bytes);
    }
    for (const Array& array : arrays)
        for (size_t i = 0; array.is_table && i < array.bytes; i += 8)
            relocate((unsigned long long*)(array.now + i), arrays);
    std::vector<emulated::Value> values(m);
    for (auto& value : values) {
        Argument argument;
        read(&argument, sizeof argument);
        value = argument.value;
        if (argument.array >= 0) value.integer = (long long)arrays[argument.array].now;
    }

    if (const char* error = emulate(values.data(), blocks_x, blocks_y, threads, reverse)) {
        fprintf(stderr, "%s\n", error);
        return 1;
    }

    for (const Array& array : arrays) {
        for (const char* at = array.start; at < array.now; ++at)
            if (*at != GAP) {
                fprintf(stderr, "%td bytes before array %td were written\n", array.now - at, &array - arrays.data());
                return 1;
            }
        fwrite(array.now, 1, array.bytes, stdout);
    }
    return 0;
}
