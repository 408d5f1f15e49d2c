// Runs a kernel: block after block, and the threads of a block in turns.
//
// Threads that never wait for each other run one after another. Others are fibers, each with a stack of its own: one
// runs until it waits, for lanes of its warp or for its block, and then the next. What a thread wrote, another sees
// only behind a barrier, or where the order of the threads happens to put it first; shared and local memory begin as
// ones in every bit, which are NaN and -1, not as zeros.
#include "thread.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>
#include <vector>

#ifndef __x86_64__
#error "the emulated GPU switches between threads by instructions of x86-64; this is another processor"
#endif

namespace {

constexpr u32 WARP = 32, MOST_THREADS = 1024, BARRIERS = 16;
constexpr size_t PAGE = 1 << 12, STACK = 33 * PAGE;  // of each fiber; pages that are never touched cost nothing

// --- fibers ----------------------------------------------------------------------------------------------------------

// Saves the registers that a call keeps on the stack, its pointer in *from, and goes on at `to`, saved so before.
extern "C" void emulated_switch(void** from, void* to);
asm(R"(
.text
.local emulated_switch
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmp *%rcx  # not ret: the processor would foretell where that goes from the calls, and be wrong each time
)");

// Stacks with a page below each that may not be touched, kept for the next launch of this host thread.
class Stacks {
  public:
    // What emulated_switch goes on at to begin `entry` on stack `i`.
    void* fresh(u32 i, void (*entry)()) {
        if (!memory_) reserve();
        // Not all at one place modulo a power of two: they would push each other out of the processor's caches.
        void** top = reinterpret_cast<void**>(memory_ + (i + 1) * STACK - i / 16 % 32 * 64);
        *--top = nullptr;  // where entry would return to; and a call leaves the stack 8 bytes off 16
        *--top = reinterpret_cast<void*>(entry);
        for (int kept = 0; kept < 6; kept++) *--top = nullptr;
        return top;
    }

    ~Stacks() {
        if (memory_) munmap(memory_, MOST_THREADS * STACK);
    }

  private:
    char* memory_ = nullptr;

    void reserve() {
        void* memory = mmap(nullptr, MOST_THREADS * STACK, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) {
            fprintf(stderr, "emulated GPU: there is no memory for the stacks of %u threads\n", MOST_THREADS);
            abort();
        }
        memory_ = static_cast<char*>(memory);
        for (u32 i = 0; i < MOST_THREADS; i++) mprotect(memory_ + i * STACK, PAGE, PROT_NONE);
    }
};

thread_local Stacks stacks;

// --- one launch ------------------------------------------------------------------------------------------------------

enum State { READY, AT_BARRIER, IN_EXCHANGE, EXITED };

struct Fiber : Thread {
    class Run* run;
    void* stack_pointer;
    State state;
    u32 at;         // the instruction that it waits at
    u32 mask;       // of an exchange
    u32 id, trues;  // of a barrier; for how many threads its predicate was true
};

struct Waiting {  // at one of the block's barriers
    u32 arrived, expected, trues;  // expected 0: every thread that has not exited
    u32 at;                        // the instruction that one of them waits at
    bool aligned;
    u32 lanes[MOST_THREADS / WARP];  // that have arrived, of each warp
};

class Run {
  public:
    explicit Run(const Launch& launch)
        : launch_(launch),
          threads_(launch.block.x * launch.block.y * launch.block.z),
          ranges_(launch.instruction_count, Range{0, 0}),
          shared_(launch.static_shared + 16 + launch.dynamic_shared + 256),
          local_((launch.waits ? threads_ : 1) * launch.local_bytes + 16),
          fibers_(launch.waits ? threads_ : 1) {}

    const char* run();
    [[noreturn]] void trap(Fiber& me, u32 at, const char* sentence);
    Exchange exchange(Fiber& me, u32 at, u32 mask, u64 value);
    u32 arrive(Fiber& me, u32 at, Barrier kind, bool aligned, u32 id, u32 count, bool predicate);

  private:
    const Launch& launch_;
    const u32 threads_;
    std::vector<Range> ranges_;
    std::vector<char> shared_, local_;
    std::vector<Fiber> fibers_;
    Waiting barriers_[BARRIERS];
    u32 exited_ = 0;  // threads of the block
    u64 given_[MOST_THREADS], seen_[MOST_THREADS];  // in exchanges, by each thread; what an exchange shows
    void* scheduler_ = nullptr;
    bool wrong_ = false;

    Index block(u64 i) const;
    void begin(Fiber& me, u32 number);
    void run_plainly();
    void run_block(Index block);
    bool run_warp(u32 first);
    bool finish_exchanges(u32 first);
    bool finish_barrier(u32 id);
    void note(const Fiber& fiber, u32 at, const char* sentence);
    void in_vain();

    static void thread();
    static void all_threads();
};

thread_local Fiber* running;  // that begins
thread_local char error[1024];

Index place(u64 i, Index size) {
    return {static_cast<u32>(i % size.x), static_cast<u32>(i / size.x % size.y), static_cast<u32>(i / size.x / size.y)};
}

const char* Run::run() {
    error[0] = 0;
    if (!threads_ || threads_ > MOST_THREADS) return "a block has 1 to 1024 threads";
    char* shared = shared_.data() + (256 - reinterpret_cast<u64>(shared_.data()) % 256);
    char* local = local_.data() + (16 - reinterpret_cast<u64>(local_.data()) % 16);
    for (size_t i = 0; i < fibers_.size(); i++) {
        static_cast<Thread&>(fibers_[i]) = {};
        fibers_[i].run = this;
        fibers_[i].launch = &launch_;
        fibers_[i].shared = shared;
        fibers_[i].shared_bytes = launch_.dynamic_shared
                                      ? ((launch_.static_shared + 15) & ~15ull) + launch_.dynamic_shared
                                      : launch_.static_shared;
        fibers_[i].local = local + i * launch_.local_bytes;
        fibers_[i].local_end = fibers_[i].local + launch_.local_bytes;
        fibers_[i].ranges = ranges_.data();
    }
    const u32 control = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(0x1f80);  // to the nearest, subnormal numbers kept, whatever the host thread has set
    if (!launch_.waits) {
        running = &fibers_[0];
        emulated_switch(&scheduler_, stacks.fresh(0, all_threads));
    } else {
        const u64 blocks = u64(launch_.grid.x) * launch_.grid.y * launch_.grid.z;
        for (u64 i = 0; i < blocks && !wrong_; i++) run_block(block(i));
    }
    __builtin_ia32_ldmxcsr(control);
    return wrong_ ? error : nullptr;
}

Index Run::block(u64 i) const {
    const u64 blocks = u64(launch_.grid.x) * launch_.grid.y * launch_.grid.z;
    return place(launch_.hooks->reverse ? blocks - 1 - i : i, launch_.grid);
}

void Run::begin(Fiber& me, u32 number) {
    me.number = number;
    me.tid = place(number, launch_.block);
    me.lane = number % WARP;
    me.local_free = me.local;
}

// --- threads that do not wait ----------------------------------------------------------------------------------------

void Run::all_threads() {
    Fiber& me = *running;
    me.run->run_plainly();
    emulated_switch(&me.stack_pointer, me.run->scheduler_);
}

void Run::run_plainly() {
    Fiber& me = fibers_[0];
    const u64 blocks = u64(launch_.grid.x) * launch_.grid.y * launch_.grid.z;
    for (u64 i = 0; i < blocks; i++) {
        me.ctaid = block(i);
        memset(me.shared, 0xFF, me.shared_bytes);
        for (u32 j = 0; j < threads_; j++) {
            begin(me, launch_.hooks->reverse ? threads_ - 1 - j : j);
            launch_.run(me);
        }
    }
}

// --- threads that wait -----------------------------------------------------------------------------------------------

void Run::thread() {
    Fiber& me = *running;
    me.launch->run(me);
    me.state = EXITED;
    me.run->exited_++;
    emulated_switch(&me.stack_pointer, me.run->scheduler_);
}

void Run::run_block(Index block) {
    memset(fibers_[0].shared, 0xFF, fibers_[0].shared_bytes);
    memset(barriers_, 0, sizeof barriers_);
    exited_ = 0;
    for (u32 i = 0; i < threads_; i++) {
        begin(fibers_[i], i);
        fibers_[i].ctaid = block;
        fibers_[i].state = READY;
        fibers_[i].stack_pointer = stacks.fresh(i, thread);
    }
    const u32 warps = (threads_ + WARP - 1) / WARP;
    for (;;) {
        bool moved = false;
        for (u32 i = 0; i < warps && !wrong_; i++)
            moved |= run_warp(WARP * (launch_.hooks->reverse ? warps - 1 - i : i));
        if (wrong_) return;
        for (u32 id = 0; id < BARRIERS; id++) moved |= finish_barrier(id);  // threads that exit are waited for no more
        if (wrong_ || exited_ == threads_) return;
        if (!moved) return in_vain();
    }
}

// Runs the threads of a warp until each waits for another warp; false if none could run.
bool Run::run_warp(u32 first) {
    const u32 lanes = std::min(WARP, threads_ - first);
    bool moved = false;
    Fiber*& now = running;
    do {
        for (u32 i = 0; i < lanes; i++) {
            Fiber& fiber = fibers_[first + (launch_.hooks->reverse ? lanes - 1 - i : i)];
            if (fiber.state != READY) continue;
            moved = true;
            now = &fiber;
            emulated_switch(&scheduler_, fiber.stack_pointer);
            if (wrong_) return true;
        }
    } while (finish_exchanges(first));
    return moved;
}

Exchange Run::exchange(Fiber& me, u32 at, u32 mask, u64 value) {
    if (!(mask >> me.lane & 1)) emulated_trap(me, at, "lane %u is not in its mask %#x", me.lane, mask);
    me.at = at;
    me.mask = mask;
    me.state = IN_EXCHANGE;
    given_[me.number] = value;
    emulated_switch(&me.stack_pointer, scheduler_);
    return {me.mask, seen_ + me.number / WARP * WARP};
}

// Lets those go on whose mask has no lane any more that neither waits with the same mask at the same place nor exited.
bool Run::finish_exchanges(u32 first) {
    const u32 lanes = std::min(WARP, threads_ - first);
    bool finished = false;
    for (u32 i = 0; i < lanes; i++) {
        const Fiber& one = fibers_[first + i];
        if (one.state != IN_EXCHANGE) continue;
        u32 participants = 0, missing = 0;
        for (u32 j = 0; j < lanes; j++) {
            const Fiber& other = fibers_[first + j];
            if (!(one.mask >> j & 1) || other.state == EXITED) continue;
            const bool here = other.state == IN_EXCHANGE && other.mask == one.mask && other.at == one.at;
            (here ? participants : missing) |= 1u << j;
        }
        if (missing) continue;
        finished = true;
        for (u32 j = 0; j < lanes; j++) {
            if (!(participants >> j & 1)) continue;
            seen_[first + j] = given_[first + j];
            fibers_[first + j].state = READY;
            fibers_[first + j].mask = participants;
        }
    }
    return finished;
}

u32 Run::arrive(Fiber& me, u32 at, Barrier kind, bool aligned, u32 id, u32 count, bool predicate) {
    if (id >= BARRIERS) emulated_trap(me, at, "there is no barrier %u", id);
    if (count % WARP) emulated_trap(me, at, "%u threads are not whole warps", count);
    Waiting& barrier = barriers_[id];
    if (barrier.arrived && barrier.expected != count)
        emulated_trap(me, at, "others wait here for %u threads, not %u", barrier.expected, count);
    barrier.arrived++;
    barrier.expected = count;
    barrier.trues += predicate;
    barrier.aligned |= aligned;
    barrier.at = at;
    barrier.lanes[me.number / WARP] |= 1u << me.lane;
    me.at = at;
    me.id = id;
    if (kind == SYNC) me.state = AT_BARRIER;
    finish_barrier(id);
    if (me.state != READY || wrong_) emulated_switch(&me.stack_pointer, scheduler_);
    return me.trues;
}

// Lets those go on who wait at a barrier, if no more are to come. At an aligned one all of a warp must arrive, but for
// those that have left the kernel: since Volta they need not.
bool Run::finish_barrier(u32 id) {
    Waiting& barrier = barriers_[id];
    if (!barrier.arrived || barrier.arrived < (barrier.expected ? barrier.expected : threads_ - exited_)) return false;
    for (u32 i = 0; i < threads_; i++) {
        Fiber& fiber = fibers_[i];
        const u32 arrived = barrier.lanes[i / WARP];
        if (fiber.state == AT_BARRIER && fiber.id == id) {
            fiber.state = READY;
            fiber.trues = barrier.trues;
        } else if (barrier.aligned && arrived && !(arrived >> i % WARP & 1) && fiber.state != EXITED) {
            note(fiber, barrier.at, "the thread is not here, others of its warp are");
        }
    }
    barrier = {};
    return true;
}

// Says which threads wait, and where: of each instruction, the first thread.
void Run::in_vain() {
    int length = snprintf(error, sizeof error, "%s: threads wait for each other in vain:", launch_.kernel);
    std::vector<u32> told;
    for (const Fiber& f : fibers_) {
        if (f.state == EXITED || std::count(told.begin(), told.end(), f.at) || length > int(sizeof error) - 200) continue;
        told.push_back(f.at);
        length += snprintf(error + length, sizeof error - length, " thread (%u, %u, %u) of block (%u, %u, %u) at %s;",
                           f.tid.x, f.tid.y, f.tid.z, f.ctaid.x, f.ctaid.y, f.ctaid.z, launch_.instructions[f.at]);
    }
    wrong_ = true;
}

void Run::note(const Fiber& fiber, u32 at, const char* sentence) {
    if (wrong_) return;
    snprintf(error, sizeof error, "%s: thread (%u, %u, %u) of block (%u, %u, %u) at %s: %s", launch_.kernel, fiber.tid.x,
             fiber.tid.y, fiber.tid.z, fiber.ctaid.x, fiber.ctaid.y, fiber.ctaid.z, launch_.instructions[at], sentence);
    wrong_ = true;
}

void Run::trap(Fiber& me, u32 at, const char* sentence) {
    note(me, at, sentence);
    emulated_switch(&me.stack_pointer, scheduler_);  // and never comes back
    abort();
}

}  // namespace

// --- what generated code calls ---------------------------------------------------------------------------------------

extern "C" {

const char* emulated_launch(const Launch& launch) {
    if (!(launch.grid.x && launch.grid.y && launch.grid.z)) return "a grid without blocks";
    return Run(launch).run();
}

void emulated_trap(Thread& me, u32 at, const char* format, ...) {
    char sentence[300];
    va_list values;
    va_start(values, format);
    vsnprintf(sentence, sizeof sentence, format, values);
    va_end(values);
    Fiber& fiber = static_cast<Fiber&>(me);
    fiber.run->trap(fiber, at, sentence);
}

void emulated_find_range(Thread& me, u32 at, u64 address, u32 bytes) {
    u64 first = 0, last = 0;
    if (!me.launch->hooks->range(address, &first, &last)) {
        last = 0;
        for (u32 i = 0; i < me.launch->variable_count; i++) {
            const ModuleVariable& variable = me.launch->variables[i];
            if (address - reinterpret_cast<u64>(variable.address) >= variable.size) continue;
            first = reinterpret_cast<u64>(variable.address);
            last = first + variable.size;
        }
    }
    if (!last) emulated_trap(me, at, "%u bytes at %#lx are in no allocation", bytes, address);
    if (last - address < bytes)
        emulated_trap(me, at, "%u bytes at %#lx are not within the %lu bytes from %#lx", bytes, address, last - first, first);
    if (address & (bytes - 1)) emulated_trap(me, at, "%u bytes at %#lx: misaligned", bytes, address);
    me.ranges[at] = {first, last - first};
}

Exchange emulated_exchange(Thread& me, u32 at, u32 mask, u64 value) {
    Fiber& fiber = static_cast<Fiber&>(me);
    return fiber.run->exchange(fiber, at, mask, value);
}

u32 emulated_barrier(Thread& me, u32 at, Barrier kind, bool aligned, u32 id, u32 count, bool predicate) {
    Fiber& fiber = static_cast<Fiber&>(me);
    return fiber.run->arrive(fiber, at, kind, aligned, id, count, predicate);
}
}
