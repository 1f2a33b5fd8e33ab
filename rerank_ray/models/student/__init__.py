"""Student cross-encoders: a backbone with a `linear` or `similarity` head on its last layer or on several.

On disk a student is a transformers folder plus `student.json` (head, layers, lengths). A `linear` student of one layer
needs nothing more and loads anywhere; every other one adds `heads.safetensors`.
"""

from rerank_ray.models.student.base import Student
from rerank_ray.models.student.loading import load_student, new_student

__all__ = ["Student", "load_student", "new_student"]
