"""Entry point for `ray job submit -- python jobs/label.py …`: the arguments of `rerank-ray label`."""

import sys

from rerank_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["label", *sys.argv[1:]]))
