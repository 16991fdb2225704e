"""One layer on two checkouts of this repository, alternating on one CUDA device.

    python benchmarks/gpu_before_after.py BEFORE/src AFTER/src --json out.json

Each checkout runs in a process of its own, which captures graphs of its default tactics and replays them when asked;
the processes take turns. Protocol: 256 MiB written before each replay (cold L2), medians. NVFP4 and bf16 weights of
the same bits, the same routing; results are compared bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

MODELS = {
    "qwen3": (128, 8, 2048, 768), "mixtral": (8, 2, 4096, 14336), "deepseek": (32, 8, 7168, 2048),
}  # fmt: skip


def serve() -> None:
    """A worker: one JSON request a line, one answer a line."""
    import hashlib
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from moestro.formats import BF16, NVFP4
    from moestro.kernels.problem import MoeProblem
    from moestro.kernels.triton import TritonRunner

    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    made: dict[str, Any] = {}
    graphs: dict[str, Any] = {}

    def weights(fmt: str, experts: int, rows: int, columns: int, gen: torch.Generator) -> Any:
        if fmt == "bf16":
            dense = torch.empty(experts, rows, columns, dtype=torch.bfloat16, device="cuda")
            for e in range(experts):
                dense[e] = torch.randn(rows, columns, device="cuda", generator=gen) / columns**0.5
            return BF16(dense)
        shape = (experts, rows, columns // 2)
        packed = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda", generator=gen)
        scale = torch.rand(experts, rows, columns // 16, device="cuda", generator=gen) + 0.5
        return NVFP4(
            packed, scale.to(torch.float8_e4m3fn), torch.full((experts,), 0.33 / columns**0.5).cuda()
        )

    def runner_of(model: str, fmt: str) -> Any:
        if (model, fmt) not in made:
            made.clear()
            experts, top_k, hidden, inter = MODELS[model]
            gen = torch.Generator("cuda").manual_seed(0)
            rest = dict.fromkeys(("gate_up_bias", "down_bias", "gate_up_input_scale", "down_input_scale"))
            gate_up = weights(fmt, experts, 2 * inter, hidden, gen)
            down = weights(fmt, experts, hidden, inter, gen)
            p = MoeProblem(experts, experts, 0, top_k, hidden, inter, fmt, device="cuda",
                           weight_dtype=torch.bfloat16 if fmt == "bf16" else None)  # fmt: skip
            pair = TritonRunner.prepare(p, SimpleNamespace(gate_up=gate_up, down=down, **rest))
            made[model, fmt] = TritonRunner(p, SimpleNamespace(gate_up=pair[0], down=pair[1], **rest))
        return made[model, fmt]

    def inputs_of(p: Any, n: int) -> list[torch.Tensor]:
        gen = torch.Generator("cuda").manual_seed(n)
        top, ids = torch.randn(n, p.num_experts, device="cuda", generator=gen).softmax(-1).topk(p.top_k, -1)
        x = torch.randn(n, p.hidden_size, device="cuda", generator=gen).bfloat16()
        return [
            x,
            ids.int().contiguous(),
            (top / top.sum(-1, keepdim=True)).contiguous(),
            torch.empty_like(x),
        ]

    def prepare(model: str, fmt: str, tokens: list[int]) -> dict[str, Any]:
        graphs.clear()
        runner, digests = runner_of(model, fmt), {}
        all_inputs = {n: inputs_of(runner.problem, n) for n in tokens}
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: runner.compile(all_inputs[n], -1), tokens))
        for n, inputs in all_inputs.items():
            runner.use_workspace(torch.empty(runner.workspace_bytes(n, -1), dtype=torch.uint8, device="cuda"))
            runner.forward(inputs, -1)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                runner.forward(inputs, -1)
            graphs[str(n)] = (graph, runner._workspace, inputs)
            graph.replay()
            digests[str(n)] = hashlib.sha1(inputs[3].view(torch.int16).cpu().numpy().tobytes()).hexdigest()[
                :12
            ]
        return {"digests": digests}

    def once(graph: Any) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end) * 1e3)

    for line in sys.stdin:
        request = json.loads(line)
        if "prepare" in request:
            answer = prepare(*request["prepare"])
        else:
            graph = graphs[request["n"]][0]
            once(graph)
            answer = {"us": [once(graph) for _ in range(request["rounds"])]}
        print(json.dumps(answer), flush=True)


class Worker:
    def __init__(self, source: str) -> None:
        env = {**os.environ, "PYTHONPATH": source}
        command = [sys.executable, __file__, "--serve", source]
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def send(self, **request: Any) -> None:
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found


def compare(sources: list[str], cases: list[tuple[str, str]], tokens: list[int]) -> list[dict[str, Any]]:
    workers, rows = [Worker(source) for source in sources], []
    for model, fmt in cases:
        for worker in workers:
            worker.send(prepare=[model, fmt, tokens])
        digests = [worker.answer()["digests"] for worker in workers]
        for n in map(str, tokens):
            samples: list[list[float]] = [[], []]
            for turn in range(8):
                for i in (0, 1) if turn % 2 == 0 else (1, 0):
                    workers[i].send(n=n, rounds=4)
                    samples[i] += workers[i].answer()["us"]
            before, after = map(statistics.median, samples)
            same = digests[0][n] == digests[1][n]
            rows.append({"model": model, "format": fmt, "tokens": int(n), "before_us": round(before, 2),
                         "after_us": round(after, 2), "ratio": round(after / before, 4), "same_bits": same})  # fmt: skip
            print(f"{model} {fmt} N={n}: before {before:.1f}, after {after:.1f} us, {after / before:.3f}, "
                  f"{'same bits' if same else 'OTHER BITS'}", flush=True)  # fmt: skip
    for worker in workers:
        worker.process.stdin.close()  # type: ignore[union-attr]
        worker.process.wait()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--tokens", default="1,16,256,4096")
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    cases = [*((model, "nvfp4") for model in MODELS), ("qwen3", "bf16")]
    rows = compare(args.sources, cases, [int(t) for t in args.tokens.split(",")])
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"argv": sys.argv[1:], "rows": rows}, f, indent=1)


if __name__ == "__main__":
    main()
