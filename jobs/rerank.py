"""Entry point for `ray job submit -- python jobs/rerank.py …`: the arguments of `rerank-ray rerank`."""

import sys

from rerank_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["rerank", *sys.argv[1:]]))
