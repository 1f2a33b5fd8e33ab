"""Distributed batch reranking and teacher-to-student distillation on Ray."""

from importlib.metadata import version

__version__ = version("rerank_ray")
