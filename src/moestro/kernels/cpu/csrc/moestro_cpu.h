// The C interface of the CPU core: plain structs and functions, loaded by moestro/kernels/cpu/core.py with ctypes.
//
// A matrix of an expert, [R, C], is kept in panels of 16 rows. Within a panel columns go in pairs, as the
// dot-product instructions take them: 16 rows x 2 columns of bf16 are one 64-byte line. NVFP4 and MXFP4 keep the same
// order with four pairs of columns in one 64-byte line: nibble j of 16-bit word 2r + s of half h of a block is row r,
// column 8h + 2j + s, so one shift and one table look-up (vpermw) give a line of bf16. In gated layers the panels of
// gate_up alternate gate, up, gate, up: both halves of an intermediate value meet in one thread's registers.
#pragma once
#include <stdint.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "moestro's CPU core is for little-endian processors: its panels are read as words"
#endif
#if UINTPTR_MAX < UINT64_MAX
#error "moestro's CPU core is for 64-bit processors: experts are larger than 4 GiB"
#endif

#if defined(_WIN32)
#define MOESTRO_API __declspec(dllexport)
#else
#define MOESTRO_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { MOESTRO_ABI = 6 };
enum { MOESTRO_BF16 = 0, MOESTRO_NVFP4 = 1, MOESTRO_MXFP4 = 2, MOESTRO_FP8 = 3, MOESTRO_INT4 = 4 };
enum { MOESTRO_X_BF16 = 0, MOESTRO_X_FP16 = 1, MOESTRO_X_FP32 = 2 };  // of x, of the intermediate and of the result
enum { MOESTRO_INPUT_AS_IS = 0, MOESTRO_INPUT_INT8 = 1 };
enum { MOESTRO_SWIGLU = 0, MOESTRO_GEGLU_TANH = 1, MOESTRO_RELU2 = 2 };
// AVX2 comes with FMA and F16C; AVX_VNNI is AVX2 with 256-bit integer dot products; AVX512 has those of bf16 and int8.
// NEON is every 64-bit ARM; NEON_DOT has dot products of bytes as well, and NEON_BF16 also those of bf16.
// The emulated AMX runs the AMX path with its tile instructions in plain C++: for tests on any machine.
enum {
  MOESTRO_GENERIC, MOESTRO_AVX2, MOESTRO_AVX_VNNI, MOESTRO_AVX512, MOESTRO_AMX, MOESTRO_AMX_EMULATED,
  MOESTRO_NEON, MOESTRO_NEON_DOT, MOESTRO_NEON_BF16, MOESTRO_ISAS
};
// Arithmetic whose rate moestro_cpu_rate measures.
enum { MOESTRO_FLOAT32, MOESTRO_DOT_BF16, MOESTRO_DOT_INT16, MOESTRO_DOT_INT8, MOESTRO_ARITHMETICS };
enum { MOESTRO_OK = 0, MOESTRO_SMALL_WORKSPACE = 1, MOESTRO_NO_ISA = 2 };

typedef struct {           // E matrices [R, C], R and C multiples of 16 (C of 32 for mxfp4)
  const uint8_t* codes;    // fp4 and int4 [E, R/16, C/16, 128]; bf16 and fp8 [E, R/16, C/2, 16, 2] of bf16 or e4m3
  const uint8_t* scales;   // nvfp4 [E, R/16, C/16, 16] e4m3, not negative; mxfp4 [E, R/16, C/32, 16] e8m0; bf16: null;
                           // fp8 [E, R/16, ceil(C/B)] of float32, 256 times the scale of a panel's B columns;
                           // int4 [E, R/16, C/G, 16] of scale_type
  const float* row_scale;  // nvfp4 [E, R] in the panels' order: 256 times the global scale; others: null
  const float* bias;       // [E, R] in the panels' order, or null
  const uint8_t* zeros;    // int4 [E, R/16, C/G, 16], 0 to 16, or null: all are 8
  int32_t group;           // G of int4, a multiple of 32 that divides C
  int32_t scale_type;      // of int4: MOESTRO_X_*
} MoestroMatrix;

typedef struct {
  int32_t isa;      // one of the MOESTRO_* instruction sets, which this machine must have
  int32_t format;   // MOESTRO_BF16, MOESTRO_NVFP4, MOESTRO_MXFP4, MOESTRO_FP8 or MOESTRO_INT4
  int32_t experts;  // L local ones: global ids [expert_offset, expert_offset + L)
  int32_t expert_offset;
  int32_t top_k;         // K
  int32_t hidden;        // H
  int32_t intermediate;  // I
  int32_t activation;
  int32_t gated;         // whether gate_up has a gate for every row of the intermediate
  int32_t x_type;
  int32_t input_format;     // MOESTRO_INPUT_INT8: x and the intermediate as int8 with a scale per 32 columns; fp4 only
  int32_t batch_invariant;  // a token's result must not depend, in any bit, on the other tokens
  int32_t scale_columns;    // B of fp8, a multiple of 32
  float alpha, limit, up_shift;  // MOESTRO_SWIGLU; limit may be infinite
  MoestroMatrix gate_up;         // R = 2I (I without a gate), C = H
  MoestroMatrix down;            // R = H, C = I
} MoestroLayer;

typedef struct {          // how to run: a tactic
  int32_t token_tile;     // most tokens of an expert that one work item takes
  int32_t row_tile;       // tiles of two panels per work item
  int32_t dequant_from;   // fp4: from so many tokens on, decode in cache first
  int32_t wave;           // most tokens that are sorted at once
  int32_t threads;
} MoestroTactic;

typedef struct {
  int64_t tokens;       // N
  const void* x;        // of x_type [N, H]
  const int32_t* ids;   // [N, K], global; any value outside this layer's experts is skipped
  const float* weights; // [N, K]
  void* out;            // of x_type [N, H]
  uint8_t* workspace;   // 64-byte aligned
  int64_t workspace_bytes;
} MoestroCall;

MOESTRO_API int32_t moestro_cpu_abi(void);
// Bit i is set if this build and this machine have instruction set i.
MOESTRO_API int32_t moestro_cpu_isas(void);
// Run parallel regions on an OpenMP runtime that is already in the process (the address of its GOMP_parallel), so that
// its threads and ours are the same ones; null: on threads of our own.
MOESTRO_API void moestro_cpu_use_openmp(void* gomp_parallel);

MOESTRO_API int64_t moestro_cpu_workspace(const MoestroLayer* layer, const MoestroTactic* tactic, int64_t tokens);
MOESTRO_API int32_t moestro_cpu_moe(const MoestroLayer* layer, const MoestroTactic* tactic, const MoestroCall* call);

// out [N, R] = x [N, C] times gate_up^T, plus its bias: of a layer with one expert, no gate, I = R, H = C; its down and
// its activation are not looked at. A tactic's wave is its token_tile here.
MOESTRO_API int64_t moestro_cpu_linear_workspace(const MoestroLayer* layer, const MoestroTactic* tactic, int64_t tokens);
MOESTRO_API int32_t moestro_cpu_linear(const MoestroLayer* layer, const MoestroTactic* tactic, int64_t tokens,
                                       const void* x, void* out, uint8_t* workspace, int64_t workspace_bytes);

// One expert's matrix between the checkpoint layout (row-major) and panels. `gated`: the first half of the rows are
// gates, and panels alternate. Bytes are the same in both; source and destination must not overlap.
MOESTRO_API void moestro_cpu_pack_bf16(uint16_t* panels, const uint16_t* dense, int64_t rows, int64_t columns,
                                       int32_t gated, int32_t threads);
MOESTRO_API void moestro_cpu_unpack_bf16(uint16_t* dense, const uint16_t* panels, int64_t rows, int64_t columns,
                                         int32_t gated, int32_t threads);
MOESTRO_API void moestro_cpu_pack_fp8(uint8_t* panels, const uint8_t* dense, int64_t rows, int64_t columns,
                                      int32_t gated, int32_t threads);
MOESTRO_API void moestro_cpu_unpack_fp8(uint8_t* dense, const uint8_t* panels, int64_t rows, int64_t columns,
                                        int32_t gated, int32_t threads);
// fp4: one scale byte per `scale_columns`, 16 or 32.
MOESTRO_API void moestro_cpu_pack_fp4(uint8_t* codes, uint8_t* scales, const uint8_t* packed, const uint8_t* scale,
                                      int64_t rows, int64_t columns, int64_t scale_columns, int32_t gated,
                                      int32_t threads);
MOESTRO_API void moestro_cpu_unpack_fp4(uint8_t* packed, uint8_t* scale, const uint8_t* codes, const uint8_t* scales,
                                        int64_t rows, int64_t columns, int64_t scale_columns, int32_t gated,
                                        int32_t threads);
// Ask for huge pages under [data, data + bytes): +10 % read bandwidth measured on Zen 5 with 4 KiB pages otherwise.
MOESTRO_API void moestro_cpu_advise_huge(void* data, int64_t bytes);

// What this machine does at best, for the bench. Each thread multiplies and adds registers for some seconds and counts
// its best slice; returns both operations a second of all threads, or 0 if the instruction set lacks the arithmetic.
MOESTRO_API double moestro_cpu_rate(int32_t isa, int32_t arithmetic, double seconds, int32_t threads);
// Reads `bytes` once, an equal part on each thread; returns a number that depends on them.
MOESTRO_API uint64_t moestro_cpu_read(const void* data, int64_t bytes, int32_t threads);

#ifdef __cplusplus
}
#endif
