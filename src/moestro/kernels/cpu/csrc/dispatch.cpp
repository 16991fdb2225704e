// Which instruction sets this build and this machine have.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moestro {
namespace {

constexpr int kAlways = 1 << MOESTRO_GENERIC | 1 << MOESTRO_AMX_EMULATED;

#if defined(__x86_64__)
bool bit(uint32_t word, int index) { return word >> index & 1u; }

// Bits of the registers that the system saves: SSE and AVX (1, 2), AVX-512 (5..7), tiles (17, 18).
uint64_t saved_state() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return 0;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

bool may_use_tiles() {  // Linux hands out the tile registers on request, per process
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

int detect() {
  int found = kAlways;
  const uint64_t saved = saved_state();
  uint32_t a, b, c, d, a1, unused;
  if ((saved & 0x6) != 0x6 || !__get_cpuid(1, &a, &b, &c, &d)) return found;
  const bool fma = bit(c, 12), f16c = bit(c, 29);
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  if (bit(b, 5) && fma && f16c) found |= 1 << MOESTRO_AVX2;
  const bool avx512 = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);  // F, DQ, BW, VL
  const bool tiles = bit(d, 22) && bit(d, 24);                               // AMX-BF16, AMX-TILE
  if (!__get_cpuid_count(7, 1, &a1, &unused, &unused, &unused)) return found;
  if (avx512 && bit(a1, 5) && (saved & 0xE6) == 0xE6) {
    found |= 1 << MOESTRO_AVX512;
    if (tiles && (saved & 0x60000) == 0x60000 && may_use_tiles()) found |= 1 << MOESTRO_AMX;
  }
  return found;
}
#else
int detect() { return kAlways; }
#endif

}  // namespace

const Kernels* kernels_of(int isa) {
  static const int found = detect();
  if (isa < 0 || !(found >> isa & 1)) return nullptr;
#if defined(__x86_64__)
  if (isa == MOESTRO_AMX) return kernels_amx();
  if (isa == MOESTRO_AVX512) return kernels_avx512();
  if (isa == MOESTRO_AVX2) return kernels_avx2();
#endif
  if (isa == MOESTRO_AMX_EMULATED) return kernels_amx_emulated();
  return kernels_generic();
}

}  // namespace moestro

int32_t moestro_cpu_isas(void) {
  int32_t found = 0;
  for (int isa = MOESTRO_GENERIC; isa <= MOESTRO_AMX_EMULATED; ++isa)
    if (moestro::kernels_of(isa)) found |= 1 << isa;
  return found;
}
