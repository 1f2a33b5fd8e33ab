"""FlagEmbedding's LLM reranker in its own environment: one JSON request a line in, one answer a line out.

The first line has the reranker's arguments; every further line is a list of [query, passage] pairs, answered with their
scores and the seconds that it took (of CPU time, on one thread).
"""

import json
import sys
import time

import torch
from FlagEmbedding import FlagLLMReranker

torch.set_num_threads(1)
answers = sys.stdout
sys.stdout = sys.stderr  # progress bars and prints of the libraries
reranker = FlagLLMReranker(**json.loads(sys.stdin.readline()))
for line in sys.stdin:
    pairs = [tuple(pair) for pair in json.loads(line)]
    started = time.process_time()
    scores = reranker.compute_score(pairs)
    seconds = time.process_time() - started
    print(json.dumps({"scores": [float(s) for s in scores], "seconds": seconds}), file=answers, flush=True)
