"""Dense weights on a Hopper GPU: PYTHONPATH=src python .gpu/dense.py PART...; parts: check deepseek qwen3 mixtral split red.

All kernels are compiled in parallel first. A line a result, all of them in $OUT/dense.json after every step. Exits 3
when nothing has happened for 60 s.
"""
import json, os, statistics, sys, threading, time, traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
import torch, triton
import triton.language as tl
from moestro.formats import BF16, NVFP4
from moestro.kernels.activations import GeGLUTanh, ReLU2, SwiGLU
from moestro.kernels.problem import MoeProblem
from moestro.kernels.triton import TritonRunner, choose
from moestro.kernels.triton.paths import dense, dequantized, fused
from moestro.kernels.triton.tactic import Tile
from moestro.moe import reference
DEV = os.environ.get("DENSE_DEV", "cuda"); OUT = os.environ.get("OUT", "/tmp"); T0 = time.time(); results = []; beat = [time.time()]
PARTS = sys.argv[1:] or ["check", "deepseek", "qwen3", "mixtral", "split", "red"]
def alive(): beat[0] = time.time()
def note(**k):
    alive(); results.append(k); print(json.dumps(k), flush=True)
    json.dump(results, open(f"{OUT}/dense.json", "w"), indent=0)
def dog():
    while True:
        time.sleep(1)
        if time.time() - beat[0] > 60: print("HANG", flush=True); os._exit(3)
threading.Thread(target=dog, daemon=True).start()
T = dense.tactic
# beside the table: other walks, fewer stages a turn, other narrow tiles, two programs of one consumer
OTHERS = (
    replace(T(256, Tile(128, 4, 8, 4), "quarters"), raster_group=16), replace(T(256, Tile(128, 4, 8, 4), "quarters"), raster_group=4),
    T(256, Tile(128, 2, 8, 4), "quarters"), T(256, Tile(128, 4, 8, 4), ""), T(256, Tile(128, 4, 8, 4), "halves"),
    replace(T(128, Tile(256, 4, 8, 4), "quarters"), raster_group=16), T(128, Tile(256, 4, 8, 4), ""),
    T(128, Tile(128, 2, 4, 3), "halves"), replace(T(288, Tile(128, 4, 8, 4)), raster_group=16),
    T(96, Tile(256, 4, 8, 3)), T(64, Tile(128, 4, 8, 8), "quarters"), T(64, Tile(128, 4, 4, 4), "quarters"), T(96, Tile(128, 4, 8, 7)),
)
def words(t): return f"{t.path} {t.pairs1}{'/' + str(t.pairs2) if t.pairs2 else ''}x{t.gemm1.rows} k{t.gemm1.k_blocks} w{t.gemm1.warps} s{t.gemm1.stages} {t.narrow or 'whole'} g{t.raster_group}"
def tactics(p, N, others=True):
    found = [t for t in (*dense.TABLE["dense"], *(OTHERS if others else ()))]
    found += list(dequantized.TABLE["dense"])
    if N <= 1024: found += [t for t in fused.TABLE["dense"] if t.route == "sorted" and t.split_k == 1 and t.pairs1 >= 16]
    found = [choose.fitted(p, t) for t in found]
    return [t for t in dict.fromkeys(found) if choose.why_not(p, t, N) is None]
def matrix(E, R, C, g, dtype):
    d = torch.empty(E, R, C, dtype=dtype, device=DEV)
    for e in range(E): d[e] = torch.randn(R, C, device=DEV, generator=g) / C**0.5
    return BF16(d)
def make(E, K, H, I, act=SwiGLU(), bias=False, dtype=torch.bfloat16, E_all=0, off=0, invariant=False):
    g = torch.Generator(DEV).manual_seed(H + I); rows = 2 * I if act.gated else I
    b = dict(gate_up_bias=torch.randn(E, rows, device=DEV, generator=g) if bias else None, down_bias=torch.randn(E, H, device=DEV, generator=g) if bias else None, gate_up_input_scale=None, down_input_scale=None)
    raw = SimpleNamespace(gate_up=matrix(E, rows, H, g, dtype), down=matrix(E, H, I, g, dtype), **b)
    p = MoeProblem(E_all or E, E, off, K, H, I, "bf16", act, None, dtype, "cuda", biased=bias, cuda_graph=True, batch_invariant=invariant, weight_dtype=dtype)
    return TritonRunner(p, raw), raw, p
def inputs(p, N, seed=0, spread=1.0):
    g = torch.Generator(DEV).manual_seed(seed)
    ids = torch.topk(torch.softmax(spread * torch.randn(N, p.num_experts, device=DEV, generator=g), -1), p.top_k)[1].to(torch.int32)
    return [torch.randn(N, p.hidden_size, device=DEV, generator=g).to(p.dtype), ids, torch.rand(N, p.top_k, device=DEV, generator=g), torch.full((N, p.hidden_size), float("nan"), device=DEV, dtype=p.dtype)]
def compile_all(jobs):
    alive(); t = time.time(); failed = []
    def one(job):
        try: job[1](); alive()
        except Exception as e: failed.append([str(job[0])[:200], f"{type(e).__name__} {str(e)[-200:]}"])
    with ThreadPoolExecutor(16) as pool: list(pool.map(one, jobs.items()))
    note(compiled=len(jobs), seconds=round(time.time() - t, 1), at=round(time.time() - T0, 1), failed=failed)
def poison(r, N, t): r.use_workspace(torch.full((r.workspace_bytes(N, t),), 0xFF, dtype=torch.uint8, device=DEV))
def rel(a, b): return float((a.float() - b.float()).norm() / b.float().norm())
CASES = [(8, 2, 512, 256, {}), (4, 2, 720, 464, dict(bias=True, E_all=16, off=5)), (4, 2, 328, 104, dict(act=ReLU2(), bias=True)), (4, 2, 136, 88, dict(act=GeGLUTanh(), bias=True, dtype=torch.float16)), (5, 3, 1024, 640, dict(act=SwiGLU(1.702, 7.0, 1.0), bias=True))]
NS = (1, 3, 37, 200, 700, 1200)
def of_case(c, p, N):
    """The table on every case, the others on the first."""
    return [t for t in tactics(p, N, others=c is CASES[0]) if t.path == "dense"]
def check():
    made = [(c, *make(*c[:4], **c[4])) for c in CASES]; jobs = {}
    for c, r, raw, p in made:
        for t in of_case(c, p, 700): jobs.update(r.compile_jobs(inputs(p, 700), t))
    compile_all(jobs); worst, bad, count = 0.0, 0, 0
    for c, r, raw, p in made:
        for N in NS:
            x = inputs(p, N, N); x[1][N - 1, 0] = -7; x[1][0, 0] = p.num_experts + 3
            if N > 3: x[1][x[1] == p.expert_offset + 2] = p.expert_offset + 3
            ref = reference.fused_moe(x[0], x[1], x[2], raw, activation=p.activation, expert_offset=p.expert_offset)
            for t in of_case(c, p, N):
                try:
                    poison(r, N, t); x[3].fill_(float("nan")); r.forward(x, t); torch.cuda.synchronize(); alive()
                    e = rel(x[3], ref); count += 1; worst = max(worst, e) if e == e else float("nan")
                    if not e < 6e-3: bad += 1; note(WRONG=words(t), N=N, sizes=c[:4], error=e)
                except Exception as e: bad += 1; note(FAILED=words(t), N=N, sizes=c[:4], why=f"{type(e).__name__} {str(e)[-300:]}"); 
                if bad > 20: note(check="stopped", bad=bad); return
    note(check="done", rows=count, bad=bad, worst=worst, at=round(time.time() - T0, 1))
    same = {}; r, raw, p = make(8, 2, 1024, 512, invariant=True); x = inputs(p, 700, 5); base = None; jobs = {}
    for t in tactics(p, 700): jobs.update(r.compile_jobs(x, t))
    compile_all(jobs)
    alive()
    for t in tactics(p, 700):
        x[3].fill_(float("nan")); poison(r, 700, t); alive(); y = r.forward(x, t).clone(); base = y if base is None else base
        one = [v[5:6].clone() for v in x[:3]] + [torch.empty_like(x[3][5:6])]; poison(r, 1, t)
        same[words(t)] = [bool(torch.equal(y, base)), bool(torch.equal(r.forward(one, t)[0], base[5]))]
    note(invariant_all=all(all(v) for v in same.values()), differing=[k for k, v in same.items() if not all(v)])
flush = None
def timed(fns, rounds):
    global flush
    if flush is None: flush = torch.empty(64 << 20, dtype=torch.int32, device=DEV)
    graphs = {}
    for n, f in fns.items():
        try:
            f(); torch.cuda.synchronize(); g = torch.cuda.CUDAGraph()
            with torch.cuda.graph(g): f()
            graphs[n] = g; alive()
        except Exception as e: note(FAILED=n, why=f"{type(e).__name__} {str(e)[-300:]}")
    times = {n: [] for n in graphs}
    for i in range(rounds):
        for n, g in graphs.items():
            flush.fill_(i); a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record(); g.replay(); b.record(); torch.cuda.synchronize(); times[n].append(a.elapsed_time(b) * 1e3); alive()
    return {n: round(statistics.median(v), 1) for n, v in times.items()}
MODELS = {"deepseek": (32, 8, 7168, 2048), "qwen3": (128, 8, 2048, 768), "mixtral": (8, 2, 4096, 14336)}
def grouped(x, ids, w, raw, E):
    K = ids.shape[1]; flat = ids.flatten().long(); order = flat.argsort(); ends = torch.bincount(flat, minlength=E).cumsum(0).to(torch.int32)
    h = torch._grouped_mm(x[order // K], raw.gate_up.data.transpose(-1, -2), offs=ends); gate, up = h.chunk(2, -1)
    y = torch._grouped_mm(torch.nn.functional.silu(gate) * up, raw.down.data.transpose(-1, -2), offs=ends)
    return torch.zeros_like(x).index_add_(0, order // K, y * w.flatten()[order].unsqueeze(-1).to(y.dtype))
def grouped_static(x, ids, w, raw, E):  # as captured: no bincount's synchronisation
    K = ids.shape[1]; flat = ids.flatten().long(); order = flat.argsort()
    ends = torch.zeros(E, dtype=torch.int32, device=DEV).scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32)).cumsum(0).to(torch.int32)
    h = torch._grouped_mm(x[order // K], raw.gate_up.data.transpose(-1, -2), offs=ends); gate, up = h.chunk(2, -1)
    y = torch._grouped_mm(torch.nn.functional.silu(gate) * up, raw.down.data.transpose(-1, -2), offs=ends)
    return torch.zeros_like(x).index_add_(0, order // K, y * w.flatten()[order].unsqueeze(-1).to(y.dtype))
ALL_N = [int(n) for n in os.environ.get("DENSE_N", "64,256,1024,4096,16384").split(",")]
def model(name, best):
    E, K, H, I = MODELS[name]; r, raw, p = make(E, K, H, I); jobs = {}
    for N in ALL_N:
        for t in tactics(p, N): jobs.update(r.compile_jobs(inputs(p, N), t))
    compile_all(jobs)
    for N in ALL_N:
        x = inputs(p, N); found = tactics(p, N); each = N * K / E
        if each <= 24: found = [t for t in found if t.pairs1 <= 128]
        if each >= 200: found = [t for t in found if t.pairs1 >= 128]
        r.use_workspace(torch.empty(max(r.workspace_bytes(N, t) for t in found), dtype=torch.uint8, device=DEV))
        fns = {words(t): (lambda t=t: r.forward(x, t)) for t in found}
        fns["grouped_mm"] = lambda: grouped_static(x[0], x[1], x[2], raw, E)
        us = timed(fns, 7 if N <= 4096 else 5); order = sorted(us, key=us.get); ours = {words(t): t for t in found}
        best[name, N] = [ours[k] for k in order if k in ours and k.startswith("dense ")][:1] + [ours[k] for k in order if k.startswith("dequantized")][:1]
        for k in order[:8] + [k for k in order[8:] if not k.startswith("dense ")]: note(model=name, N=N, what=k, us=us[k], tflops=round(6 * N * K * H * I / us[k] / 1e6), tbs=round(6 * E * H * I / us[k] / 1e6, 2))
        note(model=name, N=N, all=us)
        y, z = r.forward(x, best[name, N][0]).clone(), r.forward(x, best[name, N][1])
        if not rel(y, z) < 6e-3: note(WRONG=name, N=N, against_dequantized=rel(y, z))
    print(name, "at", round(time.time() - T0, 1), flush=True)
    if "split" in PARTS: split(name, r, p, best)
    del r, raw; torch.cuda.empty_cache()
def split(name, r, p, best):
    """Each launch of a call alone."""
    for N in (256, 1024, 16384):
        if (name, N) not in best: continue
        x = inputs(p, N)
        for t in best[name, N]:
            r.use_workspace(torch.empty(r.workspace_bytes(N, t), dtype=torch.uint8, device=DEV)); r.forward(x, t); launches = r.plan(x, t); torch.cuda.synchronize()
            us = timed({f"{i} {l.kernel.__name__}": l.run for i, l in enumerate(launches)}, 5)
            note(split=name, N=N, tactic=words(t), us=us)
@triton.jit
def scatter(partial, pairs, out, H, K: tl.constexpr, RED: tl.constexpr, B: tl.constexpr):
    """A tile of 128 sorted pairs x B columns: stored by pair, or added to the token's row."""
    i = tl.program_id(0) * 128 + tl.arange(0, 128); c = tl.program_id(1) * B + tl.arange(0, B)
    pair = tl.load(pairs + i).to(tl.int64)
    v = tl.load(partial + i.to(tl.int64)[:, None] * H + c[None, :])
    if RED:
        at = (out + (pair // K)[:, None] * H + c[None, :]).to(tl.int64, bitcast=True)
        tl.inline_asm_elementwise(
            "red.global.add.noftz.v4.bf16x2 [$12], {$8, $9, $10, $11}; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; mov.b32 $4, 0; mov.b32 $5, 0; mov.b32 $6, 0; mov.b32 $7, 0;",
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,l,l,l,l,l,l,l,l", [v, at], dtype=tl.int32, is_pure=False, pack=8)
    else:
        tl.store(out + pair[:, None] * H + c[None, :], v)
def red():
    """What adding pairs' results to the output costs (bf16, red.v4.bf16x2) beside writing them and summing."""
    for H, K, N in ((2048, 8, 16384), (7168, 8, 16384), (2048, 8, 4096)):
        P = N * K; g = torch.Generator(DEV).manual_seed(0); partial = torch.randn(P, H, device=DEV, dtype=torch.bfloat16, generator=g)
        pairs = torch.argsort(torch.topk(torch.rand(N, 128, device=DEV, generator=g), K)[1].flatten(), stable=True).to(torch.int32)
        out, by_pair = torch.zeros(N, H, device=DEV, dtype=torch.bfloat16), torch.empty(P, H, device=DEV, dtype=torch.bfloat16)
        for B in (128, 256):
            call = lambda red, to: scatter[P // 128, H // B](partial, pairs, to, H, K, red, B, num_warps=4)
            call(True, out); torch.cuda.synchronize(); truth = torch.zeros(N, H, device=DEV).index_add_(0, pairs.long() // K, partial.float())
            error = rel(out, truth); out.zero_()
            us = timed({"red": lambda: call(True, out), "store by pair": lambda: call(False, by_pair), "zero": lambda: out.zero_()}, 5)
            note(red=[H, K, N, B], us=us, error=error); out.zero_()
def guarded(name, f, *args):
    try: f(*args)
    except Exception: note(FAILED=name, why=traceback.format_exc()[-800:])
if __name__ == "__main__":
    best = {}
    if "check" in PARTS: guarded("check", check)
    for name in MODELS:
        if name in PARTS: guarded(name, model, name, best)
    if "red" in PARTS: guarded("red", red)
    print("done", round(time.time() - T0, 1), flush=True)
