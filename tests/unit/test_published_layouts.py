"""Checkpoints in published layouts, scored as a plain unbatched loop over transformers' and PEFT's own classes scores
them, in float32, whatever the batch."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.published import colbert, llama_config, minicpm_layerwise, qwen3_reranker, rankllama
from fixtures.rows import make_list
from fixtures.tiny_models import tiny_t5_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaForSequenceClassification,
    LlamaModel,
)

from rerank_ray.config import validate
from rerank_ray.errors import ConfigError, ModelError
from rerank_ray.models.backends import load_backend
from rerank_ray.models.protocol import EmbedTokens, Pair
from rerank_ray.ranking.rankers import Ranker, preflight
from rerank_ray.records import Candidate, CandidateList, Query
from rerank_ray.settings.models import (
    ColBERTSettings,
    HFCausalSettings,
    HFSeq2SeqSettings,
    LayerwiseSettings,
    ScalarHeadSettings,
)
from rerank_ray.settings.rankers import CrossEncoderRankerSettings, MaxSimSettings, YesNoSettings

TEXTS = [
    "the cat",
    "a dog, a bird. and (the) cat!",
    "alpha " * 300,
    "beta gamma delta epsilon " * 12,
    "x",
    "{text} {query} \ue000 ünïcode 漢字",
    "...",
    "query passage document " * 5,
]
SHORT = [t for t in TEXTS if len(t) < 400]
QUERIES = ["which cat?", "alpha beta " * 60, "q"]


def candidate_list(query: str, texts: Sequence[str] = TEXTS) -> CandidateList:
    candidates = tuple(Candidate(doc_id=f"d{i}", text=t) for i, t in enumerate(texts))
    return CandidateList(query=Query(query_id=query[:20], text=query), candidates=candidates)


def check(
    ranker: Ranker, reference: Callable[[str, str], float], *, texts: Sequence[str] = TEXTS, different: int = 4
) -> None:
    """All lists in one batch, and one of them alone, score what the loop scores."""
    requests = [candidate_list(q, texts) for q in QUERIES]
    for request, outcome in zip(requests, ranker.rank(requests), strict=True):
        expected = [reference(request.query.text, c.text) for c in request.candidates]
        assert outcome.scores.scores == pytest.approx(expected, abs=1e-4)
        assert len({round(s, 3) for s in expected}) > different
    (alone,) = ranker.rank([candidate_list(QUERIES[0], TEXTS[3:4])])
    assert alone.scores.scores == pytest.approx([reference(QUERIES[0], TEXTS[3])], abs=1e-4)


# RankLLaMA


@pytest.fixture(scope="module")
def rankllama_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return rankllama(tmp_path_factory.mktemp("rankllama"))


def rankllama_reference(model, tokenizer, query: str, text: str) -> float:
    """`<s>`, the query's first 32 tokens, `<s>`, the document's first 161, and the model's own choice of position."""
    q = tokenizer(f"query: {query}", add_special_tokens=False)["input_ids"][:32]
    d = tokenizer(f"document: {text}", add_special_tokens=False)["input_ids"][:161]
    with torch.no_grad():
        return float(model(torch.tensor([[0, *q, 0, *d]])).logits[0, 0])


def cross_encoder(model) -> Ranker:
    return Ranker(CrossEncoderRankerSettings(model=model))


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("tokens_per_batch", [None, 512])
def test_rankllama(rankllama_folders: tuple[Path, Path], merge: bool, tokens_per_batch: int | None):
    base, adapter = rankllama_folders
    model = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), adapter
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    ranker = cross_encoder(
        ScalarHeadSettings(
            path=str(base),
            adapter=str(adapter),
            merge_adapter=merge,
            dtype="float32",
            tokens_per_batch=tokens_per_batch,
        )
    )
    check(ranker, lambda q, d: rankllama_reference(model, tokenizer, q, d))
    assert ranker.name.startswith(f"cross_encoder:scalar_head:{base}@")
    assert f"+{adapter}@" in ranker.name


def test_a_dora_adapter_is_merged_or_refused(tmp_path: Path):
    base, adapter = rankllama(tmp_path, use_dora=True)
    model = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), adapter
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    settings = {"path": str(base), "adapter": str(adapter), "dtype": "float32"}
    check(cross_encoder(ScalarHeadSettings(**settings)), lambda q, d: rankllama_reference(model, tokenizer, q, d))
    with pytest.raises(ModelError, match=r"is of DoRA, which reads the weights .* leave out merge_adapter: false"):
        load_backend(ScalarHeadSettings(**settings, merge_adapter=False))


def merged(rankllama_folders: tuple[Path, Path], folder: Path, **config) -> Path:
    """The adapter in the weights, as a sequence-classification checkpoint of its own."""
    base, adapter = rankllama_folders
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    for name, value in config.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def test_a_merged_checkpoint_whose_padding_token_occurs_in_texts(rankllama_folders: tuple[Path, Path], tmp_path: Path):
    """The last token of "x" is declared to be padding: the score is still read at it."""
    folder = merged(rankllama_folders, tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    expected = rankllama_reference(model, tokenizer, "q", "x")
    last = tokenizer("document: x", add_special_tokens=False)["input_ids"][-1]
    folder = merged(rankllama_folders, tmp_path / "padded", pad_token_id=last)
    ranker = cross_encoder(ScalarHeadSettings(path=str(folder), dtype="float32"))
    (outcome,) = ranker.rank([candidate_list("q", ["alpha beta gamma " * 9, "x"])])
    assert outcome.scores.scores[1] == pytest.approx(expected, abs=1e-4)


def test_a_pair_never_passes_max_length(rankllama_folders: tuple[Path, Path]):
    base, adapter = rankllama_folders
    backend = load_backend(
        ScalarHeadSettings(
            path=str(base), adapter=str(adapter), max_length=40, max_query_length=30, max_document_length=500
        )
    )
    lengths = [len(ids) for q in QUERIES for ids in backend.encode([Pair(query=q, text=t) for t in TEXTS])]
    assert max(lengths) == 40


def test_scalar_heads_that_would_be_random(rankllama_folders: tuple[Path, Path], tmp_path: Path):
    """A base model alone, and an adapter whose file lacks the head."""
    base, adapter = rankllama_folders
    with pytest.raises(ModelError, match=r"has no weights for score\.weight, which would be random"):
        load_backend(ScalarHeadSettings(path=str(base)))
    headless = tmp_path / "adapter"
    headless.mkdir()
    (headless / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    weights = {k: v for k, v in load_file(adapter / "adapter_model.safetensors").items() if "score" not in k}
    save_file(weights, headless / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"has no weights for score\.weight,"):
        load_backend(ScalarHeadSettings(path=str(base), adapter=str(headless)))


def test_adapters_that_do_not_fit(rankllama_folders: tuple[Path, Path], tiny_cross_encoder: Path, tmp_path: Path):
    base, adapter = rankllama_folders
    with pytest.raises(ModelError, match=r"no such model folder"):
        preflight(CrossEncoderRankerSettings(model=ScalarHeadSettings(path=str(base), adapter="./none")))
    with pytest.raises(ModelError, match=r"holds no adapter_config.json: not a LoRA adapter in PEFT's layout"):
        preflight(CrossEncoderRankerSettings(model=ScalarHeadSettings(path=str(base), adapter=str(base))))
    with pytest.raises(ModelError, match="is no decoder with a scalar head; use cross_encoder"):
        load_backend(ScalarHeadSettings(path=str(tiny_cross_encoder), max_length=128))
    shape = {k: torch.zeros(*v.shape, 2) for k, v in load_file(adapter / "adapter_model.safetensors").items()}
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    save_file(shape, broken / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="PEFT can't put this adapter on"):
        load_backend(ScalarHeadSettings(path=str(base), adapter=str(broken)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"query_format": "{query} ?"}, "query_format must end with {query}"),
        ({"document_format": "document"}, "document_format must end with {text}"),
        ({"max_query_length": 600}, "max_query_length (600) must be at most max_length (512)"),
    ],
)
def test_formats_that_can_not_be_cut(changes: dict, said: str):
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")):
        ScalarHeadSettings(path="a/b", **changes)


# MiniCPM layer-wise


def folded_llama(folder: Path) -> tuple[LlamaModel, dict[str, torch.Tensor]]:
    """MiniCPM as a Llama with the scales multiplied into its weights, and the checkpoint's heads."""
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    scaled = config["model_type"] == "minicpm"
    emb = config["scale_emb"] if scaled else 1.0
    depth = config["scale_depth"] / math.sqrt(config["num_hidden_layers"]) if scaled else 1.0
    model = LlamaModel(llama_config(config["num_hidden_layers"])).eval()
    model.load_state_dict(
        {
            k.removeprefix("model."): v * (emb if "embed" in k else depth if "o_proj" in k or "down_proj" in k else 1.0)
            for k, v in weights.items()
            if k.startswith("model.")
        }
    )
    return model, {k: v for k, v in weights.items() if k.startswith("lm_head")}


def layerwise_reference(model: LlamaModel, head: torch.Tensor, tokenizer, layer: int, query: str, text: str) -> float:
    def ids(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False)["input_ids"]

    instruction = ids(
        "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing "
        "a prediction of either 'Yes' or 'No'."
    )
    room = 300 - 1 - 2 * len(ids("\n")) - len(instruction)
    q = ids(f"A: {query}")[: room * 3 // 4]
    sequence = [0, *q, *ids("\n"), *ids(f"B: {text}")[: room - len(q)], *ids("\n"), *instruction]
    assert len(sequence) <= 300
    with torch.no_grad():
        states = model(torch.tensor([sequence]), output_hidden_states=True).hidden_states
        # transformers norms the last of them already.
        hidden = states[layer] if layer == len(states) - 1 else model.norm(states[layer])
        return float(hidden[0, -1] @ head[0])


@pytest.mark.parametrize(
    ("kind", "head_multi", "exit_layer"),
    [("minicpm", True, None), ("minicpm", True, 2), ("minicpm", True, 3), ("minicpm", False, 3), ("llama", True, 3)],
)
def test_minicpm_layerwise(tmp_path: Path, kind: str, head_multi: bool, exit_layer: int | None):
    folder = minicpm_layerwise(tmp_path / "m", kind=kind, head_multi=head_multi)
    model, heads = folded_llama(folder)
    layer = exit_layer or 4
    head = heads[f"lm_head.{layer - 2}.linear_head.weight" if head_multi else "lm_head.linear_head.weight"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = LayerwiseSettings(path=str(folder), dtype="float32", max_length=300, exit_layer=exit_layer)
    ranker = cross_encoder(settings)
    assert ranker.exit_layer == layer
    assert ranker.name.endswith(f":layer={layer}")
    check(ranker, lambda q, d: layerwise_reference(model, head, tokenizer, layer, q, d))


def test_layers_above_the_exit_are_not_loaded(tmp_path: Path):
    folder = minicpm_layerwise(tmp_path / "m")
    backends = [load_backend(LayerwiseSettings(path=str(folder), max_length=256, exit_layer=n)) for n in (2, 4)]
    model, _ = folded_llama(folder)
    layer = sum(p.numel() for p in model.layers[0].parameters())
    assert backends[1].parameters - backends[0].parameters == 2 * layer


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        ({}, {"exit_layer": 1}, "exit_layer: 1: this model has heads on layers 2 to 4"),
        ({}, {"exit_layer": 5}, "heads on layers 2 to 4"),
        ({}, {"max_length": 40}, r"max_length \(40\) leaves -?\d+ tokens for query and passage"),
        ({}, {"max_length": 513}, "max_length is 513, but the model ends at 512 tokens"),
        ({"model_type": "gemma"}, {}, "model_type minicpm or llama, and has start_layer 2 and model_type gemma"),
        ({"start_layer": None}, {}, "not a layer-wise checkpoint"),
        ({"head_type": "raw"}, {}, "only head_type 'simple'"),
        ({"head_multi": False}, {}, r"has no weights for lm_head\.linear_head\.weight, which would be random"),
        ({"hidden_size": 64}, {}, "can't load this model"),
    ],
)
def test_layerwise_checkpoints_that_are_not_read(tmp_path: Path, config: dict, changes: dict, said: str):
    folder = minicpm_layerwise(tmp_path / "m")
    published = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(published | config))
    with pytest.raises(ModelError, match=said):
        load_backend(LayerwiseSettings(**({"path": str(folder), "max_length": 256} | changes)))


def test_a_layerwise_checkpoint_has_no_adaptive_exits():
    model = {"kind": "layerwise", "path": "a/b", "exit_layer": "adaptive"}
    with pytest.raises(ConfigError) as caught:
        validate(CrossEncoderRankerSettings, {"model": model}, "c.yaml")
    _, said = str(caught.value).splitlines()
    assert said.startswith("  model.exit_layer: adaptive exits are those of `kind: cross_encoder`, for a student")
    assert "`rerank-ray calibrate-exit`" in said


# ColBERT


def colbert_reference(folder: Path) -> Callable[[str, str], float]:
    """ColBERT's own way of putting texts: a placeholder word for the marker, padding turned into masks."""
    metadata = json.loads((folder / "artifact.metadata").read_text())
    weights = load_file(folder / "model.safetensors")
    bert = BertModel(BertConfig.from_pretrained(folder)).eval()
    bert.load_state_dict({k.removeprefix("bert."): v for k, v in weights.items() if k.startswith("bert.")})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    marker = {name: tokenizer.convert_tokens_to_ids(metadata[name]) for name in ("query_token_id", "doc_token_id")}
    punctuation = {tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in string.punctuation}

    def embed(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            hidden = bert(ids, attention_mask=mask).last_hidden_state[0]
            return torch.nn.functional.normalize(hidden @ weights["linear.weight"].T, dim=-1)

    def score(query: str, text: str) -> float:
        q = tokenizer(
            ". " + query,
            padding="max_length",
            truncation=True,
            max_length=metadata["query_maxlen"],
            return_tensors="pt",
        )
        ids, mask = q["input_ids"], q["attention_mask"]
        ids[:, 1] = marker["query_token_id"]
        ids[ids == tokenizer.pad_token_id] = tokenizer.mask_token_id
        if metadata["attend_to_mask_tokens"]:
            mask = torch.ones_like(mask)
        d = tokenizer(". " + text, truncation=True, max_length=metadata["doc_maxlen"], return_tensors="pt")["input_ids"]
        d[:, 1] = marker["doc_token_id"]
        keep = [t not in punctuation or not metadata["mask_punctuation"] for t in d[0].tolist()]
        return float((embed(ids, mask) @ embed(d, torch.ones_like(d))[keep].T).max(dim=1).values.sum())

    return score


@pytest.mark.parametrize(
    "metadata", [{}, {"attend_to_mask_tokens": True, "query_maxlen": 24}, {"mask_punctuation": False, "doc_maxlen": 30}]
)
def test_colbert(tmp_path: Path, metadata: dict):
    folder = colbert(tmp_path / "c", metadata=metadata)
    ranker = Ranker(MaxSimSettings(model=ColBERTSettings(path=str(folder), dtype="float32")))
    check(ranker, colbert_reference(folder))
    assert ranker.name.startswith(f"maxsim:colbert:{folder}@")


def test_colbert_without_metadata_has_colberts_defaults(tmp_path: Path):
    """128 dimensions, queries of 32 tokens, documents of at most 220 (here the model's 128)."""
    folder = colbert(tmp_path / "c", dim=128)
    (folder / "artifact.metadata").unlink()
    with pytest.raises(ModelError, match="max_document_length 220 is beyond the model's 128 tokens"):
        load_backend(ColBERTSettings(path=str(folder)))
    backend = load_backend(ColBERTSettings(path=str(folder), max_document_length=100))
    results = backend.run([EmbedTokens(text="cat", role="query"), EmbedTokens(text="the cat.", role="document")])
    assert [r.value.shape for r in results] == [(32, 128), (5, 128)]
    for result in results:
        np.testing.assert_allclose(np.linalg.norm(result.value, axis=1), 1.0, atol=1e-5)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"similarity": "l2"}, "similarity 'l2' is not supported"),
        ({"query_token_id": "[unused7]"}, r"the tokenizer lacks \[unused7\]"),
        ({"dim": 8}, "can't load this model"),
    ],
)
def test_colbert_checkpoints_that_are_not_read(tmp_path: Path, metadata: dict, said: str):
    folder = colbert(tmp_path / "c", metadata=metadata)
    with pytest.raises(ModelError, match=said):
        load_backend(ColBERTSettings(path=str(folder)))


def test_a_bert_without_the_linear_layer_is_no_colbert(tiny_bert: Path):
    with pytest.raises(ModelError, match=r"lacks \[unused0\]"):
        load_backend(ColBERTSettings(path=str(tiny_bert)))


# Prompted rerankers: Qwen3-Reranker, ProRank, monoT5


@torch.no_grad()
def causal_reference(folder: Path, head: str, body: str, tail: str, labels: tuple[str, str]) -> float:
    """Log-odds of two tokens after three pieces tokenised apart."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    first, middle, last = (tokenizer(p, add_special_tokens=False)["input_ids"] for p in (head, body, tail))
    logits = model(torch.tensor([[*first, *middle, *last]])).logits[0, -1]
    yes, no = (tokenizer.convert_tokens_to_ids(label) for label in labels)
    return float(logits[yes] - logits[no])


@pytest.mark.parametrize("score", ["log_odds", "probability"])
def test_qwen3_reranker(tmp_path: Path, score: str):
    """Prefix and suffix as the model card has them; its score is the softmax of the two."""
    folder = qwen3_reranker(tmp_path / "q")
    head = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    )
    instruction = "Given a web search query, retrieve relevant passages that answer the query"
    tail = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    model = HFCausalSettings(path=str(folder), dtype="float32", max_length=1500)
    ranker = Ranker(YesNoSettings(model=model, prompt="qwen3_reranker", score=score))

    def reference(query: str, text: str) -> float:
        body = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {text}"
        odds = causal_reference(folder, head, body, tail, ("yes", "no"))
        return odds if score == "log_odds" else 1.0 / (1.0 + math.exp(-odds))

    check(ranker, reference, texts=SHORT, different=4 if score == "log_odds" else 2)


def test_prorank(tmp_path: Path):
    folder = qwen3_reranker(tmp_path / "q")
    head = (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n"
    )
    tail = (
        "\nYou are a search relevance expert who evaluates how well documents match search queries. For each "
        "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
        "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:<|im_end|>\n<|im_start|>assistant\n"
    )
    model = HFCausalSettings(path=str(folder), dtype="float32", max_length=1500)
    ranker = Ranker(YesNoSettings(model=model, prompt="prorank"))
    check(
        ranker, lambda q, d: causal_reference(folder, head, f"query: {q}\ndocument: {d}", tail, ("1", "0")), texts=SHORT
    )


def test_monot5(tmp_path: Path):
    """The log-odds of the first decoder step are those of its log-softmax over true and false."""
    folder = tiny_t5_folder(tmp_path / "t5")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    true, false = tokenizer.convert_tokens_to_ids(["▁true", "▁false"])

    @torch.no_grad()
    def reference(query: str, text: str) -> float:
        ids = tokenizer(f"Query: {query} Document: {text} Relevant:", return_tensors="pt")["input_ids"]
        logits = model(input_ids=ids, decoder_input_ids=torch.tensor([[0]])).logits[0, -1]
        return float(logits[[true, false]].log_softmax(-1) @ torch.tensor([1.0, -1.0]))

    settings = HFSeq2SeqSettings(path=str(folder), dtype="float32", max_length=512)
    ranker = Ranker(YesNoSettings(model=settings, prompt="monot5"))
    check(ranker, reference, texts=SHORT)


# Neighbours


@pytest.fixture(scope="module")
def rankers(tmp_path_factory: pytest.TempPathFactory, rankllama_folders: tuple[Path, Path]) -> dict[str, Ranker]:
    base, adapter = rankllama_folders
    folder = tmp_path_factory.mktemp("rankers")
    layerwise = minicpm_layerwise(folder / "m")
    late = colbert(folder / "c")
    return {
        "scalar_head": cross_encoder(ScalarHeadSettings(path=str(base), adapter=str(adapter), dtype="float32")),
        "layerwise": cross_encoder(LayerwiseSettings(path=str(layerwise), dtype="float32", max_length=256)),
        "colbert": Ranker(MaxSimSettings(model=ColBERTSettings(path=str(late), dtype="float32", cache_mb=0))),
    }


@pytest.mark.parametrize("name", ["scalar_head", "layerwise", "colbert"])
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(alphabet="abc .,", min_size=0, max_size=200), min_size=1, max_size=6))
def test_a_score_does_not_depend_on_its_neighbours(rankers: dict[str, Ranker], name: str, texts: list[str]):
    together = rankers[name].rank([make_list("other", 5), candidate_list("cat", ["the cat", *texts])])[1]
    (alone,) = rankers[name].rank([candidate_list("cat", ["the cat"])])
    assert together.scores.scores[0] == pytest.approx(alone.scores.scores[0], abs=1e-4)
