"""Students: a pretrained model, and a head that gives a pair of query and document its score.

On disk a student is a transformers folder plus `student.json` (head, layers, lengths). A student of one layer needs
nothing more and loads anywhere; layer-wise ones and those with a `similarity` head add `heads.safetensors`.
"""

from rerank_ray.models.student.adaptation import adapt, trained_parameters
from rerank_ray.models.student.base import Encoded, Student, StudentPrompt
from rerank_ray.models.student.loading import load_student, new_student

__all__ = ["Encoded", "Student", "StudentPrompt", "adapt", "load_student", "new_student", "trained_parameters"]
