"""`ray job submit … -- python -m jobs.merge CONFIG.yaml [section.key=value …]`."""

import sys

from arm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["merge", *sys.argv[1:]]))
