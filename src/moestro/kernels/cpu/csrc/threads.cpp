// Parallel regions: on the process's OpenMP runtime if Python found one, else on a small pool of our own.
//
// Sharing torch's OpenMP threads matters: its workers spin for a while after each torch operation, and a second pool
// would share their cores. GOMP_parallel is libgomp's stable entry (libomp and libiomp5 export it too).
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels.h"

namespace moestro {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> g_gomp{nullptr};

struct Region {
  void (*work)(void*, int);
  void* context;
  std::atomic<int> next_worker{0};

  static void enter(void* self) {
    auto* region = static_cast<Region*>(self);
    region->work(region->context, region->next_worker.fetch_add(1, std::memory_order_relaxed));
  }
};

class Pool {
 public:
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  void run(int threads, Region* region) {
    std::lock_guard<std::mutex> one_at_a_time(callers_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(threads_.size()) < threads - 1)
        threads_.emplace_back([this, index = static_cast<int>(threads_.size()), seen = generation_] {
          serve(index, seen);
        });
      region_ = region;
      wanted_ = running_ = threads - 1;
      ++generation_;
    }
    wake_.notify_all();
    Region::enter(region);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void serve(int index, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
      if (stop_) return;
      seen = generation_;
      if (index >= wanted_) continue;
      Region* region = region_;
      lock.unlock();
      Region::enter(region);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex callers_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  Region* region_ = nullptr;
  uint64_t generation_ = 0;
  int wanted_ = 0, running_ = 0;
  bool stop_ = false;
};

Pool& pool() {
  static Pool instance;
  return instance;
}

}  // namespace

void parallel(int threads, void (*work)(void*, int), void* context) {
  if (threads <= 1) return work(context, 0);
  Region region{work, context};
  if (GompParallel gomp = g_gomp.load(std::memory_order_relaxed)) {
    gomp(&Region::enter, &region, static_cast<unsigned>(threads), 0);
  } else {
    pool().run(threads, &region);
  }
}

}  // namespace moestro

void moestro_cpu_use_openmp(void* gomp_parallel) {
  moestro::g_gomp.store(reinterpret_cast<moestro::GompParallel>(gomp_parallel));
}
