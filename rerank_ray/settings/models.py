"""Models and how their engines run them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from rerank_ray.config import Settings


class ModelSettings(Settings):
    """A model and how its engine runs it."""

    path: str
    """Hub id (`org/name`), a folder (its URI too: it is copied to the worker), or `package://NAME/path` of an installed
    Python package; a path that ends in `.gguf` is a GGUF file, on this machine, of a package or of the hub."""
    revision: str | None = None
    """Hub commit or tag; refused for folders and packages, which have none."""
    device: str = "auto"
    """`auto` takes CUDA when there is one, or any torch device."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto` is bfloat16 where the device computes it natively and float32 elsewhere."""
    max_length: PositiveInt = 512
    """Tokens per sequence, template included; only the passage is truncated to fit. Our own students keep the length
    that they were trained with."""
    tokens_per_batch: PositiveInt | None = None
    """Padded tokens in one forward pass, those of shared prefixes included; null is 65,536 on a GPU and 4,096 on a CPU,
    of which an LLM there computes 1,024 at a time where nothing is written: its caches hold no more."""
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


class TorchSettings(ModelSettings):
    """A model whose forward pass may be made faster than it was loaded."""

    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """`auto` is bfloat16 where the device computes it natively and float32 elsewhere. `int8` is float32 with linear
    layers in 8-bit integers (dynamic quantisation), for CPUs without AMX; it pays with `compile`."""
    compile: bool = False
    """Let torch.compile make one program of an encoder, or of each norm and each feed-forward block of an LLM: for long
    runs, as the first batches take half a minute or more."""


class HFCausalSettings(TorchSettings):
    """A decoder LLM run by transformers (safetensors or GGUF)."""

    kind: Literal["hf_causal"] = "hf_causal"
    max_length: PositiveInt = 1024
    chat: bool | None = None
    """Wrap prompts in the tokenizer's chat template; null does so when it has one and the prompt is a chat prompt."""
    share_prefix: bool = True
    """Compute what prompts have in common at their beginning once, where that saves a sixteenth of their tokens or more
    (yes_no prompts on DL19 share 29 % of theirs, and run 1.3 times as fast on a CPU)."""


class HFSeq2SeqSettings(ModelSettings):
    """An encoder-decoder LLM of the T5 family run by transformers; `max_length` is the encoder's."""

    kind: Literal["hf_seq2seq"] = "hf_seq2seq"


class CrossEncoderSettings(TorchSettings):
    """A cross-encoder: a sequence-classification checkpoint with one output, or a student of ours."""

    kind: Literal["cross_encoder"] = "cross_encoder"
    exit_layer: PositiveInt | Literal["adaptive"] | None = None
    """Layer-wise students only: the layer to stop at; null is the last. `adaptive` computes the layers above an
    exit for those candidates alone that may be among their list's ten best, by the margins that `rerank-ray
    calibrate-exit` wrote into the student."""
    views: PositiveInt | None = None
    """Reads `path` as an MVP checkpoint, a T5 that compares a list's passages (Na et al. 2025; 4 views, and 256 tokens
    are usual for `max_length`). Our own students tell how many they have; null for all others."""

    @model_validator(mode="after")
    def _compiled_layers_stay_together(self) -> CrossEncoderSettings:
        if self.compile and self.exit_layer == "adaptive":
            raise ValueError(
                "compile makes one program of the layers, and with exit_layer: adaptive rows leave between them: leave "
                "one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _views_have_one_exit(self) -> CrossEncoderSettings:
        if self.views is not None and self.exit_layer is not None:
            raise ValueError(
                "exit_layer is for layer-wise students, and an MVP (views) has its last layer: leave it out"
            )
        return self


class ScalarHeadSettings(TorchSettings):
    """A decoder with a scalar head on its last token (RankLLaMA), its LoRA adapter apart or merged.

    Query and document are joined as the tokenizer joins a pair: for Llama `<s> query: … <s> document: …`.
    """

    kind: Literal["scalar_head"] = "scalar_head"
    adapter: str | None = None
    """LoRA adapter in PEFT's layout, its head included: hub id, folder or `package://`; `path` is then the base model.
    null: `path` is a sequence-classification checkpoint with one output."""
    merge_adapter: bool = True
    """Add the adapter to the weights once, which is faster; false keeps it apart, in its own precision."""
    query_format: str = "query: {query}"
    """How a query is put, `{query}` at its end."""
    document_format: str = "document: {text}"
    """How title and text of a document are put, `{text}` at its end."""
    max_query_length: PositiveInt = 32
    """Tokens of the formatted query; longer ones are cut."""
    max_document_length: PositiveInt = 161
    """Tokens of the formatted document; RankLLaMA's 164 less the 3 that its authors keep free for special tokens."""

    @model_validator(mode="after")
    def _slots_and_room(self) -> ScalarHeadSettings:
        for name, slot in (("query_format", "{query}"), ("document_format", "{text}")):
            value = getattr(self, name)
            if value.count(slot) != 1 or not value.endswith(slot):
                raise ValueError(f"{name} must end with {slot}: what does not fit is cut from the end")
        if self.max_query_length > self.max_length - 8:
            raise ValueError(
                f"max_query_length ({self.max_query_length}) must be at most max_length ({self.max_length}) − 8, or no "
                "token is left for the document"
            )
        return self


class LayerwiseSettings(TorchSettings):
    """A layer-wise decoder in FlagEmbedding's layout (bge-reranker-v2-minicpm-layerwise): a head on every layer from
    `start_layer` of its config on."""

    kind: Literal["layerwise"] = "layerwise"
    max_length: PositiveInt = 1024
    exit_layer: PositiveInt | None = None
    """The layer to stop at, counted from 1; no later layer is loaded. null is the last. Only students of our own, with
    margins, exit adaptively."""
    instruction: str = (
        "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
        "prediction of either 'Yes' or 'No'."
    )
    """What stands after query and passage."""

    @field_validator("exit_layer", mode="before")
    @classmethod
    def _exits_are_not_adaptive(cls, given: Any) -> Any:
        if given == "adaptive":
            raise ValueError(
                "adaptive exits are those of `kind: cross_encoder`, for a student of ours that `rerank-ray "
                "calibrate-exit` has given margins: name a layer, or leave it out for the last one"
            )
        return given


class EmbeddingSettings(TorchSettings):
    """What models that embed documents apart from queries share."""

    cache_mb: NonNegativeInt = 256
    """MiB that a worker spends on embeddings of documents, so that one which comes again with another query is not
    computed again; 0 keeps none."""


class ColBERTSettings(EmbeddingSettings):
    """A ColBERT checkpoint (BERT and a linear layer); what its `artifact.metadata` says is the default."""

    kind: Literal["colbert"] = "colbert"
    max_query_length: PositiveInt | None = None
    """Tokens that each query is filled up or cut to; null reads it from the checkpoint, or takes 32."""
    max_document_length: PositiveInt | None = None
    """Tokens of a document; null reads it from the checkpoint, or takes 220. `max_length` bounds both."""


class BiEncoderSettings(EmbeddingSettings):
    """A sentence encoder; pooling and normalisation come from its sentence-transformers files when it has them, and one
    with further modules (Dense) is refused. Our own students bring their prefixes and lengths."""

    kind: Literal["bi_encoder"] = "bi_encoder"
    pooling: Literal["mean", "cls", "last"] | None = None
    """null reads it from the checkpoint, or takes the mean."""
    query_prefix: str = ""
    """Put before every query, for example `query: ` for E5."""
    document_prefix: str = ""
    """Put before every document."""


class VLLMSettings(ModelSettings):
    """A decoder LLM run by vLLM in this process (`pip install "rerank_ray[vllm]"`), with prefix caching."""

    kind: Literal["vllm"] = "vllm"
    device: Literal["auto"] = "auto"
    """vLLM runs where it was built for; CUDA_VISIBLE_DEVICES, which Ray sets for each replica, chooses the GPUs."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto` is the checkpoint's, and half precision for float32 checkpoints."""
    max_length: PositiveInt = 1024
    tokens_per_batch: PositiveInt | None = None
    """Tokens in one step of the engine, prompts and generated ones together; null is vLLM's own choice."""
    chat: bool | None = None
    """Wrap prompts in the tokenizer's chat template; null does so when it has one and the prompt is a chat prompt."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs that share one replica's weights; `gpus_per_actor` must be as many."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Share of each GPU's memory for weights and key/value cache."""
    max_num_seqs: PositiveInt | None = None
    """Sequences that the engine works on at once; null is vLLM's own choice."""
    enforce_eager: bool = False
    """Leave out CUDA graphs: a faster start, slower generation."""
    seed: int = 0
    """Of the engine; sampled generations have seeds of their own."""


class OpenAIHTTPSettings(Settings):
    """A model behind an OpenAI-compatible HTTP API. Pace and budget hold for each replica (`actors`) and each start."""

    kind: Literal["openai_http"] = "openai_http"
    url: str
    """The API's root, for example `https://api.openai.com/v1`; no key, user or password in it."""
    model: str
    """The model's name on the server; with the server's host it names the teacher in every label."""
    api: Literal["chat", "completions"] = "chat"
    """`chat` sends messages, which the server puts into its chat template. `completions` sends the whole text, or its
    tokens when there is a `tokenizer`."""
    api_key_env: str | None = None
    """Environment variable, on the machines that run replicas, that holds the API key; null sends none."""
    logprobs: bool = False
    """The server reports the log-probability of each token that it generates: asked for with every text."""
    top_logprobs: NonNegativeInt = 0
    """How many of the most likely tokens the server reports with log-probabilities (OpenAI and vLLM: at most 20);
    0 when it reports none, and then only generating methods work. A label that is not among them has no score."""
    echo: bool = False
    """The server's completions return the log-probabilities of the prompt's tokens, as vLLM's do: needed by query
    likelihood, with api completions and a tokenizer."""
    prefill: Literal["none", "last_message", "continue_final_message"] = "none"
    """How a chat server is told to go on with the beginning of its answer: some do when the last message is the
    assistant's (llama.cpp), vLLM with `continue_final_message`. With `none`, prompts that prefill get no answer."""
    tokenizer: str | None = None
    """The model's tokenizer (hub id, folder or `package://`), for api completions: prompts are put into its chat
    template, cut to `max_length` tokens, and sent as tokens."""
    chat: bool | None = None
    """With a tokenizer: wrap prompts in its chat template; null does so when it has one."""
    max_length: PositiveInt = 4096
    """With a tokenizer: tokens per sequence, template and answer included; only passages are cut to fit."""
    max_passage_words: PositiveInt | None = 300
    """Passages are cut after so many words; null sends them whole, and the server refuses what is too long for it."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls the limit of generated tokens; OpenAI's reasoning models take only the second."""
    sends_temperature: bool = True
    """false leaves it to the server: OpenAI's reasoning models refuse any but their own."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Fields added to every request, for example `{chat_template_kwargs: {enable_thinking: false}}`. With a tokenizer
    some labels need vLLM's `{return_tokens_as_token_ids: true}`: an error says so."""
    concurrency: PositiveInt = 16
    """Requests in flight at once."""
    queries_per_second: PositiveFloat | None = None
    """Requests sent per second, retries included; null does not hold back."""
    timeout_s: PositiveFloat = 120.0
    """Seconds from sending a request to the end of its answer."""
    max_tries: PositiveInt = 6
    """Attempts at one call: after status 408, 425, 429, 500, 502, 503, 504 or 529, a timeout, a dropped connection or
    half an answer, it is sent again. So it is when an answer is nothing but an error with such a code, or none."""
    backoff_s: PositiveFloat = 1.0
    """Wait before the second attempt, doubled for each further one, and spread by up to a half either way."""
    max_wait_s: PositiveFloat = 60.0
    """Longest wait before one attempt. A server that asks for more (`Retry-After`) gets no further attempt."""
    max_requests: PositiveInt | None = None
    """Budget: requests sent, retries included. When it is spent, calls fail and their rows say so."""
    max_total_tokens: PositiveInt | None = None
    """Budget: prompt and output tokens as the server counts them. Requests in flight when it is spent still finish."""

    @property
    def tokenizer_settings(self) -> ModelSettings | None:
        """Where the tokenizer lies, if there is one."""
        return None if self.tokenizer is None else ModelSettings(path=self.tokenizer)

    # Of the whole model, not of one field: an error about a field quotes its value, which may be the secret itself.
    @model_validator(mode="after")
    def _no_secrets(self) -> OpenAIHTTPSettings:
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise ValueError("api_key_env is the name of an environment variable, not the key itself")
        try:
            parts = urlsplit(self.url)
            named = parts.scheme in ("http", "https") and parts.hostname
        except ValueError:
            named = None
        if not named:
            raise ValueError("url must begin with http:// or https:// and name a host")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("url must hold no user, password or query: run folders keep it; use api_key_env for a key")
        return self

    @model_validator(mode="after")
    def _the_api_offers_it(self) -> OpenAIHTTPSettings:
        if self.api == "chat" and self.tokenizer is not None:
            raise ValueError("tokenizer needs api: completions; a chat server makes the tokens itself")
        if self.echo and self.tokenizer is None:
            raise ValueError("echo needs api: completions and the model's tokenizer, to tell the continuation's tokens")
        return self


class FakeSettings(Settings):
    """Answers made from a hash of the call: for tests of everything around a model."""

    kind: Literal["fake"] = "fake"
    seed: int = 0
    """Another seed gives other answers."""
    seconds_per_call: Annotated[float, Field(ge=0.0)] = 0.0
    """Time each call takes."""
    fail_on: str | None = None
    """Calls whose text holds this string fail."""
    writes: Literal["rankings", "queries"] = "rankings"
    """Generated texts: a ranking of the prompt's passages, or four of the words of its first one."""
    crash_on: str | None = None
    """Calls whose text holds this string end the process at once, like a segmentation fault."""


LanguageModelSettings = Annotated[
    HFCausalSettings | HFSeq2SeqSettings | VLLMSettings | OpenAIHTTPSettings | FakeSettings, Field(discriminator="kind")
]
"""Every kind of model that reads prompts, chosen by `kind`; a method that needs calls it does not answer refuses it."""
