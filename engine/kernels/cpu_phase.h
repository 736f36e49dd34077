// A phase of parallel work: tasks that threads take one by one, done when all tasks are done.
//
// That is not a barrier: nobody waits for a thread that has taken no task. On a machine whose cores are shared with other
// processes (or this one's Python threads) a barrier costs a time slice whenever one thread is not running; here the
// others do its part, and it walks through the finished phases when it comes back.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

namespace quire {

constexpr int SPINS = 300;  // about 15 µs, then the core is offered to whoever waits for it

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

class Phase {
  public:
    // Takes tasks 0 … count - 1 as long as there are any, then waits for those that others took.
    template <class F>
    void run(int64_t count, F task) {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) {
            task(i);
            done_.fetch_add(1, std::memory_order_release);
        }
        for (int spins = 0; done_.load(std::memory_order_acquire) < count; spins++) {
            if (spins >= SPINS)
                sched_yield();
            else
                pause();
        }
    }

    // The same for `size` items in runs of `chunk`: task(first, end).
    template <class F>
    void run_chunks(int64_t size, int64_t chunk, F task) {
        run((size + chunk - 1) / chunk, [&](int64_t i) {
            task(i * chunk, (i + 1) * chunk < size ? (i + 1) * chunk : size);
        });
    }

  private:
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int64_t> done_{0};
};

}  // namespace quire
