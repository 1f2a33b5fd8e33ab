"""Entry point for `ray job submit`: the arguments of `rerank-ray distill-rationales`."""

import sys

from rerank_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["distill-rationales", *sys.argv[1:]]))
