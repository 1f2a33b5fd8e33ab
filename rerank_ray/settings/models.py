"""Models and how their engines run them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from rerank_ray.config import Settings


class ModelSettings(Settings):
    """A model and how its engine runs it."""

    path: str
    """Hub id (`org/name`), local folder, or `package://NAME/path` of an installed Python package; a path that ends in
    `.gguf` is a GGUF file."""
    revision: str | None = None
    """Hub commit or tag; refused for folders and packages, which have none."""
    device: str = "auto"
    """`auto` takes CUDA when there is one, or any torch device."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto` is bfloat16 where the device computes it natively and float32 elsewhere."""
    max_length: PositiveInt = 512
    """Tokens per sequence, template included; only the passage is truncated to fit."""
    tokens_per_batch: PositiveInt | None = None
    """Padded tokens in one forward pass; null is 4,096 on a CPU, whose caches hold no more, and 65,536 on a GPU."""
    trust_remote_code: bool = False
    """Run Python code that a checkpoint ships."""
    allow_pickle: bool = False
    """Load `.bin` weights; unpickling runs code of whoever made the file."""

    @model_validator(mode="after")
    def _a_sequence_fits_a_batch(self) -> ModelSettings:
        if self.tokens_per_batch is not None and self.tokens_per_batch < self.max_length:
            raise ValueError(
                f"tokens_per_batch ({self.tokens_per_batch}) is smaller than max_length ({self.max_length}): one "
                "sequence would not fit a batch; raise the first or lower the second"
            )
        return self


class HFCausalSettings(ModelSettings):
    """A decoder LLM run by transformers (safetensors or GGUF)."""

    kind: Literal["hf_causal"] = "hf_causal"
    max_length: PositiveInt = 1024
    chat: bool | None = None
    """Wrap prompts in the tokenizer's chat template; null does so when it has one and the prompt is a chat prompt."""
    share_prefix: bool = True
    """Compute what prompts have in common at their beginning once."""


class HFSeq2SeqSettings(ModelSettings):
    """An encoder-decoder LLM of the T5 family run by transformers; `max_length` is the encoder's."""

    kind: Literal["hf_seq2seq"] = "hf_seq2seq"


class CrossEncoderSettings(ModelSettings):
    """A cross-encoder: a sequence-classification checkpoint with one output, or a student of ours."""

    kind: Literal["cross_encoder"] = "cross_encoder"
    exit_layer: PositiveInt | None = None
    """Layer-wise students only: the layer to stop at; null is the last."""


class BiEncoderSettings(ModelSettings):
    """A sentence encoder; pooling and normalisation come from its sentence-transformers files when it has them."""

    kind: Literal["bi_encoder"] = "bi_encoder"
    pooling: Literal["mean", "cls", "last"] | None = None
    """null reads it from the checkpoint, or takes the mean."""
    query_prefix: str = ""
    """Put before every query, for example `query: ` for E5."""
    document_prefix: str = ""
    """Put before every document."""


class FakeSettings(Settings):
    """Answers made from a hash of the call: for tests of everything around a model."""

    kind: Literal["fake"] = "fake"
    seed: int = 0
    """Another seed gives other answers."""
    seconds_per_call: Annotated[float, Field(ge=0.0)] = 0.0
    """Time each call takes."""
    fail_on: str | None = None
    """Calls whose text holds this string fail."""
    crash_on: str | None = None
    """Calls whose text holds this string end the process at once, like a segmentation fault."""


LanguageModelSettings = Annotated[HFCausalSettings | HFSeq2SeqSettings | FakeSettings, Field(discriminator="kind")]
"""Every kind of model that reads prompts, chosen by `kind`; a method that needs calls it does not answer refuses it."""
