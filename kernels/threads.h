// A thread pool for loops. Idle threads sleep, and none is woken where others use the cores: a loop that waits for a
// thread which does not run takes milliseconds.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#if defined(__linux__)
#include <sched.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

// The number of processors that this process may use.
inline int processors() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    const unsigned found = std::thread::hardware_concurrency();
    return found ? (int)found : 1;
}

inline double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// How many threads work on a loop, chosen by what the last loops gained from them, in seconds against half as many
// threads. Where they lose, half of them are left out for a while, longer and longer as trials fail.
class Crew {
  public:
    // The number of threads for a loop that begins at `time` and is worth `most`.
    int size(double time, int most) {
        if (limit >= most) return most;
        if (time >= next_trial) {
            limit = std::min(2 * limit, most);
            since = time;
        }
        return limit;
    }

    // A loop on `threads` ended at `time` and took so many seconds; half of them would have taken about `by_half`.
    void report(double time, int threads, double seconds, double by_half) {
        credit = std::min(credit + by_half - seconds, MOST_CREDIT);
        if (credit >= 0) return;
        rest = time - since > LASTING * rest ? std::max(rest / 2, SHORTEST) : std::min(2 * rest, LONGEST);
        limit = std::max(1, threads / 2);
        next_trial = time + rest;
        credit = FIRST_CREDIT;
    }

  private:
    static constexpr double FIRST_CREDIT = 3e-4, MOST_CREDIT = 2e-3;  // a wait that happens once changes nothing
    static constexpr double SHORTEST = 4e-3, LONGEST = 0.25;  // between trials: a failed one costs a few milliseconds
    static constexpr double LASTING = 10;  // a trial has succeeded if it lasts so many times as long as the rest before
    int limit = 1 << 30;
    double credit = MOST_CREDIT, since = 0, next_trial = 0, rest = SHORTEST;
};

class Pool {
  public:
    // body(part) for parts 0 to parts - 1, on at most `workers` threads, the caller's included. A concurrent caller
    // runs its parts alone.
    template <class Body>
    void run(long long parts, int workers, const Body& body) {
        std::unique_lock<std::mutex> turn(one_at_a_time, std::defer_lock);
        double began = 0;
        if (parts > 1 && workers > 1 && turn.try_lock()) workers = crew.size(began = now(), workers);
        if (parts <= 1 || workers <= 1 || !turn.owns_lock()) {
            for (long long part = 0; part < parts; ++part) body(part);
            return;
        }
        const int helpers = start(workers - 1);
        int sleepers;
        {
            std::lock_guard<std::mutex> lock(state);
            job = [](const void* f, long long part) { (*static_cast<const Body*>(f))(part); };
            job_data = &body;
            shares = helpers + 1;
            for (int i = 0; i < shares; ++i) {
                share[i].next.store(parts * i / shares, std::memory_order_relaxed);
                share[i].end = parts * (i + 1) / shares;
            }
            wanted = helpers;
            busy = 0;
            job_number.store(job_number + 1, std::memory_order_release);
            sleepers = asleep;
            keep_off(started);
        }
        for (int i = std::min(helpers, sleepers); i > 0; --i) wake.notify_one();
        const long long own = work(0);
        const double alone = own ? (now() - began) * (double)parts / (double)own : 0;
        {
            std::lock_guard<std::mutex> lock(state);
            wanted = 0;  // no part is left: threads that have not begun need not begin
        }
        if (!poll([this] { return busy == 0; })) {
            std::unique_lock<std::mutex> lock(state);
            done.wait(lock, [this] { return busy == 0; });
        }
        const double time = now();
        crew.report(time, helpers + 1, time - began, own ? alone / std::max(1, (helpers + 1) / 2) : time - began);
    }

  private:
    static constexpr double AWAKE = 6e-5;  // seconds; sleeping and being woken take about half of that

    // Polls for a while whether something has happened.
    template <class Happened>
    static bool poll(const Happened& happened) {
        for (const double until = now() + AWAKE; now() < until;) {
            if (happened()) return true;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
        return happened();
    }

    // Run the thread's own share first, since its parts may still be in its cache from the last call; then steal parts
    // that the others have not begun. Returns how many it ran.
    long long work(int thread) {
        long long own = 0;
        for (int i = 0; i < shares; ++i) {
            Share& s = share[(thread + i) % shares];
            for (long long part; (part = s.next.fetch_add(1, std::memory_order_relaxed)) < s.end; ++own)
                job(job_data, part);
        }
        return own;
    }

#if defined(__linux__)
    static constexpr int FEW = 8;  // helpers; where there are more, so are processors

    // Keep the helpers off the caller's processor: a scheduler may wake them there, to take turns with it, while another
    // processor is idle.
    void keep_off(int count) {
        const int here = sched_getcpu();
        if (count > FEW || (here == caller_at && placed >= count)) return;
        cpu_set_t allowed;
        if (here < 0 || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
        CPU_CLR(here, &allowed);
        if (CPU_COUNT(&allowed) == 0) return;
        for (int i = here == caller_at ? placed : 0; i < count; ++i)
            pthread_setaffinity_np(thread_of[i], sizeof allowed, &allowed);
        caller_at = here, placed = count;
    }
#else
    void keep_off(int) {}
#endif

    int start(int count) {
        count = count < MOST ? count : MOST - 1;
        try {
            for (; started < count; ++started) {
                std::thread thread([this, thread = started + 1] { loop(thread); });
                thread_of[started] = thread.native_handle();
                thread.detach();
            }
        } catch (const std::system_error&) {  // at the system's limit: work with fewer
            return started;
        }
        return count;
    }

    void loop(int thread) {
        std::unique_lock<std::mutex> lock(state);
        for (unsigned long long seen = 0;;) {
            lock.unlock();
            poll([&] { return job_number.load(std::memory_order_acquire) != seen; });
            lock.lock();
            ++asleep;
            wake.wait(lock, [&] { return wanted > 0 && job_number != seen; });
            --asleep;
            seen = job_number;
            --wanted;
            ++busy;
            lock.unlock();
            work(thread);
            lock.lock();
            if (--busy == 0) done.notify_one();
        }
    }

    std::mutex one_at_a_time, state;
    std::condition_variable wake, done;
    void (*job)(const void*, long long) = nullptr;
    const void* job_data = nullptr;
    static constexpr int MOST = 256;
    struct alignas(64) Share {
        std::atomic<long long> next{0};
        long long end = 0;
    };
    Share share[MOST];
    int shares = 0;
    std::thread::native_handle_type thread_of[MOST];
    int caller_at = -1, placed = 0;  // the processor that helpers keep off, and how many know it
    std::atomic<unsigned long long> job_number{0};
    std::atomic<int> busy{0};  // threads at work; written with the lock held
    int wanted = 0, started = 0, asleep = 0;
    Crew crew;
};

// The process's pool. It is never destroyed, because its threads may outlive main. A forked child has none of its
// parent's threads, so it makes a new pool.
inline Pool& pool() {
    static std::atomic<Pool*> current{nullptr};
    static std::once_flag once;
    std::call_once(once, [] {
        current = new Pool;
#if !defined(_WIN32)
        pthread_atfork(nullptr, nullptr, [] { current = new Pool; });
#endif
    });
    return *current;
}
