// What this machine does at best, for the bench's roofline: arithmetic on registers, and reading.
#include <atomic>
#include <cstring>

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

int64_t moestro_cpu_spin(int32_t isa, int32_t arithmetic, int64_t rounds, int32_t threads) {
  const Spin spin = spin_of(isa);
  if (!spin) return 0;
  std::atomic<int64_t> done{0};
  parallel(threads, [&](int) { done += spin(arithmetic, rounds); });
  return done;
}

uint64_t moestro_cpu_read(const void* data, int64_t bytes, int32_t threads) {
  std::atomic<uint64_t> all{0};
  const int64_t part = bytes / threads / 64 * 64;
  parallel(threads, [&](int worker) { all ^= read(static_cast<const uint8_t*>(data) + worker * part, part); });
  return all;
}
