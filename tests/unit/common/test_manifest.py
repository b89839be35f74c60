"""An artifact arrives as it was published, or not at all."""

import json
import multiprocessing
import os

import pytest

from common import manifest, storage
from common.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights").write_bytes(os.urandom(50_000))
    (folder / "sub" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def uri(tmp_path):
    return storage.join(tmp_path.as_uri(), "storage/artifact")


def flip(path, at=100):
    data = bytearray(path.read_bytes())
    data[min(at, len(data) - 1)] ^= 1
    path.write_bytes(data)


def test_what_is_fetched_is_what_was_published(source, uri):
    published = manifest.publish(source, uri)
    folder = manifest.fetch(uri, published.sha256)
    assert (folder / "weights").read_bytes() == (source / "weights").read_bytes()
    assert manifest.verify(folder) == published
    assert published.size_bytes == 50_002
    assert set(published.files) == {"weights", "sub/config.json"}
    assert manifest.fetch(uri) == folder


def test_the_node_keeps_what_it_fetched(source, uri):
    published = manifest.publish(source, uri)
    folder = manifest.fetch(uri, published.sha256)
    storage.delete_tree(uri)
    assert manifest.fetch(uri, published.sha256) == folder


def test_the_manifest_is_written_last(source, uri, monkeypatch):
    monkeypatch.setattr(storage, "write_bytes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        manifest.publish(source, uri)
    assert storage.exists(storage.join(uri, "weights"))
    with pytest.raises(NotFound, match="no artifact"):
        manifest.fetch(uri)


def test_the_same_content_may_be_published_twice_and_other_content_not(source, uri):
    first = manifest.publish(source, uri)
    assert manifest.publish(source, uri) == first
    flip(source / "weights")
    with pytest.raises(AlreadyExists):
        manifest.publish(source, uri)
    assert manifest.read(uri) == first


def test_a_byte_flipped_in_storage_is_noticed(source, uri, tmp_path):
    published = manifest.publish(source, uri)
    flip(tmp_path / "storage" / "artifact" / "weights")
    with pytest.raises(FailedPrecondition, match=r"weights at .* is damaged") as error:
        manifest.fetch(uri, published.sha256)
    assert error.value.reason == "ARTIFACT_DAMAGED"
    assert not list((tmp_path / "node" / "artifacts").iterdir())


def test_a_byte_flipped_in_the_manifest_is_noticed(source, uri, tmp_path):
    published = manifest.publish(source, uri)
    flip(tmp_path / "storage" / "artifact" / "manifest.json", at=30)
    with pytest.raises(FailedPrecondition):
        manifest.fetch(uri, published.sha256)


def test_a_byte_flipped_on_the_node_is_noticed_and_mended(source, uri):
    published = manifest.publish(source, uri)
    folder = manifest.fetch(uri, published.sha256)
    flip(folder / "weights")
    with pytest.raises(FailedPrecondition, match="weights"):
        manifest.verify(folder)
    assert manifest.verify(manifest.fetch(uri, published.sha256)) == published


@pytest.mark.parametrize("cut", ["weights", "sub/config.json"])
def test_a_file_missing_from_storage_is_noticed(source, uri, cut, tmp_path):
    published = manifest.publish(source, uri)
    (tmp_path / "storage" / "artifact" / cut).unlink()
    with pytest.raises(NotFound, match=cut):
        manifest.fetch(uri, published.sha256)


def test_links_are_not_published(source, uri):
    (source / "link").symlink_to("/etc/passwd")
    with pytest.raises(InvalidArgument, match="link"):
        manifest.publish(source, uri)
    assert not storage.exists(uri)


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "a\0b", "manifest.json"])
def test_a_manifest_cannot_name_files_outside_its_folder(uri, tmp_path, name):
    body = {"format": 1, "files": {name: {"sha256": "0" * 64, "size": 1}}}
    storage.write_bytes(storage.join(uri, "manifest.json"), json.dumps(body).encode())
    (tmp_path / "storage" / "escaped").write_bytes(b"x")
    with pytest.raises(FailedPrecondition, match="manifest"):
        manifest.fetch(uri)
    assert not (tmp_path / "node" / "artifacts").exists() or not list((tmp_path / "node" / "artifacts").iterdir())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"format": 2, "files": {}}',
        b'{"format": 1, "files": {"a": {"sha256": "x", "size": 1}}}',
        b"[" * 100_000,
    ],
)
def test_a_manifest_that_is_none_is_refused(data):
    with pytest.raises(FailedPrecondition, match="manifest"):
        manifest.parse(data, "here")


def test_half_a_deleted_artifact_does_not_look_whole(source, uri, monkeypatch):
    manifest.publish(source, uri)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "delete_tree", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            manifest.delete(uri)
    with pytest.raises(NotFound):
        manifest.read(uri)
    manifest.delete(uri)
    assert not storage.exists(uri)
    manifest.delete(uri)


def test_an_empty_folder_is_no_artifact(tmp_path, uri):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidArgument, match="no files"):
        manifest.publish(tmp_path / "empty", uri)


def _fetch(uri, sha256, barrier, answers):
    barrier.wait()
    answers.put(str(manifest.fetch(uri, sha256)))


def test_processes_that_fetch_at_once_get_the_same_folder(source, uri, tmp_path):
    sha256 = manifest.publish(source, uri).sha256
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_fetch, args=(uri, sha256, barrier, answers)) for _ in range(4)]
    for worker in workers:
        worker.start()
    folders = {answers.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert folders == {str(tmp_path / "node" / "artifacts" / sha256)}
    assert manifest.verify(tmp_path / "node" / "artifacts" / sha256).sha256 == sha256
    assert {path.name for path in (tmp_path / "node" / "artifacts").iterdir()} == {sha256, f"{sha256}.json"}


def test_content_that_is_more_than_bytes_declares_its_hash(source, uri):
    first = manifest.publish(source, uri, "a" * 64)
    flip(source / "weights")
    assert manifest.publish(source, uri, "a" * 64) == first
    assert manifest.fetch(uri).name == "a" * 64
    assert manifest.fetch(uri, "a" * 64) == manifest.fetch(uri)
    assert manifest.verify(manifest.fetch(uri, first.sha256)) == first
    with pytest.raises(AlreadyExists):
        manifest.publish(source, uri, "b" * 64)
    with pytest.raises(FailedPrecondition, match="was expected"):
        manifest.fetch(uri, "b" * 64)


@pytest.mark.parametrize("text", ["../../etc", "A" * 64, "0" * 63])
def test_a_hash_that_is_none_is_refused(source, uri, text):
    with pytest.raises(InvalidArgument, match="not a SHA-256"):
        manifest.fetch(uri, text)
    with pytest.raises(InvalidArgument, match="not a SHA-256"):
        manifest.publish(source, uri, text)
