"""CoRe heads: ICR over the few heads that tell relevant documents from others (Tran et al. 2025)."""

from __future__ import annotations

import hashlib

from rerank_ray.models.protocol import Backend
from rerank_ray.ranking.heads_file import check_model, load_heads
from rerank_ray.ranking.icr import ICR
from rerank_ray.settings.rankers import CoReHeadsSettings


class CoReHeads(ICR):
    """ICR over the best heads of a heads file; no layer above the last of them is computed."""

    def __init__(self, settings: CoReHeadsSettings, backend: Backend) -> None:
        super().__init__(settings, backend)
        heads = load_heads(settings.heads_file)
        check_model(heads, settings.heads_file, backend.name)
        self.heads = heads.best(settings.count, settings.prune)
        digest = hashlib.sha256(repr(self.heads).encode()).hexdigest()[:8]
        self.name = f"{self.name}:heads={digest}"
