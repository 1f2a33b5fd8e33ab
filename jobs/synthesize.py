"""Entry point for `ray job submit -- python jobs/synthesize.py …`: the arguments of `rerank-ray synthesize`."""

import sys

from rerank_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["synthesize", *sys.argv[1:]]))
