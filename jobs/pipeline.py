"""`ray job submit … -- python -m jobs.pipeline CONFIG.yaml [section.key=value …]`."""

import sys

from arm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["pipeline", *sys.argv[1:]]))
