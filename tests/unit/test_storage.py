"""Addresses of files: local paths and URIs, with options or without."""

import gzip
import hashlib
import shutil
from pathlib import Path

import httpx2
import pyarrow.fs as pafs
import pytest
from fixtures.full_disk import full_disk

from rerank_ray import storage
from rerank_ray.cli import main
from rerank_ray.errors import InputError, RunError


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


def test_options_are_no_part_of_a_files_name():
    assert storage.without_options("s3://bucket/a.parquet?region=eu-west-1") == "s3://bucket/a.parquet"
    assert storage.without_options("what?.parquet") == "what?.parquet"


@pytest.mark.parametrize("other", ["/a/b", "/a/b/", "file:///a/b", "file:///a/b/", "/a/../a/b"])
def test_one_place_has_several_addresses(other: str):
    assert storage.is_within("/a/b", other)
    assert storage.is_within(f"{other}/c.parquet", "/a/b")
    assert not storage.is_within("/a", other)
    assert not storage.is_within("/a/b2", other)


@pytest.mark.parametrize("uri", ["https://trec.nist.gov/qrels.txt", "s3:///runs", "s3://two words/runs", "file://runs"])
def test_a_uri_that_names_no_filesystem_is_told_with_the_fix(uri: str):
    with pytest.raises(InputError, match=f"^{uri}: no address of a file or folder .*: give a local path, or a URI"):
        storage.exists(uri)


def test_a_secret_in_an_address_is_refused_and_not_repeated():
    """It would lie in the run folder."""
    with pytest.raises(InputError) as caught:
        storage.exists("s3://AKIA1:pass%2Fword@bucket/runs?region=eu-west-1")
    assert str(caught.value).startswith("…://bucket/runs?region=eu-west-1: this address came with a key")
    assert "word" not in str(caught.value)


def test_a_hub_that_is_out_of_reach_is_told_and_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys):
    """pyarrow hands `hf://` to huggingface_hub, whose errors are of no kind that files have."""

    def unreachable(uri):
        raise httpx2.ConnectError("no name", request=httpx2.Request("GET", "https://hub.test/api"))

    monkeypatch.setattr(storage, "open_filesystem", unreachable)
    assert main(["evaluate", "hf://datasets/a/b/run", "--qrels", "qrels"]) == 1
    assert capsys.readouterr().err.startswith("error: hub.test can't be reached (no name): look at the network")


def test_a_digest_is_of_names_and_bytes(tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a").write_bytes(b"12")
    (folder / "b").write_bytes(b"3")
    seen = {storage.digest(folder / "a"), storage.digest(folder)}
    assert storage.digest(folder / "a") == hashlib.sha256(b"12").hexdigest()[:16]
    assert storage.digest(shutil.copytree(folder, tmp_path / "copy")) in seen
    assert storage.digest(f"file://{folder}/") in seen
    with pytest.raises(FileNotFoundError):
        storage.digest(tmp_path / "gone")
    (folder / "a").write_bytes(b"1")
    (folder / "b").write_bytes(b"23")
    seen.add(storage.digest(folder))
    (folder / "b").rename(folder / "c")
    seen.add(storage.digest(folder))
    assert len(seen) == 4


class Bucket:
    """Local files that say they are S3's, where moving a large file is refused."""

    type_name = "s3"

    def __init__(self) -> None:
        self.files = pafs.LocalFileSystem()

    def move(self, source: str, target: str) -> None:
        raise OSError("the specified copy source is larger than the maximum allowable size")

    def __getattr__(self, name: str):
        return getattr(self.files, name)


def test_a_new_file_on_s3_is_not_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "open_filesystem", lambda uri: (Bucket(), str(uri)))
    monkeypatch.setattr(storage, "_COPIED_BYTES", 1000)
    for content in (b"one", b"x" * 2500):
        with storage.new_file(str(tmp_path / "run.trec.gz")) as stream:
            stream.write(content)
        assert gzip.decompress((tmp_path / "run.trec.gz").read_bytes()) == content
    with pytest.raises(KeyboardInterrupt), storage.new_file(str(tmp_path / "run.trec.gz")):
        raise KeyboardInterrupt
    assert [f.name for f in tmp_path.iterdir()] == ["run.trec.gz"]


def test_a_small_file_is_compressed_as_its_name_says(tmp_path: Path):
    storage.write_text(tmp_path / "a.json.gz", "{}\n")
    assert gzip.decompress((tmp_path / "a.json.gz").read_bytes()) == b"{}\n"
    assert storage.read_text(tmp_path / "a.json.gz") == "{}\n"


def test_a_file_is_written_by_one_at_a_time(tmp_path: Path):
    path = tmp_path / "run.trec"
    with storage.new_file(path) as stream:
        with pytest.raises(RunError, match="another process is writing this file"), storage.new_file(path):
            pass
        stream.write(b"whole")
    assert path.read_bytes() == b"whole"
    assert [f.name for f in tmp_path.iterdir()] == ["run.trec"]


def test_a_file_that_can_not_be_written_is_named_with_the_fix(tmp_path: Path):
    said = r"{}: can't be written \(.*File too large.*\): free space or name another place"
    with full_disk(1000):
        with pytest.raises(RunError, match=said.format(r"a\.json")):
            storage.write_text(tmp_path / "a.json", "x" * 2000)
        with pytest.raises(RunError, match=said.format(r"run\.trec")), storage.new_file(tmp_path / "run.trec") as file:
            file.write(b"x" * 2000)
    assert not (tmp_path / "a.json").exists()
    assert not list(tmp_path.glob("*run.trec"))
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "x.json"
    with pytest.raises(RunError, match=r"file/x\.json: can't be written"):
        storage.write_text(below, "x")
    with pytest.raises(RunError, match=r"file/x\.json: can't be written"), storage.new_file(below):
        pass
    with pytest.raises(RunError, match="x: can't be written"):
        storage.make_directory(tmp_path / "file" / "x")


def test_an_error_of_what_a_new_file_is_made_of_stays_what_it_is(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="gone"), storage.new_file(tmp_path / "new") as file:
        file.write((tmp_path / "gone").read_bytes())
    assert not list(tmp_path.iterdir())
