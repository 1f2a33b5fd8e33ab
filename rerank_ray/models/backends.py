"""The table from a model's `kind` to the class that runs it."""

from __future__ import annotations

from pkgutil import resolve_name

from rerank_ray.models.protocol import Backend
from rerank_ray.settings.models import ModelSettings

# Names, not classes: a job imports the one it runs, and a driver that runs none imports no torch (3 of 3.6 s).
BACKENDS = {
    "hf_causal": "rerank_ray.models.hf_causal:HFCausal",
    "hf_seq2seq": "rerank_ray.models.hf_seq2seq:HFSeq2Seq",
    "vllm": "rerank_ray.models.vllm:VLLM",
    "openai_http": "rerank_ray.models.openai_http:OpenAIHTTP",
    "cross_encoder": "rerank_ray.models.cross_encoder:CrossEncoder",
    "scalar_head": "rerank_ray.models.scalar_head:ScalarHead",
    "layerwise": "rerank_ray.models.layerwise:Layerwise",
    "colbert": "rerank_ray.models.late_interaction:ColBERT",
    "bi_encoder": "rerank_ray.models.bi_encoder:BiEncoder",
    "fake": "rerank_ray.models.fake:Fake",
}


def load_backend(settings: ModelSettings) -> Backend:
    """Load a model onto its device.

    Raises:
        ModelError: it is missing, can't be read, or lacks the head it needs.
    """
    return resolve_name(BACKENDS[settings.kind])(settings)
