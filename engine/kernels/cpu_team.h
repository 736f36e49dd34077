// Threads that help with a piece of work as they come, for code that is made of phases (cpu_phase.h).
//
// The caller does the work itself and never waits for a helper to arrive or to leave: it returns when its own walk through
// the phases is over, which is when all tasks are done. That is why this is not OpenMP: the end of an OpenMP region waits
// for every thread, and one whose core another process has (or a page's Python thread of this one) costs a time slice.
// A late helper may walk through the finished phases after the caller has returned; so work owns all that it reads
// outside of its tasks.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "cpu_phase.h"

namespace quire {

constexpr int IDLE_SPINS = 2000;  // about 100 µs: the next call of the same step comes sooner

class Team {
  public:
    struct Work {
        virtual void walk() = 0;
        virtual ~Work() = default;
    };

    // One for the process, never destroyed: its threads end with the process.
    static Team& of_process() {
        static Team* team = new Team;
        return *team;
    }

    void run(const std::shared_ptr<Work>& work, int64_t num_helpers) {
        int64_t asleep;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            for (; num_threads_ < num_helpers; num_threads_++) start_helper();
            offers_.push_back({work, num_helpers});
            num_offers_.store(int64_t(offers_.size()), std::memory_order_release);
            asleep = num_asleep_;
        }
        for (int64_t i = std::min(asleep, num_helpers); i > 0; i--) called_.notify_one();
        work->walk();
        std::lock_guard<std::mutex> lock(mutex_);
        const auto is_own = [&](const Offer& offer) { return offer.work == work; };
        offers_.erase(std::remove_if(offers_.begin(), offers_.end(), is_own), offers_.end());
        num_offers_.store(int64_t(offers_.size()), std::memory_order_release);
    }

  private:
    struct Offer {
        std::shared_ptr<Work> work;
        int64_t seats;
    };

    void start_helper() {  // with all signals blocked: they are for the interpreter's threads
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        std::thread helper([this] {
            for (;;) take()->walk();
        });
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        pthread_setname_np(helper.native_handle(), "quire-cpu");
        helper.detach();
    }

    std::shared_ptr<Work> take() {
        for (int spins = 0; spins < IDLE_SPINS && !num_offers_.load(std::memory_order_acquire); spins++) pause();
        std::unique_lock<std::mutex> lock(mutex_);
        num_asleep_++;
        called_.wait(lock, [this] { return !offers_.empty(); });
        num_asleep_--;
        std::shared_ptr<Work> work = offers_.front().work;
        if (--offers_.front().seats == 0) {
            offers_.erase(offers_.begin());
            num_offers_.store(int64_t(offers_.size()), std::memory_order_release);
        }
        return work;
    }

    std::mutex mutex_;
    std::condition_variable called_;
    std::vector<Offer> offers_;
    std::atomic<int64_t> num_offers_{0};
    int64_t num_threads_ = 0, num_asleep_ = 0;
};

// Calls walk() on this thread and on up to num_threads - 1 helpers.
template <class F>
void on_team(int64_t num_threads, F walk) {
    if (num_threads <= 1) return walk();
    struct Walk : Team::Work {
        explicit Walk(F&& given) : walk_(std::move(given)) {}
        void walk() override { walk_(); }
        F walk_;
    };
    Team::of_process().run(std::make_shared<Walk>(std::move(walk)), num_threads - 1);
}

}  // namespace quire
