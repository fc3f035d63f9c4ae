"""Runs one harness under a fuzzer that follows the coverage; see the package.

python -m tests.fuzz NAME [-max_total_time=SECONDS] [other options of libFuzzer]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Fuzz the harness that the first argument names."""
    import atheris

    with atheris.instrument_imports(include=["arm_ray", "json", "pickle", "yaml"]):
        from tests.fuzz.harnesses import HARNESSES
    if len(sys.argv) < 2 or sys.argv[1] not in HARNESSES:
        sys.exit(f"usage: python -m tests.fuzz {{{','.join(HARNESSES)}}} [-max_total_time=60]")
    harness = HARNESSES[sys.argv[1]]
    corpus = Path(tempfile.mkdtemp(prefix="corpus-"))
    for number, seed in enumerate(harness.seeds):
        (corpus / str(number)).write_bytes(seed)
    limits = ["-timeout=20", "-rss_limit_mb=2048", "-max_len=4096"]
    atheris.Setup([sys.argv[0], str(corpus), *limits, *sys.argv[2:]], harness.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
