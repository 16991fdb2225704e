// Drives the core under AddressSanitizer and UndefinedBehaviorSanitizer: every instruction set of this machine, all
// formats, every path, in buffers of exactly the sizes that the interface states. Results must not depend on the number
// of threads, and all instruction sets must agree.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>

#include "moestro_cpu.h"

namespace {

uint32_t g_state = 12345;
uint32_t next() { return g_state = g_state * 1664525u + 1013904223u, g_state >> 8; }

template <class T>
struct Buffer {  // exact, 64-byte aligned, on the heap: a byte beyond it is an error
  explicit Buffer(int64_t count) : count(count), data(static_cast<T*>(std::aligned_alloc(64, bytes()))) {
    std::memset(static_cast<void*>(data), 0, bytes());
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  size_t bytes() const { return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64; }
  int64_t count;
  T* data;
};

uint16_t bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>(bits >> 16);
}
float widen(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
uint16_t small() { return bf16(static_cast<float>(static_cast<int>(next() % 2001) - 1000) / 4000.f); }

constexpr int32_t kFp8Columns = 128;
int64_t per_scale(int format) { return format == MOESTRO_MXFP4 ? 32 : 16; }
int64_t scale_bytes(int format, int64_t rows, int64_t columns) {  // of a matrix
  if (format == MOESTRO_FP8) return rows / 16 * ((columns + kFp8Columns - 1) / kFp8Columns) * 4;
  return rows * columns / per_scale(format);
}
int64_t code_bytes(int format, int64_t weights) {
  return format == MOESTRO_BF16 ? weights * 2 : format == MOESTRO_FP8 ? weights : weights / 2;
}

struct Weights {  // experts' matrices, packed from random ones; packing and unpacking must be inverse
  Weights(int format, int64_t experts, int64_t rows, int64_t columns, bool gated)
      : codes(code_bytes(format, experts * rows * columns)), scales(experts * scale_bytes(format, rows, columns)), row_scale(experts * rows), bias(experts * rows) {
    const int64_t per = per_scale(format), matrix = codes.count / experts, blocks = scales.count / experts;
    Buffer<uint8_t> source(matrix), scale(blocks), back(matrix), scale_back(blocks);
    for (int64_t e = 0; e < experts; ++e) {
      for (int64_t i = 0; i < blocks; ++i) scale.data[i] = static_cast<uint8_t>((format == MOESTRO_MXFP4 ? 0x78 : 0x28) + next() % (format == MOESTRO_MXFP4 ? 4 : 16));
      if (format == MOESTRO_BF16) {
        auto* dense = reinterpret_cast<uint16_t*>(source.data);
        auto* panels = reinterpret_cast<uint16_t*>(codes.data + e * matrix);
        for (int64_t i = 0; i < rows * columns; ++i) dense[i] = small();
        moestro_cpu_pack_bf16(panels, dense, rows, columns, gated, 2);
        moestro_cpu_unpack_bf16(reinterpret_cast<uint16_t*>(back.data), panels, rows, columns, gated, 2);
      } else if (format == MOESTRO_FP8) {
        for (int64_t i = 0; i < matrix; ++i) source.data[i] = static_cast<uint8_t>(next() % 96 + (next() & 0x80));
        moestro_cpu_pack_fp8(codes.data + e * matrix, source.data, rows, columns, gated, 2);
        moestro_cpu_unpack_fp8(back.data, codes.data + e * matrix, rows, columns, gated, 2);
        auto* factors = reinterpret_cast<float*>(scales.data + e * blocks);
        for (int64_t i = 0; i < blocks / 4; ++i) factors[i] = static_cast<float>(next() % 7 + 1);
      } else {
        for (int64_t i = 0; i < matrix; ++i) source.data[i] = static_cast<uint8_t>(next());
        uint8_t *panels = codes.data + e * matrix, *panel_scales = scales.data + e * blocks;
        moestro_cpu_pack_fp4(panels, panel_scales, source.data, scale.data, rows, columns, per, gated, 2);
        moestro_cpu_unpack_fp4(back.data, scale_back.data, panels, panel_scales, rows, columns, per, gated, 2);
        if (std::memcmp(scale.data, scale_back.data, static_cast<size_t>(blocks))) std::abort();
      }
      if (std::memcmp(source.data, back.data, static_cast<size_t>(matrix))) std::abort();
    }
    for (int64_t i = 0; i < row_scale.count; ++i) row_scale.data[i] = 64.f;
    for (int64_t i = 0; i < bias.count; ++i) bias.data[i] = widen(small());
  }
  MoestroMatrix matrix(int format) const {
    const bool nvfp4 = format == MOESTRO_NVFP4;
    return {codes.data, format != MOESTRO_BF16 ? scales.data : nullptr, nvfp4 ? row_scale.data : nullptr, bias.data};
  }
  Buffer<uint8_t> codes, scales;
  Buffer<float> row_scale, bias;
};

double number(int x_type, const uint8_t* at, int64_t i) {  // of bf16, or of float32
  if (x_type == MOESTRO_X_FP32) {
    float value;
    std::memcpy(&value, at + 4 * i, 4);
    return static_cast<double>(value);
  }
  uint16_t value;
  std::memcpy(&value, at + 2 * i, 2);
  return static_cast<double>(widen(value));
}

double difference(int x_type, const uint8_t* a, const uint8_t* b, int64_t count) {
  double apart = 0, norm = 1e-30;
  for (int64_t i = 0; i < count; ++i) {
    apart += std::pow(number(x_type, a, i) - number(x_type, b, i), 2);
    norm += std::pow(number(x_type, b, i), 2);
  }
  return std::sqrt(apart / norm);
}

int check(int format, int x_type, int input_format, int activation, int32_t hidden, int32_t inter, int64_t tokens, MoestroTactic tactic) {
  const int64_t size = x_type == MOESTRO_X_FP32 ? 4 : 2;
  const int32_t experts = 3, top_k = 2;
  const bool gated = activation != MOESTRO_RELU2;
  const Weights gate_up(format, experts, gated ? 2 * inter : inter, hidden, gated);
  const Weights down(format, experts, hidden, inter, false);
  MoestroLayer layer{.isa = 0, .format = format, .experts = experts, .expert_offset = 1, .top_k = top_k,
                     .hidden = hidden, .intermediate = inter, .activation = activation, .gated = gated, .x_type = x_type,
                     .input_format = input_format, .batch_invariant = tactic.row_tile == 1, .scale_columns = kFp8Columns,
                     .alpha = 1.702f, .limit = 7.f, .up_shift = 1.f, .gate_up = gate_up.matrix(format),
                     .down = down.matrix(format)};
  Buffer<uint8_t> x(tokens * hidden * size), out(tokens * hidden * size), plain(tokens * hidden * size);
  Buffer<int32_t> ids(tokens * top_k);
  Buffer<float> weights(tokens * top_k);
  for (int64_t i = 0; i < tokens * hidden; ++i) {
    const uint16_t bits = small();  // as float16 it is a number too
    const float value = widen(bits);
    if (size == 4) std::memcpy(x.data + 4 * i, &value, 4);
    else std::memcpy(x.data + 2 * i, &bits, 2);
  }
  for (int64_t i = 0; i < ids.count; ++i) ids.data[i] = static_cast<int32_t>(next() % 6) - 1;  // some of nobody
  for (int64_t i = 0; i < weights.count; ++i) weights.data[i] = widen(small());
  int failures = 0;
  for (int isa = MOESTRO_GENERIC; isa < MOESTRO_ISAS; ++isa) {
    if (!(moestro_cpu_isas() >> isa & 1)) continue;
    layer.isa = isa;
    Buffer<uint8_t> first(tokens * hidden * size);
    for (int threads = 1; threads <= 3; threads += 2) {
      tactic.threads = threads;
      Buffer<uint8_t> workspace(moestro_cpu_workspace(&layer, &tactic, tokens));
      MoestroCall call{tokens, x.data, ids.data, weights.data, threads == 1 ? first.data : out.data,
                       workspace.data, workspace.count};
      failures += moestro_cpu_moe(&layer, &tactic, &call) != MOESTRO_OK;
      call.workspace_bytes -= 64;
      failures += moestro_cpu_moe(&layer, &tactic, &call) != MOESTRO_SMALL_WORKSPACE;
    }
    failures += std::memcmp(first.data, out.data, static_cast<size_t>(out.count)) != 0;
    if (isa == MOESTRO_GENERIC) std::memcpy(plain.data, out.data, static_cast<size_t>(out.count));
    if (x_type == MOESTRO_X_FP16) continue;
    const double apart = difference(x_type, out.data, plain.data, tokens * hidden);
    if (!(apart < 5e-3)) {
      std::printf("isa %d format %d activation %d H %d I %d N %d: %g apart\n", isa, format, activation, hidden, inter,
                  static_cast<int>(tokens), apart);
      ++failures;
    }
  }
  return failures;
}

}  // namespace

int main() {
  const MoestroTactic tactics[] = {{64, 2, 1 << 30, 1 << 20, 1}, {5, 1, 1, 1 << 20, 1}, {40, 3, 4, 13, 1}};
  const int32_t sizes[][2] = {{16, 16}, {80, 48}, {64, 96}, {1056, 32}};
  int failures = 0;
  for (int format : {MOESTRO_BF16, MOESTRO_NVFP4, MOESTRO_MXFP4, MOESTRO_FP8})
    for (int activation : {MOESTRO_SWIGLU, MOESTRO_GEGLU_TANH, MOESTRO_RELU2})
      for (const auto& size : sizes) {
        if (size[0] % per_scale(format) || size[1] % per_scale(format)) continue;
        for (const auto& tactic : tactics)
          for (int64_t tokens : {1, 3, 53})
            for (int x_type : {MOESTRO_X_BF16, MOESTRO_X_FP16, MOESTRO_X_FP32})
              if (x_type == MOESTRO_X_BF16 || activation == MOESTRO_SWIGLU)
                for (int input : {MOESTRO_INPUT_AS_IS, MOESTRO_INPUT_INT8})
                  if (input == MOESTRO_INPUT_AS_IS || format == MOESTRO_NVFP4 || format == MOESTRO_MXFP4)
                    failures += check(format, x_type, input, activation, size[0], size[1], tokens, tactic);
      }
  Buffer<uint8_t> some(100000);
  moestro_cpu_read(some.data, some.count, 3);
  for (int isa = 0; isa < MOESTRO_ISAS; ++isa)
    for (int arithmetic = 0; arithmetic < MOESTRO_ARITHMETICS; ++arithmetic) moestro_cpu_rate(isa, arithmetic, 1e-4, 2);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
