"""Everything that is recorded on one GPU, in one process and a given time: tuning, the bundle, the peers.

    PYTHONPATH=src python benchmarks/h100_record.py OUT --seconds 240

In this order, until the time is over: tune the three models of docs/kernels.md, bench them beside the peers
with those decisions, then tune models in the formats that they are published in, then the other models. After each
step these three files are written anew, so that whatever ends it loses nothing:
    OUT/bundle.json   slim: copy it to src/moestro/tuning/bundles/h100.json to ship it
    OUT/tuning.json   with all evidence: benchmarks/results/h100-tuning.json, which `moestro bench recall` and
                      tests/bench/test_recall.py read
    OUT/record.json   what each command wrote, by its command line
Decisions hold for the kernels of this checkout: `moestro doctor` says whether a bundle's are these.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from several import run

TOKENS = "1..16384"
FIRST = {  # what docs/kernels.md has figures of
    "mixtral-8x7b": "",
    "qwen3-30b-a3b": "",
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
AS_PUBLISHED = (  # model, ranks, the format that its checkpoint has
    ("gpt-oss-20b", "", "mxfp4"),
    ("gpt-oss-120b", "", "mxfp4"),
    ("deepseek-v3", "--ep 8 --local-pairs", "fp8_block"),
)
LOOSE = "--loose mode --loose cuda_graph --loose expert_offset"


class Recorder:
    """Runs commands and keeps OUT up to date."""

    def __init__(self, out: Path) -> None:
        self.out, self.work = out, Path(tempfile.mkdtemp())
        self.store = self.work / "store"
        self.failed = 0
        out.mkdir(parents=True, exist_ok=True)

    def __call__(self, command: str) -> None:
        """Run a command with a --json of its own, and write the files anew."""
        path = self.work / f"{len(list(self.work.glob('*.json'))):03}.json"
        self.failed += not run(f"{command} --store {self.store} --json {path}")
        found = [json.loads(p.read_text()) for p in sorted(self.work.glob("*.json"))]
        (self.out / "record.json").write_text(json.dumps({r["command"]: r for r in found}, indent=1) + "\n")

    def export(self) -> None:
        """The bundle and all evidence."""
        for name, options in (("bundle.json", f"--slim {LOOSE}"), ("tuning.json", "")):
            self.failed += not run(f"cache export {self.out / name} --store {self.store} {options}")


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
    record, end = Recorder(args.out), time.monotonic() + args.seconds

    def tune(model: str, ranks: str, fmt: str = "nvfp4") -> None:
        left = end - time.monotonic()
        if left < args.each / 2:
            print(f"no time left for {model} {ranks} {fmt}")
            return
        budget = min(args.each, left * 0.7)
        record(f"tune -m {model} {ranks} -d cuda -f {fmt} -n {TOKENS} --budget {budget:.0f}")
        record.export()

    for model, ranks in FIRST.items():
        tune(model, ranks)
    for model, ranks in FIRST.items():
        record(
            f"bench -m {model} {ranks} -d cuda -f nvfp4 -n 1,4,16,64,256,1024,4096,16384 "
            f"--peers {args.peers} --seconds 0.15 --rounds 15"
        )
    for model, ranks, fmt in AS_PUBLISHED:
        tune(model, ranks, fmt)
    for model, ranks in OTHERS:
        tune(model, ranks)
    record.failed += not run(f"bench recall {args.out}/tuning.json")
    return record.failed


if __name__ == "__main__":
    sys.exit(main())
