"""Everything that is recorded on one GPU, in one process and a given time: tuning, the bundle, the peers.

    PYTHONPATH=src python benchmarks/h100_record.py OUT --seconds 240

In this order, until the time is over: tune the three models of docs/kernels.md, bench them beside the peers
with those decisions, then tune the other models; at the end (and when the time is over) write
    OUT/bundle.json        slim: copy it to src/moestro/tuning/bundles/h100.json to ship it
    OUT/tuning.json        with all evidence: benchmarks/results/h100-tuning.json, which `moestro bench recall`
                           and tests/bench/test_recall.py read
    OUT/tune-*.json, bench-*.json
Decisions hold for the kernels of this checkout: `moestro doctor` says whether a bundle's are these.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from several import run

TOKENS = "1..16384"
FIRST = {  # what docs/kernels.md has figures of
    "qwen3-30b-a3b": "",
    "mixtral-8x7b": "",
    "deepseek-v3": "--ep 8 --local-pairs",
}
OTHERS = (  # the models of bench/models.py whose formats the kernels run, as people serve them
    ("deepseek-v3", "--ep 8"),
    ("qwen3-235b-a22b", ""),
    ("glm-4.5", ""),
    ("qwen3-next-80b-a3b", ""),
    ("kimi-k2", "--ep 8"),
    ("llama-4-scout", ""),
    ("llama-4-maverick", ""),
    ("olmoe-1b-7b", ""),
    ("nemotron-3-nano-30b", ""),
    ("qwen3-235b-a22b", "--ep 8"),
    ("glm-4.5", "--ep 8"),
    ("deepseek-v3", "--ep 16"),
)
LOOSE = "--loose mode --loose cuda_graph --loose expert_offset"


def main() -> int:
    """How many of the commands failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--each", type=float, default=25.0, help="budget of tuning one model")
    parser.add_argument("--peers", default="grouped_mm,humming")
    args = parser.parse_args()
    out, end = args.out, time.monotonic() + args.seconds
    out.mkdir(parents=True, exist_ok=True)
    store, failed = out / "store", 0

    def tune(model: str, ranks: str, seconds: float) -> bool:
        name = f"{model}{ranks.replace('--', '-').replace(' ', '')}"
        return run(
            f"tune -m {model} {ranks} -d cuda -f nvfp4 -n {TOKENS} --budget {seconds:.0f} --store {store} "
            f"--json {out}/tune-{name}.json"
        )

    for model, ranks in FIRST.items():
        failed += not tune(model, ranks, args.each)
    for model, ranks in FIRST.items():
        failed += not run(
            f"bench -m {model} {ranks} -d cuda -f nvfp4 -n 1,4,16,64,256,1024,4096,16384 --store {store} "
            f"--peers {args.peers} --seconds 0.15 --rounds 15 --json {out}/bench-{model}.json"
        )
    for model, ranks in OTHERS:
        left = end - time.monotonic()
        if left < args.each / 2:
            print(f"no time left for {model} {ranks}")
            continue
        failed += not tune(model, ranks, min(args.each, left * 0.8))
    failed += not run(f"cache export {out}/bundle.json --store {store} --slim {LOOSE}")
    failed += not run(f"cache export {out}/tuning.json --store {store}")
    failed += not run(f"bench recall {out}/tuning.json")
    return failed


if __name__ == "__main__":
    sys.exit(main())
