"""Downloads from a server on this machine: checked, unpacked, whole or not at all."""

import hashlib
import io
import json
import subprocess
import tarfile

import pytest

from seqmodels.downloads import SOURCE, Remote, download, git_tree
from seqmodels.errors import InputError

FILES = {"set/zero/a.wav": b"first", "set/list.txt": b"zero/a.wav\n"}


def tar(files, mode="w:gz"):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("name", "mode"), [("a.tar.gz", "w:gz"), ("a.tar", "w")])
def test_a_tar_is_checked_and_unpacked_without_the_folder_that_holds_all(server, tmp_path, name, mode):
    folder, address = server
    data = tar(FILES, mode)
    (folder / name).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    download(lambda: [Remote(f"{address}/{name}", name, f"sha256:{digest}")], tmp_path / "set")
    found = content(tmp_path / "set")
    assert json.loads(found.pop(SOURCE))["files"][name]["sha256"] == digest
    assert found == {"zero/a.wav": b"first", "list.txt": b"zero/a.wav\n"}
    download(lambda: pytest.fail("what is there is asked for again"), tmp_path / "set")


def test_names_that_lead_out_of_the_folder_and_links_are_not_unpacked(server, tmp_path):
    folder, address = server
    data = io.BytesIO(tar(FILES | {"set/../../outside": b"x", "../outside": b"x"}, "w"))
    with tarfile.open(fileobj=data, mode="a") as archive:
        link = tarfile.TarInfo("set/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    (folder / "bad.tar").write_bytes(data.getvalue())
    download(lambda: [Remote(f"{address}/bad.tar", "bad.tar", None)], tmp_path / "in" / "set")
    assert sorted(content(tmp_path)) == ["in/set/list.txt", f"in/set/{SOURCE}", "in/set/zero/a.wav"]


def test_a_broken_or_wrong_archive_leaves_nothing_behind(server, tmp_path):
    folder, address = server
    (folder / "cut.tar.gz").write_bytes(tar(FILES)[:-30])
    (folder / "whole.tar.gz").write_bytes(tar(FILES))
    for name, checksum, tree, reason in (
        ("cut.tar.gz", None, None, "not a whole tar archive"),
        ("whole.tar.gz", "sha256:" + "0" * 64, None, "hash"),
        ("whole.tar.gz", None, ("zero", "0" * 40), "for git, not 000"),
        ("whole.tar.gz", None, ("elsewhere", "0" * 40), "is nothing for git"),
        ("missing.tar.gz", None, None, "cannot download"),
    ):
        file = Remote(f"{address}/{name}", name, checksum, tree)
        with pytest.raises(InputError, match=reason):
            download(lambda file=file: [file], tmp_path / "set")
        assert not list(tmp_path.iterdir())


def test_the_id_of_a_folder_is_the_one_that_git_gives_it(tmp_path):
    for name, text in {"b.wav": "sound", "a.wav": "", "a.wav0": "more", "A": "x"}.items():
        (tmp_path / name).write_text(text)
    tree = git_tree(tmp_path)
    for command in ("init -q", "add .", "write-tree"):
        done = subprocess.run(["git", *command.split()], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == tree
