"""Several moestro commands in one process: what is imported and compiled once serves them all.

    python benchmarks/several.py 'bench --model qwen3-30b-a3b --device cuda' 'tune --model mixtral-8x7b'

Each argument is one command line without the leading `moestro`. One that fails does not stop the others; the
exit status is the number that failed.
"""

from __future__ import annotations

import shlex
import sys
import time
import traceback

from moestro.cli.app import main


def run(command: str) -> bool:
    """Run one command line as `moestro` would; whether it succeeded."""
    sys.argv = ["moestro", *shlex.split(command)]
    print(f"\n$ moestro {command}", flush=True)
    started = time.monotonic()
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code
    except Exception:
        traceback.print_exc()
        code = 1
    print(f"[{time.monotonic() - started:.1f} s, exit status {code or 0}]", flush=True)
    return not code


if __name__ == "__main__":
    sys.exit(sum(not run(command) for command in sys.argv[1:]))
