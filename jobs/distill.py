"""Entry point for `ray job submit -- python jobs/distill.py …`: the arguments of `rerank-ray distill`."""

import sys

from rerank_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
