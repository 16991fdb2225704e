"""The stages that the portable tactics share: sort pairs, dequantise some experts, activate.

Everything here is PyTorch on any device and waits for none, but `Groups.on_host`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from moestro.formats.base import CHECKPOINT, FormatTensor
from moestro.kernels.activations import Formula, SwiGLU
from moestro.kernels.portable.quantize import through
from moestro.kernels.portable.steady import steady_sigmoid
from moestro.kernels.problem import Experts, MoeProblem


@dataclass(frozen=True)
class Call:
    """One call: the problem, the weights and the inputs, x not yet quantised."""

    problem: MoeProblem
    experts: Experts
    x: torch.Tensor  # [N, H]; float32 if it came quantised
    ids: torch.Tensor  # [N, K] int32, global
    weights: torch.Tensor  # [N, K] float32
    out: torch.Tensor  # [N, H]
    x_is_quantized: bool

    @property
    def num_pairs(self) -> int:
        return self.ids.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products."""
        return compute_dtype(self.problem)

    def rows(
        self, token: torch.Tensor, expert: torch.Tensor | int, buffer: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x[token] [M, H] as GEMM 1 takes it; gathered into `buffer` (in x's dtype) if there is one."""
        return self.as_input(torch.index_select(self.x, 0, token, out=buffer), expert)

    def as_input(self, rows: torch.Tensor, expert: torch.Tensor | int) -> torch.Tensor:
        """Rows in the compute dtype, through the input format where the problem has one."""
        if self.problem.input_format is None or self.x_is_quantized:
            return rows.to(self.dtype)
        return through(self.problem, rows, pick_scale(self.experts.gate_up_input_scale, expert))

    def activate(
        self,
        h: torch.Tensor,
        bias: torch.Tensor | None,
        expert: torch.Tensor | int,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[..., 2I] -> [..., I] as GEMM 2 takes it; written into `out` unless it is quantised."""
        act, quantize = self.problem.activation, self.problem.input_format is not None
        if self.problem.batch_invariant:
            assert isinstance(act, Formula)  # see PortableRunner.why_not
            a = act.apply(h.float() if bias is None else h.float() + bias, steady_sigmoid)
        elif bias is None and not quantize and act == SwiGLU():
            gate, up = h.chunk(2, dim=-1)
            a = F.silu(gate) if out is None else torch.ops.aten.silu.out(gate, out=out)
            return a.mul_(up)  # both compute in float32 and round, where SwiGLU itself would copy h first
        else:
            a = act(h.float() if bias is None else h.float() + bias)  # half types round once, at the end
        if quantize:
            return through(self.problem, a, pick_scale(self.experts.down_input_scale, expert))
        return a.to(self.dtype) if out is None else out.copy_(a)


def compute_dtype(problem: MoeProblem) -> torch.dtype:
    """Of the matrix products: the widest of x and dense weights, which converts neither lossily.

    float32 where one of them is float16, whose range the weights, the products or the intermediate may leave, and
    with quantised activations (the step of an intermediate must not depend on a bf16 rounding).
    """
    held = problem.weight_dtype or problem.dtype
    if problem.input_format is not None or torch.float16 in (problem.dtype, held):
        return torch.float32
    return torch.promote_types(problem.dtype, held)


@dataclass(frozen=True)
class Groups:
    """Pairs sorted by local expert; those of other experts come last."""

    local: torch.Tensor  # [P] int32, ascending; L for a pair that is not of this rank
    token: torch.Tensor  # [P] int64
    weight: torch.Tensor  # [P, 1] float32

    def on_host(self, num_local_experts: int) -> list[tuple[int, int, int]]:
        """(expert, begin, end) of every expert that is hit. Waits for the device."""
        experts, counts = torch.unique_consecutive(self.local, return_counts=True)
        begin, spans = 0, []
        for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
            if expert < num_local_experts:
                spans.append((expert, begin, begin + count))
            begin += count
        return spans

    def ends(self, num_local_experts: int) -> torch.Tensor:
        """[L] int32: where each expert's pairs end, on the device."""
        bounds = torch.arange(num_local_experts, dtype=torch.int32, device=self.local.device)
        return torch.searchsorted(self.local, bounds, right=True, out_int32=True)


def local_ids(call: Call) -> torch.Tensor:
    """[N, K] int32: the expert on this rank, or L for a pair that is not of this rank."""
    p = call.problem
    local = call.ids - p.expert_offset
    foreign = (local < 0) | (local >= p.num_local_experts)
    return local.masked_fill_(foreign, p.num_local_experts)


def sort_pairs(call: Call) -> Groups:
    """Stable, so that an expert's pairs are in the order of tokens."""
    local, order = torch.sort(local_ids(call).view(-1), stable=True)
    top_k = call.ids.shape[1]
    return Groups(local, order // top_k, call.weights.view(-1).index_select(0, order).unsqueeze(-1))


def pick_scale(scale: torch.Tensor | None, expert: torch.Tensor | int) -> torch.Tensor | None:
    """The calibrated scale of `expert`: one for all, or one each."""
    return scale[expert] if scale is not None and scale.ndim else scale


def is_indexable(tensor: FormatTensor) -> bool:
    """Whether every piece has the experts first, so that some can be taken without the host."""
    if tensor.layout != CHECKPOINT:
        return False
    pieces = [getattr(tensor, f.name) for f in dataclasses.fields(tensor)]  # type: ignore[arg-type]
    tensors = [piece for piece in pieces if isinstance(piece, torch.Tensor)]
    return all(piece.shape[0] == tensor.shape[0] for piece in tensors)


def dense_of(tensor: FormatTensor, index: torch.Tensor | slice, dtype: torch.dtype) -> torch.Tensor:
    """Dense [M, R, C] of some experts: those of a slice, or (of an indexable tensor) of an index tensor."""
    if is_indexable(tensor):
        pieces = {f.name: getattr(tensor, f.name) for f in dataclasses.fields(tensor)}  # type: ignore[arg-type]
        taken = {name: v[index] for name, v in pieces.items() if isinstance(v, torch.Tensor)}
        some: FormatTensor = dataclasses.replace(tensor, **taken)  # type: ignore[type-var]
        return some.dequantize(dtype)
    assert isinstance(index, slice), "an index tensor needs an indexable layout"
    return torch.stack([tensor.expert(e).dequantize(dtype) for e in range(*index.indices(tensor.shape[0]))])


def expert_of(
    tensor: FormatTensor, expert: int, dtype: torch.dtype, buffer: torch.Tensor | None
) -> torch.Tensor:
    """Dense [R, C] of one expert, written to the start of `buffer` if there is one.

    New memory costs three times what the values do (4.9 instead of 1.3 ms for 1536 x 2048 NVFP4).
    """
    one = tensor.expert(expert)
    if buffer is None:
        return one.dequantize(dtype)
    rows, columns = one.shape
    out = buffer[: rows * columns].view(rows, columns)
    return one.dequantize(dtype, out=out)


def scatter_add(acc: torch.Tensor, token: torch.Tensor, rows: torch.Tensor, deterministic: bool) -> None:
    """acc[token] += rows; a fixed order of additions on request (index_add_ has one on the CPU only)."""
    if deterministic and acc.is_cuda:
        acc.index_put_((token,), rows, accumulate=True)
    else:
        acc.index_add_(0, token, rows)


def finish(call: Call, acc: torch.Tensor) -> torch.Tensor:
    """Round the float32 sums once, into call.out."""
    return call.out if acc is call.out else call.out.copy_(acc)
