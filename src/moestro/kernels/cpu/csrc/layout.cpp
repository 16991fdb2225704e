// Between the checkpoint layout and panels: pack, unpack, both ways exact.
#include <atomic>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace moestro {
namespace {

// The row of the dense matrix at which a panel begins: gated layers alternate gate and up panels.
int64_t first_row(int64_t panel, int64_t rows, bool gated) {
  return gated ? (panel / 2) * kPanel + (panel % 2) * (rows / 2) : panel * kPanel;
}

template <class F>
void each_panel(int64_t rows, bool gated, int threads, F&& body) {
  std::atomic<int64_t> next{0};
  parallel(threads, [&](int) {
    for (int64_t panel; (panel = next.fetch_add(1)) < rows / kPanel;) body(panel, first_row(panel, rows, gated));
  });
}

uint32_t even_nibbles(uint32_t bytes) {  // 0x_a_b_c_d -> 0xabcd
  bytes &= 0x0F0F0F0Fu;
  bytes = (bytes | bytes >> 4) & 0x00FF00FFu;
  return (bytes | bytes >> 8) & 0xFFFFu;
}

uint32_t spread_nibbles(uint32_t word) {  // 0xabcd -> 0x_a_b_c_d
  word = (word | word << 8) & 0x00FF00FFu;
  return (word | word << 4) & 0x0F0F0F0Fu;
}

// One half (8 columns: 4 bytes) of 16 rows of a block, to or from a 64-byte line.
void pack_half(uint8_t* line, const uint8_t* packed, int64_t row_bytes) {
  for (int r = 0; r < kPanel; ++r) {
    uint32_t bytes;
    std::memcpy(&bytes, packed + r * row_bytes, 4);
    const uint32_t words = even_nibbles(bytes) | even_nibbles(bytes >> 4) << 16;
    std::memcpy(line + 4 * r, &words, 4);
  }
}

void unpack_half(uint8_t* packed, const uint8_t* line, int64_t row_bytes) {
  for (int r = 0; r < kPanel; ++r) {
    uint32_t words;
    std::memcpy(&words, line + 4 * r, 4);
    const uint32_t bytes = spread_nibbles(words & 0xFFFFu) | spread_nibbles(words >> 16) << 4;
    std::memcpy(packed + r * row_bytes, &bytes, 4);
  }
}

}  // namespace
}  // namespace moestro

using namespace moestro;

namespace {

// [R, C] of T, row-major, to or from panels [R/16, C/2, 16, 2].
template <class T>
void pack_pairs(T* panels, const T* dense, int64_t rows, int64_t columns, bool gated, int threads) {
  each_panel(rows, gated, threads, [=](int64_t panel, int64_t row) {
    T* to = panels + panel * kPanel * columns;
    for (int64_t c = 0; c < columns; c += 2, to += kTileRows)
      for (int r = 0; r < kPanel; ++r) std::memcpy(to + 2 * r, dense + (row + r) * columns + c, 2 * sizeof(T));
  });
}

template <class T>
void unpack_pairs(T* dense, const T* panels, int64_t rows, int64_t columns, bool gated, int threads) {
  each_panel(rows, gated, threads, [=](int64_t panel, int64_t row) {
    const T* from = panels + panel * kPanel * columns;
    for (int64_t c = 0; c < columns; c += 2, from += kTileRows)
      for (int r = 0; r < kPanel; ++r) std::memcpy(dense + (row + r) * columns + c, from + 2 * r, 2 * sizeof(T));
  });
}

}  // namespace

void moestro_cpu_pack_bf16(uint16_t* panels, const uint16_t* dense, int64_t rows, int64_t columns, int32_t gated,
                           int32_t threads) {
  pack_pairs(panels, dense, rows, columns, gated != 0, threads);
}

void moestro_cpu_unpack_bf16(uint16_t* dense, const uint16_t* panels, int64_t rows, int64_t columns, int32_t gated,
                             int32_t threads) {
  unpack_pairs(dense, panels, rows, columns, gated != 0, threads);
}

void moestro_cpu_pack_fp8(uint8_t* panels, const uint8_t* dense, int64_t rows, int64_t columns, int32_t gated,
                          int32_t threads) {
  pack_pairs(panels, dense, rows, columns, gated != 0, threads);
}

void moestro_cpu_unpack_fp8(uint8_t* dense, const uint8_t* panels, int64_t rows, int64_t columns, int32_t gated,
                            int32_t threads) {
  unpack_pairs(dense, panels, rows, columns, gated != 0, threads);
}

void moestro_cpu_pack_fp4(uint8_t* codes, uint8_t* scales, const uint8_t* packed, const uint8_t* scale, int64_t rows,
                          int64_t columns, int64_t scale_columns, int32_t gated, int32_t threads) {
  const int64_t blocks = columns / kBlock, per_row = columns / scale_columns, row_bytes = columns / 2;
  each_panel(rows, gated != 0, threads, [=](int64_t panel, int64_t row) {
    uint8_t* line = codes + panel * blocks * kCodeBytes;
    for (int64_t b = 0; b < blocks; ++b, line += kCodeBytes) {
      const uint8_t* from = packed + row * row_bytes + b * 8;
      pack_half(line, from, row_bytes);
      pack_half(line + 64, from + 4, row_bytes);
    }
    uint8_t* to = scales + panel * per_row * kPanel;
    for (int64_t s = 0; s < per_row; ++s)
      for (int r = 0; r < kPanel; ++r) *to++ = scale[(row + r) * per_row + s];
  });
}

void moestro_cpu_unpack_fp4(uint8_t* packed, uint8_t* scale, const uint8_t* codes, const uint8_t* scales, int64_t rows,
                            int64_t columns, int64_t scale_columns, int32_t gated, int32_t threads) {
  const int64_t blocks = columns / kBlock, per_row = columns / scale_columns, row_bytes = columns / 2;
  each_panel(rows, gated != 0, threads, [=](int64_t panel, int64_t row) {
    const uint8_t* line = codes + panel * blocks * kCodeBytes;
    for (int64_t b = 0; b < blocks; ++b, line += kCodeBytes) {
      uint8_t* to = packed + row * row_bytes + b * 8;
      unpack_half(to, line, row_bytes);
      unpack_half(to + 4, line + 64, row_bytes);
    }
    const uint8_t* from = scales + panel * per_row * kPanel;
    for (int64_t s = 0; s < per_row; ++s)
      for (int r = 0; r < kPanel; ++r) scale[(row + r) * per_row + s] = *from++;
  });
}

void moestro_cpu_advise_huge(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = 4096, begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(page - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}
