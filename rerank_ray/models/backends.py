"""The table from a model's `kind` to the class that runs it."""

from __future__ import annotations

from rerank_ray.models.bi_encoder import BiEncoder
from rerank_ray.models.cross_encoder import CrossEncoder
from rerank_ray.models.fake import Fake
from rerank_ray.models.hf_causal import HFCausal
from rerank_ray.models.protocol import Backend
from rerank_ray.settings import ModelSettings

BACKENDS = {"hf_causal": HFCausal, "cross_encoder": CrossEncoder, "bi_encoder": BiEncoder, "fake": Fake}


def load_backend(settings: ModelSettings) -> Backend:
    """Load a model onto its device.

    Raises:
        ModelError: it is missing, can't be read, or lacks the head it needs.
    """
    return BACKENDS[settings.kind](settings)
