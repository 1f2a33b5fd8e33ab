"""Entry point for `ray job submit -- python jobs/ingest.py …`: the arguments of `rerank-ray ingest`."""

import sys

from rerank_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["ingest", *sys.argv[1:]]))
