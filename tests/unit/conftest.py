"""What the unit tests share: one torch thread, and tiny model folders made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from fixtures.stub_server import Behaviour, Stub

# A busy machine is no fault of an example: how long one takes is not tested.
settings.register_profile("unit", deadline=None)
settings.load_profile("unit")


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and one thread adds in the same order every time."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A three-layer BERT encoder without a head."""
    from fixtures.tiny_models import tiny_bert_folder

    return tiny_bert_folder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def tiny_cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A three-layer BERT sequence classifier with one output."""
    from fixtures.tiny_models import tiny_cross_encoder_folder

    return tiny_cross_encoder_folder(tmp_path_factory.mktemp("cross_encoder"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with a chat template."""
    from fixtures.tiny_models import tiny_llama_folder

    return tiny_llama_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of two encoder and two decoder layers, with five sentinel tokens."""
    from fixtures.tiny_models import tiny_t5_folder

    return tiny_t5_folder(tmp_path_factory.mktemp("t5"), sentinels=5)


@pytest.fixture
def serve() -> Iterator[Callable[[Behaviour], Stub]]:
    """Starts HTTP servers on loopback that behave as told, and ends them."""
    from fixtures.stub_server import serving

    with ExitStack() as stack:
        yield lambda behaviour: stack.enter_context(serving(behaviour))


@pytest.fixture(scope="session")
def labels(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 labelled queries that a tiny student can learn."""
    from fixtures.rows import write_labels
    from fixtures.teachable import teachable

    return write_labels(tmp_path_factory.mktemp("labels"), [teachable(i) for i in range(24)])
