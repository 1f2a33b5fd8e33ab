"""First-stage retrieval: BM25 over a collection, and texts for the doc ids of a run."""
