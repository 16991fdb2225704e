// Which instruction sets this build and this machine have.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
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
  const bool avx2 = bit(b, 5) && fma && f16c;
  if (avx2) found |= 1 << MOESTRO_AVX2;
  const bool avx512 = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31) && bit(c, 11);  // F, DQ, BW, VL, VNNI
  const bool tiles = bit(d, 22) && bit(d, 24);                               // AMX-BF16, AMX-TILE
  if (!__get_cpuid_count(7, 1, &a1, &unused, &unused, &unused)) return found;
  if (avx2 && bit(a1, 4)) found |= 1 << MOESTRO_AVX_VNNI;
  if (avx512 && bit(a1, 5) && (saved & 0xE6) == 0xE6) {
    found |= 1 << MOESTRO_AVX512;
    if (tiles && (saved & 0x60000) == 0x60000 && may_use_tiles()) found |= 1 << MOESTRO_AMX;
  }
  return found;
}
#elif defined(__aarch64__)
#if defined(__APPLE__)
bool feature(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_dots() { return feature("hw.optional.arm.FEAT_DotProd"); }
bool has_bf16() { return feature("hw.optional.arm.FEAT_BF16"); }
#elif defined(__linux__)  // bits of the kernel's asm/hwcap.h, which older headers do not name
bool has_dots() { return getauxval(AT_HWCAP) >> 20 & 1; }
bool has_bf16() { return getauxval(AT_HWCAP2) >> 14 & 1; }
#else
bool has_dots() { return false; }
bool has_bf16() { return false; }
#endif

int detect() {
  int found = kAlways | 1 << MOESTRO_NEON;
  if (has_dots()) found |= 1 << MOESTRO_NEON_DOT | (has_bf16() ? 1 << MOESTRO_NEON_BF16 : 0);
  return found;
}
#else
int detect() { return kAlways; }
#endif

}  // namespace

bool has_isa(int isa) {
  static const int found = detect();
  return isa >= 0 && isa < MOESTRO_ISAS && (found >> isa & 1);
}

const Kernels* kernels_of(const MoestroLayer& layer) {
  if (!has_isa(layer.isa)) return nullptr;
#if defined(__x86_64__)
  if (layer.isa == MOESTRO_AMX) return kernels_amx(layer);
  if (layer.isa == MOESTRO_AVX512) return kernels_avx512(layer);
  if (layer.isa == MOESTRO_AVX_VNNI) return kernels_avx_vnni(layer);
  if (layer.isa == MOESTRO_AVX2) return kernels_avx2(layer);
#elif defined(__aarch64__)
  if (layer.isa == MOESTRO_NEON_BF16) return kernels_neon_bf16(layer);
  if (layer.isa == MOESTRO_NEON_DOT) return kernels_neon_dot(layer);
  if (layer.isa == MOESTRO_NEON) return kernels_neon(layer);
#endif
  if (layer.isa == MOESTRO_AMX_EMULATED) return kernels_amx_emulated(layer);
  return kernels_generic(layer);
}

}  // namespace moestro

using namespace moestro;

int32_t moestro_cpu_isas(void) {
  int32_t found = 0;
  for (int isa = 0; isa < MOESTRO_ISAS; ++isa)
    if (has_isa(isa)) found |= 1 << isa;
  return found;
}
