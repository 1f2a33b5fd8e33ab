"""Entry point for `ray job submit -- python jobs/evaluate.py …`: the arguments of `rerank-ray evaluate`."""

import sys

from rerank_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
