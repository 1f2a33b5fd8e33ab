"""Entry point for `ray job submit -- python jobs/reinforce.py …`: the arguments of `rerank-ray reinforce`."""

import sys

from rerank_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["reinforce", *sys.argv[1:]]))
