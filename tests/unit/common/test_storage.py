"""Names cannot leave their folder, and errors say which URI."""

import pytest
from pyarrow import fs as pafs

from common import storage
from common.errors import InvalidArgument, NotFound, Unavailable


@pytest.fixture
def root(tmp_path):
    return (tmp_path / "a folder #1").as_uri()


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder behind the path that object stores take."""
    (tmp_path / "bucket" / "a b").mkdir(parents=True)  # object stores have no folders to make
    filesystem = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    real = storage._filesystem
    monkeypatch.setattr(storage, "_filesystem", lambda r: (filesystem, "bucket") if r.startswith("s3:") else real(r))
    return "s3://bucket"


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "/etc/passwd", "a\0b", "", ".", "a//b", "a/", "C:/x", "a\\..\\b", "a\nb", "x" * 300, "\ud800"],
)
def test_a_name_that_could_leave_its_folder_is_refused(root, name):
    with pytest.raises(InvalidArgument) as error:
        storage.join(root, name)
    assert error.value.reason == "UNSAFE_PATH"


@pytest.mark.parametrize(
    "uri",
    [
        "http:///#/../../etc",
        "file:///a/../b",
        "file:///a/%2e%2e/b",
        "file://host/x",
        "/etc",
        "s3:///x",
        "file:///a#b",
        "x",
        "file:a",
        "file:///%00",
    ],
)
def test_a_uri_that_is_no_storage_is_refused(uri):
    with pytest.raises(InvalidArgument) as error:
        storage.write_bytes(uri, b"")
    assert error.value.reason == "BAD_URI"


@pytest.mark.parametrize("name", ["plain.txt", "deep/er/file", "50% #1?.txt", "ümläut"])
def test_what_is_written_is_read_again(root, name):
    uri = storage.join(root, name)
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"first")
    storage.write_bytes(uri, b"second")
    assert storage.exists(uri)
    assert storage.read_bytes(uri) == b"second"
    assert storage.list_files(root) == [name]


def test_files_travel_up_and_down(root, tmp_path):
    (tmp_path / "source").write_bytes(b"x" * 10_000)
    storage.upload_file(tmp_path / "source", storage.join(root, "up"))
    storage.download_file(storage.join(root, "up"), tmp_path / "new" / "target")
    assert (tmp_path / "new" / "target").read_bytes() == b"x" * 10_000


def test_an_object_store_does_the_same(bucket, tmp_path):
    uri = storage.join(bucket, "a b", "c#d")
    storage.write_bytes(uri, b"data")
    assert (tmp_path / "bucket" / "a b" / "c#d").read_bytes() == b"data"
    assert storage.read_bytes(uri) == b"data"
    assert storage.list_files(bucket) == ["a b/c#d"]
    storage.delete_tree(storage.join(bucket, "a b"))
    assert storage.list_files(bucket) == []


@pytest.mark.parametrize("kind", ["root", "bucket"])
def test_a_folder_is_deleted_but_for_what_is_kept_in_it(kind, request, tmp_path):
    folder = storage.join(request.getfixturevalue(kind), "job 1")
    for name in ("run-1/model", "run-1/model-2", "run-2/checkpoints/step-5"):
        (tmp_path / "bucket" / "job 1" / name).mkdir(parents=True)  # object stores have no folders to make
    kept = storage.join(folder, "run-1", "model")
    for name in ("run-1/model/weights", "run-1/model-2/weights", "run-1/notes", "run-2/checkpoints/step-5/a", "x"):
        storage.write_bytes(storage.join(folder, name), b"")
    storage.delete_but(folder, [kept, storage.join(folder, "run-3", "never")])
    assert storage.list_files(folder) == ["run-1/model/weights"]
    storage.delete_but(folder, [])
    assert storage.list_files(folder) == []
    storage.delete_but(folder, [])
    storage.delete_file(storage.join(folder, "x"))


def test_a_query_of_the_root_is_kept():
    assert storage.join("s3://b/p?region=x", "f") == "s3://b/p/f?region=x"


def test_a_missing_file_is_named(root, tmp_path):
    uri = storage.join(root, "nothing")
    with pytest.raises(NotFound, match="nothing"):
        storage.read_bytes(uri)
    with pytest.raises(NotFound, match="nothing"):
        storage.download_file(uri, tmp_path / "target")


def test_a_folder_in_the_way_is_told_and_leaves_no_part_behind(root, tmp_path):
    uri = storage.join(root, "taken")
    storage.write_bytes(storage.join(root, "taken/x"), b"")
    with pytest.raises(Unavailable, match="taken"):
        storage.write_bytes(uri, b"")
    assert storage.list_files(root) == ["taken/x"]


def test_a_file_over_the_limit_is_refused(root):
    storage.write_bytes(storage.join(root, "f"), b"12345")
    with pytest.raises(InvalidArgument, match="larger than 4"):
        storage.read_bytes(storage.join(root, "f"), limit=4)


def test_a_tree_is_deleted_whole_but_never_the_root(root, bucket):
    storage.write_bytes(storage.join(root, "a/b/c"), b"")
    storage.delete_tree(storage.join(root, "a"))
    storage.delete_tree(storage.join(root, "a"))
    assert not storage.exists(storage.join(root, "a"))
    for top in ("file:///", bucket):
        with pytest.raises(InvalidArgument, match="root"):
            storage.delete_tree(top)


def test_only_file_uris_have_a_local_path(root, bucket, tmp_path):
    assert storage.local_path(root) == tmp_path / "a folder #1"
    assert storage.local_path(bucket) is None
