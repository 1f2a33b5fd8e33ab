"""Entry point for `ray job submit -- python jobs/pipeline.py …`: the arguments of `rerank-ray pipeline`."""

import sys

from rerank_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["pipeline", *sys.argv[1:]]))
