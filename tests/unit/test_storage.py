"""Addresses of files: local paths and URIs, with options or without."""

import pytest

from rerank_ray import storage


@pytest.mark.parametrize(
    ("folder", "joined"),
    [
        ("runs/x", "runs/x/data/a.parquet"),
        ("runs/what?", "runs/what?/data/a.parquet"),
        ("s3://bucket/run", "s3://bucket/run/data/a.parquet"),
        ("s3://bucket/run?region=eu-west-1&scheme=http", "s3://bucket/run/data/a.parquet?region=eu-west-1&scheme=http"),
    ],
)
def test_a_path_below_a_folder(folder: str, joined: str):
    assert storage.join(folder, "data", "a.parquet") == joined
