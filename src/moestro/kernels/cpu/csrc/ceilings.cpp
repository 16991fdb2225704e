// What this machine does at best, for the bench's roofline: arithmetic on registers, and reading.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <mutex>

#include "kernels.h"

namespace moestro {
namespace {

Spin spin_of(int isa) {
  if (!has_isa(isa)) return nullptr;
#if defined(__x86_64__)
  if (isa == MOESTRO_AMX) return spin_amx;
  if (isa == MOESTRO_AVX512) return spin_avx512;
  if (isa == MOESTRO_AVX_VNNI) return spin_avx_vnni;
  if (isa == MOESTRO_AVX2) return spin_avx2;
#elif defined(__aarch64__)
  if (isa == MOESTRO_NEON_BF16) return spin_neon_bf16;
  if (isa == MOESTRO_NEON_DOT) return spin_neon_dot;
  if (isa == MOESTRO_NEON) return spin_neon;
#endif
  return isa == MOESTRO_GENERIC ? spin_generic : nullptr;
}

uint64_t read(const uint8_t* from, int64_t bytes) {  // a stream, as the hardware follows it best
  constexpr int kWords = 32;
  uint64_t sum[kWords] = {};
  for (int64_t at = 0; at + 8 * kWords <= bytes; at += 8 * kWords) {
    uint64_t words[kWords];
    std::memcpy(words, from + at, sizeof words);
    for (int i = 0; i < kWords; ++i) sum[i] ^= words[i];
  }
  uint64_t all = 0;
  for (const uint64_t one : sum) all ^= one;
  return all;
}

}  // namespace
}  // namespace moestro

using namespace moestro;

double moestro_cpu_rate(int32_t isa, int32_t arithmetic, double seconds, int32_t threads) {
  using Clock = std::chrono::steady_clock;
  const Spin spin = spin_of(isa);
  if (!spin || !spin(arithmetic, 1)) return 0.;
  std::mutex mutex;
  double all = 0.;
  parallel(threads, [&](int) {
    double best = 0.;
    const auto end = Clock::now() + std::chrono::duration<double>(seconds);
    for (auto now = Clock::now(); now < end;) {  // slices of some 25 us: one of them is nobody else's
      const auto done = static_cast<double>(spin(arithmetic, 2000));
      const auto then = Clock::now();
      best = std::max(best, done / std::chrono::duration<double>(then - now).count());
      now = then;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    all += best;
  });
  return all;
}

uint64_t moestro_cpu_read(const void* data, int64_t bytes, int32_t threads) {
  std::atomic<uint64_t> all{0};
  const int64_t part = bytes / threads / 64 * 64;
  parallel(threads, [&](int worker) { all ^= read(static_cast<const uint8_t*>(data) + worker * part, part); });
  return all;
}
