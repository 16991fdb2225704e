"""The portable tactics: four ways to run the experts, which differ in what they read, compute and hold.

| tactic | reads | computes | dequantises at once | waits for the device |
|---|---|---|---|---|
| pairs | each pair's expert, again for each pair | the pairs | `knob` experts | never |
| loop | each hit expert once | the pairs | one expert | once |
| grouped | the experts of each chunk that is hit | the pairs | `knob` experts | once; never if one chunk |
| masked | every expert once | every token with every expert | `knob` experts | never |

Dense weights of the compute dtype are used where they are. Each tactic writes call.out; sums over a token's
experts are in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moestro.kernels.portable.stages import (
    Call,
    compute_dtype,
    dense_of,
    expert_of,
    finish,
    local_ids,
    scatter_add,
    sort_pairs,
)
from moestro.kernels.problem import MoeProblem
from moestro.kernels.scratch import Plan, carve

Span = tuple[int, int, int]  # expert, begin, end of its sorted pairs

SLAB = 1024  # rows at once in `loop`: its buffers stay in the last-level cache
TOKEN_SLAB = 256  # tokens at once in `masked`


def accumulator_plan(problem: MoeProblem, num_tokens: int) -> Plan:
    """A float32 accumulator where the output is not one itself."""
    if problem.dtype == torch.float32:
        return {}
    return {"acc": ((num_tokens, problem.hidden_size), torch.float32)}


def loop_plan(problem: MoeProblem, num_tokens: int) -> Plan:
    """What `loop` works in: the accumulator, and a slab of rows at each stage."""
    p, dtype = problem, compute_dtype(problem)
    rows = min(num_tokens * p.top_k, SLAB)
    gather: Plan = {} if p.input_format else {"x": ((rows, p.hidden_size), p.dtype)}
    weight: Plan = {} if p.weight_dtype == dtype else {"w": ((p.gate_up_rows * p.hidden_size,), dtype)}
    return {
        **accumulator_plan(problem, num_tokens),
        **gather,
        **weight,
        "h": ((rows, p.gate_up_rows), dtype),
        "a": ((rows, p.intermediate_size), dtype),
        "y": ((rows, p.hidden_size), dtype),
        "y32": ((rows, p.hidden_size), torch.float32),
    }


def run_loop(call: Call, workspace: torch.Tensor | None) -> torch.Tensor:
    """One product per hit expert, a slab of rows of consecutive experts at a time.

    All first products of a slab run before its second ones: alternating the two cost 20 % at 4 to 32 tokens.
    """
    p, w = call.problem, call.experts
    bufs = carve(loop_plan(p, len(call.x)), workspace, call.x.device)
    acc = bufs.get("acc", call.out).zero_()
    groups = sort_pairs(call)
    for spans in slabs(groups.on_host(p.num_local_experts)):
        begin, end = spans[0][1], spans[-1][2]
        rows, token = end - begin, groups.token[begin:end]
        local = groups.local[begin:end]
        h, a, y, y32 = (bufs[name][:rows] for name in ("h", "a", "y", "y32"))
        x = call.rows(token, local, bufs["x"][:rows] if "x" in bufs else None)  # [M, H]
        for expert, first, last in spans:
            at = slice(first - begin, last - begin)
            torch.mm(x[at], expert_of(w.gate_up, expert, call.dtype, bufs.get("w")).T, out=h[at])
        a = call.activate(h, None if w.gate_up_bias is None else w.gate_up_bias[local], local, out=a)
        for expert, first, last in spans:
            at = slice(first - begin, last - begin)
            torch.mm(a[at], expert_of(w.down, expert, call.dtype, bufs.get("w")).T, out=y[at])
        y32.copy_(y)
        if w.down_bias is not None:
            y32.add_(w.down_bias[local])
        scatter_add(acc, token, y32.mul_(groups.weight[begin:end]), p.deterministic)
    return finish(call, acc)


def slabs(spans: list[Span]) -> Iterator[list[Span]]:
    """Runs of consecutive experts with at most SLAB rows in all; an expert with more is cut."""
    slab: list[Span] = []
    for expert, begin, end in spans:
        for first in range(begin, end, SLAB):
            last = min(first + SLAB, end)
            if slab and last - slab[0][1] > SLAB:
                yield slab
                slab = []
            slab.append((expert, first, last))
    if slab:
        yield slab


def run_grouped(call: Call, workspace: torch.Tensor | None, chunk: int) -> torch.Tensor:
    """torch._grouped_mm over the sorted pairs, `chunk` experts at a time."""
    p, num_experts = call.problem, call.problem.num_local_experts
    acc = carve(accumulator_plan(p, len(call.x)), workspace, call.x.device).get("acc", call.out).zero_()
    groups = sort_pairs(call)
    ends = groups.ends(num_experts)  # [L]
    if chunk >= num_experts:
        # Rows past the last end are pairs of other experts: never written by grouped_mm, dropped here.
        y = _grouped_products(call, groups.local, groups.token, slice(0, num_experts), ends)
        y32 = y.float().mul_(groups.weight).masked_fill_((groups.local == num_experts).unsqueeze(-1), 0.0)
        scatter_add(acc, groups.token, y32, p.deterministic)
        return finish(call, acc)
    bounds = [0, *ends.tolist()]
    for first in range(0, num_experts, chunk):
        last = min(first + chunk, num_experts)
        rows = slice(bounds[first], bounds[last])
        if rows.start == rows.stop:
            continue
        token, local = groups.token[rows], groups.local[rows]
        y = _grouped_products(call, local, token, slice(first, last), ends[first:last] - rows.start)
        scatter_add(acc, token, y.float().mul_(groups.weight[rows]), p.deterministic)
    return finish(call, acc)


def _grouped_products(
    call: Call, local: torch.Tensor, token: torch.Tensor, experts: slice, ends: torch.Tensor
) -> torch.Tensor:
    """[M, H]: both products for rows sorted by expert, in the compute dtype or wider."""
    w = call.experts
    index = local.clamp(max=call.problem.num_local_experts - 1)  # in bounds also for pairs of other experts
    gate_up = dense_of(w.gate_up, experts, call.dtype).mT  # [C, H, 2I]
    h = torch._grouped_mm(call.rows(token, index), gate_up, offs=ends)  # [M, 2I]
    a = call.activate(h, None if w.gate_up_bias is None else w.gate_up_bias[index], index)
    y = torch._grouped_mm(a, dense_of(w.down, experts, call.dtype).mT, offs=ends)
    return y if w.down_bias is None else y.float() + w.down_bias[index]


def run_pairs(call: Call, chunk: int) -> torch.Tensor:
    """`chunk` pairs at a time: gather their experts' weights, one batched product each."""
    p, w = call.problem, call.experts
    local = local_ids(call).view(-1)  # [P]
    foreign = (local == p.num_local_experts).unsqueeze(-1)
    index = local.clamp(max=p.num_local_experts - 1)
    token = torch.arange(call.num_pairs, device=local.device) // p.top_k
    y = torch.empty((call.num_pairs, p.hidden_size), dtype=torch.float32, device=local.device)
    for begin in range(0, call.num_pairs, chunk):
        at = slice(begin, begin + chunk)
        e = index[at]
        x = call.rows(token[at], e).unsqueeze(1)  # [C, 1, H]
        h = torch.bmm(x, dense_of(w.gate_up, e, call.dtype).mT).squeeze(1)  # [C, 2I]
        a = call.activate(h, None if w.gate_up_bias is None else w.gate_up_bias[e], e).unsqueeze(1)
        y[at] = torch.bmm(a, dense_of(w.down, e, call.dtype).mT).squeeze(1)
        if w.down_bias is not None:
            y[at] += w.down_bias[e]
    y = y.masked_fill_(foreign, 0.0).view(len(call.x), p.top_k, p.hidden_size)
    weights = call.weights.masked_fill(foreign.view_as(call.weights), 0.0).unsqueeze(1)
    return finish(call, torch.bmm(weights, y).squeeze(1))  # [N, 1, K] @ [N, K, H]: one order of additions


def run_masked(call: Call, workspace: torch.Tensor | None, chunk: int) -> torch.Tensor:
    """Every token through every expert, `chunk` experts at a time; what was not routed counts nothing."""
    p, w = call.problem, call.experts
    acc = carve(accumulator_plan(p, len(call.x)), workspace, call.x.device).get("acc", call.out).zero_()
    local = local_ids(call)  # [N, K]
    for first in range(0, p.num_local_experts, chunk):
        experts = slice(first, min(first + chunk, p.num_local_experts))
        index = torch.arange(experts.start, experts.stop, device=local.device)  # [C]
        gate_up = dense_of(w.gate_up, experts, call.dtype).mT  # [C, H, 2I]
        down = dense_of(w.down, experts, call.dtype).mT  # [C, I, H]
        for begin in range(0, len(call.x), TOKEN_SLAB):
            at = slice(begin, begin + TOKEN_SLAB)
            hit = local[at] == index[:, None, None]  # [C, M, K]
            x = call.x[at].expand(len(index), -1, -1)  # [C, M, H]
            h = torch.bmm(call.as_input(x, index[:, None]), gate_up)  # [C, M, 2I]
            bias = None if w.gate_up_bias is None else w.gate_up_bias[experts].unsqueeze(1)
            y = torch.bmm(call.activate(h, bias, index[:, None]), down).float()  # [C, M, H]
            if w.down_bias is not None:
                y = y + w.down_bias[experts].unsqueeze(1)
            weight = torch.where(hit, call.weights[at], 0.0).sum(-1).unsqueeze(-1)  # [C, M, 1]
            acc[at] += y.mul_(weight).masked_fill_(~hit.any(-1).unsqueeze(-1), 0.0).sum(0)
    return finish(call, acc)
