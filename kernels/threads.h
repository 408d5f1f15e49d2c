// A thread pool for loops. Idle threads sleep: a spinning thread would take a core from the threads of NumPy's BLAS.
#pragma once

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

class Pool {
  public:
    // body(part) for parts 0 to parts - 1, on at most `workers` threads, the caller's included. A concurrent caller
    // runs its parts alone.
    template <class Body>
    void run(long long parts, int workers, const Body& body) {
        std::unique_lock<std::mutex> turn(one_at_a_time, std::try_to_lock);
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
        }
        if (sleepers) wake.notify_all();
        work(0);
        // No part is left: threads that have not begun need not begin.
        std::unique_lock<std::mutex> lock(state);
        wanted = 0;
        done.wait(lock, [this] { return busy == 0; });
    }

  private:
    // How long a thread polls for the next job before it sleeps; shorter than waking it takes.
    static constexpr std::chrono::microseconds AWAKE{20};

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    // Run the thread's own share first, since its parts may still be in its cache from the last call; then steal parts
    // that the others have not begun.
    void work(int thread) {
        for (int i = 0; i < shares; ++i) {
            Share& s = share[(thread + i) % shares];
            for (long long part; (part = s.next.fetch_add(1, std::memory_order_relaxed)) < s.end;) job(job_data, part);
        }
    }

    int start(int count) {
        count = count < MOST ? count : MOST - 1;
        try {
            for (; started < count; ++started) std::thread([this, thread = started + 1] { loop(thread); }).detach();
        } catch (const std::system_error&) {  // at the system's limit: work with fewer
            return started;
        }
        return count;
    }

    void loop(int thread) {
        std::unique_lock<std::mutex> lock(state);
        for (unsigned long long seen = 0;;) {
            lock.unlock();
            const auto until = std::chrono::steady_clock::now() + AWAKE;
            while (job_number.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until)
                pause();
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
    std::atomic<unsigned long long> job_number{0};
    int wanted = 0, busy = 0, started = 0, asleep = 0;
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
