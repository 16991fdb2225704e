// What the text of a kernel in CUDA C++ finds on a CPU: the language's words, and functions of device/hopper.cuh's names.
//
// One include, for g++; what they do is in cuda_on_cpu.cpp, which is compiled once. A kernel's text ends with RUNS(name).
#pragma once
#include <cmath>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __grid_constant__
#define __forceinline__ inline
#define __shared__ thread_local
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define DEV static inline

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct alignas(8) float2 { float x, y; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
DEV uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

struct Dim { u32 x, y, z; };
extern __thread Dim threadIdx, blockIdx, blockDim, gridDim;

// --- what CUDA gives -------------------------------------------------------------------------------------------------
template <typename T>
DEV T min(T a, T b) { return b < a ? b : a; }
template <typename T>
DEV T max(T a, T b) { return a < b ? b : a; }
DEV float __fdiv_rn(float a, float b) { return a / b; }
DEV float __uint_as_float(u32 bits) {
  float r;
  memcpy(&r, &bits, 4);
  return r;
}
DEV u32 __float_as_uint(float value) {
  u32 r;
  memcpy(&r, &value, 4);
  return r;
}
void __trap();
void __syncthreads();
void __syncwarp();
u32 __shfl_xor_sync(u32 mask, u32 value, int bits);
DEV float __shfl_xor_sync(u32 mask, float value, int bits) {
  return __uint_as_float(__shfl_xor_sync(mask, __float_as_uint(value), bits));
}

// --- hopper.cuh ------------------------------------------------------------------------------------------------------
// Rows of so many bytes, `pitch` apart; of elements of `size` bytes; boxes of height x width bytes, swizzled or not.
struct alignas(64) Map { u64 base, columns, rows, pitch, height, width, size, swizzle, unused[8]; };

DEV void wait_for_previous() {}
DEV void launch_next() {}
template <int COUNT>
DEV void take_registers() {}
template <int COUNT>
DEV void leave_registers() {}
DEV void forget(u32&) {}

u8* shared_memory();
u32 shared_address(const void* p);
void init(u32 bar, int count);
DEV void publish_barriers() {}
void arrive(u32 bar);
void expect(u32 bar, int bytes);
void wait(u32 bar, u32 parity);
void arrive_when_copied(u32 bar);
void fence_for_products();

void copy4(u32 to, const void* from);
void copy16(u32 to, const void* from, int bytes = 16);
void copy_bytes(u32 to, const u8* from, int bytes, u32 bar);
void copy_box(u32 to, const Map* map, int column, int row, u32 bar);
void load16(u32 (&to)[4], u32 from);
u32 load1(u32 from);
u32 load2(u32 from);
u32 load4(u32 from);
float load_float(u32 from);
void store_float(u32 to, float value);
void store_turned(u32 to, u32 first, u32 second);
void store_matrices(u32 to, const u32 (&r)[4]);

void meet_first(int count);
template <int COUNT>
DEV void meet_threads() { meet_first(COUNT); }
void store16(u32 to, const u32 (&r)[4]);
void copy_out(void* to, u32 from, int bytes);
void wait_for_copies_out();
int rank_in_cluster();
void sync_cluster();
DEV void meet_cluster() { sync_cluster(); }
void arrive_at(u32 bar, u32 rank);
void copy_box_to(u32 to, const Map* map, int column, int row, u32 bar, u16 mask);

DEV u32 permute(u32 a, u32 b, u32 selector) {
  u64 bytes = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    u32 nibble = selector >> 4 * i & 15, byte = bytes >> 8 * (nibble & 7) & 255;
    r |= (nibble & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
  }
  return r;
}
template <int TABLE>
DEV u32 logic(u32 a, u32 b, u32 c) {
  u32 r = 0;
  for (int i = 0; i < 8; i++)
    if (TABLE >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}
DEV u32 bf16(float value) {
  u32 bits = __float_as_uint(value);
  return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
DEV u32 two_bf16(float low, float high) { return bf16(low) | bf16(high) << 16; }
DEV u32 e4m3(float value) {  // the nearest, ties to even, at most 448
  u32 sign = __float_as_uint(value) >> 24 & 128;
  float v = fabsf(value);
  if (v != v) return 0x7f;
  if (v >= 448) return sign | 0x7e;
  int exponent = max(ilogbf(v == 0 ? 1e-9f : v), -6);
  return sign + ((exponent + 6) << 3) + (u32)nearbyintf(ldexpf(v, 3 - exponent));  // 8 eighths carry into the exponent
}
DEV u16 two_e4m3(float low, float high) { return e4m3(low) | e4m3(high) << 8; }
DEV float half_to_float(u16 h) {
  int exponent = h >> 10 & 31, mantissa = h & 1023;
  float v = exponent == 31 ? (mantissa ? NAN : INFINITY) : ldexpf(exponent ? 1024 + mantissa : mantissa, max(exponent, 1) - 25);
  return h >> 15 ? -v : v;
}
DEV float bf16_to_float(u16 h) { return __uint_as_float((u32)h << 16); }
DEV float power_of_two(float x) { return exp2f(x); }
DEV float reciprocal(float x) { return 1 / x; }

void begin_products();
void end_products();
void wait_for_all_but_one();
void multiply_later(float* part, const u32* a, u64 of_a, u64 b, bool go_on, int pairs);  // a, or the operand of_a
void wait_for_products();
DEV u64 operand(u32 address) { return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62; }
template <int W>
struct Mma {
  static void run(float* part, const u32* a, u64 b, bool go_on) { multiply_later(part, a, 0, b, go_on, W); }
  static void run(float* part, u64 a, u64 b, bool go_on) { multiply_later(part, nullptr, a, b, go_on, W); }
  static void wait(float*) { wait_for_products(); }
};

// --- a launch --------------------------------------------------------------------------------------------------------
struct Launch {
  const void* words;
  u64 num_words;
  const Map* maps;
  u64 num_maps;
  const u64* tensors;  // where each begins and ends: all that copies may read
  u64 num_tensors, grid[3], threads, shared_bytes, seed, cluster;
};
const char* run_grid(const Launch& launch, void (*block)(const Launch&));  // "", or what is wrong

template <typename P, typename... M>
bool fits(void (*)(P, M...), const Launch& launch) {
  return sizeof(P) == launch.num_words * 8 && sizeof...(M) == launch.num_maps;
}
template <typename P, typename... M, size_t... I>
void call(void (*kernel)(P, M...), const Launch& launch, std::index_sequence<I...>) {
  kernel(*(const P*)launch.words, launch.maps[I]...);
}
template <typename P, typename... M>
void call(void (*kernel)(P, M...), const Launch& launch) {
  call(kernel, launch, std::index_sequence_for<M...>());
}

#define RUNS(kernel)                                                                                   \
  extern "C" const char* run_kernel(const Launch* launch) {                                            \
    if (!fits(kernel, *launch)) return "the launch has other arguments than the kernel has parameters"; \
    return run_grid(*launch, [](const Launch& launch) { call(kernel, launch); });                      \
  }
