// The core as a process: reads calls from standard input, runs them, writes their results (see emulated.py). So the core of
// another machine is driven by the tests of this one, through an emulator. Structs are as in memory, for both are
// little-endian with 64-bit pointers; each tensor is its size in bytes (-1: null) and the bytes. Tensors and the
// workspace are allocated at exactly their sizes.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "moestro_cpu.h"

namespace {

enum Request : int32_t { kIsas, kWorkspace, kMoe, kRate, kPackBf16, kPackFp8, kPackFp4 };

void get(void* to, size_t bytes) {
  if (bytes && std::fread(to, 1, bytes, stdin) != bytes) std::exit(0);  // the other side is done
}

template <class T>
T get() {
  T value;
  get(&value, sizeof value);
  return value;
}

void put(const void* from, size_t bytes) {
  if (bytes && std::fwrite(from, 1, bytes, stdout) != bytes) std::exit(1);
}

using Memory = std::unique_ptr<uint8_t, decltype(&std::free)>;

Memory room(int64_t bytes) {
  return {static_cast<uint8_t*>(std::aligned_alloc(64, (static_cast<size_t>(bytes) + 64) / 64 * 64)), &std::free};
}

struct Tensors {  // what a call points to
  std::vector<Memory> kept;

  template <class T>
  T* next() {
    const auto bytes = get<int64_t>();
    if (bytes < 0) return nullptr;
    kept.push_back(room(bytes));
    get(kept.back().get(), static_cast<size_t>(bytes));
    return reinterpret_cast<T*>(kept.back().get());
  }
  MoestroMatrix matrix(MoestroMatrix found) {  // whose numbers stay
    found.codes = next<const uint8_t>();
    found.scales = next<const uint8_t>();
    found.row_scale = next<const float>();
    found.bias = next<const float>();
    found.zeros = next<const uint8_t>();
    return found;
  }
};

void moe() {
  auto layer = get<MoestroLayer>();
  const auto tactic = get<MoestroTactic>();
  auto call = get<MoestroCall>();
  const auto out_bytes = get<int64_t>();
  Tensors tensors;
  layer.gate_up = tensors.matrix(layer.gate_up);
  layer.down = tensors.matrix(layer.down);
  call.x = tensors.next<const void>();
  call.ids = tensors.next<const int32_t>();
  call.weights = tensors.next<const float>();
  const Memory out = room(out_bytes), workspace = room(call.workspace_bytes);
  std::memset(out.get(), 0xFF, static_cast<size_t>(out_bytes));
  call.out = out.get();
  call.workspace = workspace.get();
  const int32_t status = moestro_cpu_moe(&layer, &tactic, &call);
  put(&status, sizeof status);
  put(out.get(), static_cast<size_t>(out_bytes));
}

void pack(Request what) {  // one expert: rows, columns, columns of a scale, gated; then the checkpoint's tensors
  const auto rows = get<int64_t>(), columns = get<int64_t>(), per_scale = get<int64_t>(), gated = get<int64_t>();
  const int64_t weights = rows * columns;
  const int64_t bytes = what == kPackBf16 ? 2 * weights : what == kPackFp8 ? weights : weights / 2;
  const int64_t scale_bytes = what == kPackFp4 ? weights / per_scale : 0;
  Tensors tensors;
  const auto* source = tensors.next<const uint8_t>();
  const auto* scale = tensors.next<const uint8_t>();
  const Memory codes = room(bytes), scales = room(scale_bytes);
  const auto is_gated = static_cast<int32_t>(gated);
  if (what == kPackBf16)
    moestro_cpu_pack_bf16(reinterpret_cast<uint16_t*>(codes.get()), reinterpret_cast<const uint16_t*>(source), rows,
                          columns, is_gated, 2);
  else if (what == kPackFp8)
    moestro_cpu_pack_fp8(codes.get(), source, rows, columns, is_gated, 2);
  else
    moestro_cpu_pack_fp4(codes.get(), scales.get(), source, scale, rows, columns, per_scale, is_gated, 2);
  put(codes.get(), static_cast<size_t>(bytes));
  put(scales.get(), static_cast<size_t>(scale_bytes));
}

}  // namespace

int main() {
  for (;;) {
    switch (const auto request = get<Request>()) {
      case kIsas: {
        const int32_t found = moestro_cpu_isas();
        put(&found, sizeof found);
        break;
      }
      case kWorkspace: {
        const auto layer = get<MoestroLayer>();
        const auto tactic = get<MoestroTactic>();
        const int64_t bytes = moestro_cpu_workspace(&layer, &tactic, get<int64_t>());
        put(&bytes, sizeof bytes);
        break;
      }
      case kRate: {
        const auto isa = get<int32_t>(), arithmetic = get<int32_t>();
        const double rate = moestro_cpu_rate(isa, arithmetic, 1e-3, 1);
        put(&rate, sizeof rate);
        break;
      }
      case kMoe: moe(); break;
      default: pack(request);
    }
    std::fflush(stdout);
  }
}
