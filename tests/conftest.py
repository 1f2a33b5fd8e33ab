"""Fixtures that more than one test module uses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# No test waits for a network: read once, when huggingface_hub is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

# How long an example takes says more about the machine's load than about the code.
settings.register_profile("any_load", deadline=None)
settings.load_profile("any_load")


@pytest.fixture(scope="session")
def collections() -> Path:
    """The folder with the real test collections (`cranfield/`, `trec-dl/`, `noveleval/`): RERANK_RAY_DATA names it."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("RERANK_RAY_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no test collections in {folder}: set RERANK_RAY_DATA to their folder")
    return folder
