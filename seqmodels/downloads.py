"""Public data sets from where they are published: downloaded on request, checked, unpacked, whole or not at all."""

import base64
import hashlib
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from seqmodels.checkpoint import read_json
from seqmodels.errors import InputError
from seqmodels.files import make_folder, write_json

SOURCE = "source.json"  # of a download: where each file came from, and its SHA-256


@dataclass(frozen=True)
class Remote:
    """A file to download."""

    url: str
    "Its address."
    name: str
    "Its name here; .zip, .tar and .tar.gz are unpacked."
    checksum: str | None
    "What its home publishes: sha256:... or md5:..., or nothing."
    git_tree: tuple[str, str] | None = None
    "A folder in it, and the id that git gives to that folder: for archives that a git host makes anew for everybody."


def on_zenodo(record: str, name: str) -> list[Remote]:
    """A file of a Zenodo record, with the checksum that Zenodo publishes."""
    import pooch

    doi = f"doi:10.5281/zenodo.{record}/"
    registry = pooch.create(path=pooch.os_cache("longseq"), base_url=doi, registry=None)
    try:
        registry.load_registry_from_doi()
    except Exception as error:  # whatever the network says
        raise InputError(f"cannot reach {doi}: {_first_line(error)}; try again, or download by hand") from None
    if name not in registry.registry:
        raise InputError(f"{doi} has no file {name}; it may have moved, look at https://zenodo.org/records/{record}")
    return [Remote(f"{doi}{name}", name, registry.registry[name])]


def on_hub(repository: str, path: str) -> list[Remote]:
    """A file, or the files of a folder, of a data set on the Hugging Face hub as it is now."""
    from huggingface_hub import HfApi, hf_hub_url

    try:
        api = HfApi()
        revision = api.repo_info(repository, repo_type="dataset").sha
        found = api.get_paths_info(repository, path, repo_type="dataset", revision=revision)
        if not any(hasattr(entry, "blob_id") for entry in found):
            found = list(api.list_repo_tree(repository, path, repo_type="dataset", revision=revision))
    except Exception as error:  # whatever the network says
        raise InputError(f"cannot reach {repository}: {_first_line(error)}; try again, or download by hand") from None
    files = []
    for entry in found:
        if hasattr(entry, "blob_id"):
            url = hf_hub_url(repository, entry.path, repo_type="dataset", revision=revision)
            large = getattr(entry, "lfs", None)  # files of the large file storage have a SHA-256
            files.append(Remote(url, Path(entry.path).name, f"sha256:{large.sha256}" if large else None))
    return files


def on_google_storage(bucket: str, names: dict[str, str], home: str) -> list[Remote]:
    """Public files of a bucket (by their name there, the name here), with the MD5 that Google (`home`) publishes."""
    import pooch

    files = []
    pooch.get_logger().setLevel("WARNING")
    with tempfile.TemporaryDirectory() as folder:
        for name, here in names.items():
            about = f"{home}/storage/v1/b/{bucket}/o/{quote(name, safe='')}"
            try:
                said = read_json(Path(pooch.retrieve(about, None, f"{here}.json", folder)))
            except Exception as error:  # whatever the network says
                reason = _first_line(error)
                raise InputError(f"cannot reach {about}: {reason}; try again, or download by hand") from None
            md5 = base64.b64decode(said.get("md5Hash", "")).hex()
            files.append(Remote(f"{home}/{bucket}/{quote(name)}", here, f"md5:{md5}" if md5 else None))
    return files


def download(find: Callable[[], list[Remote]], target: Path, pin: Path | None = None, quiet: bool = False) -> None:
    """The files that `find` names in the folder `target`, checked and unpacked.

    The folder appears when it is whole, with SOURCE in it; if it is there already, nobody is asked anything. `pin` is
    the SOURCE of an earlier download, whose files these must be.
    """
    import pooch

    if (target / SOURCE).exists():
        print(f"{target} is there already", file=sys.stderr)
        return
    pinned = read_json(pin).get("files", {}) if pin is not None else {}
    temporary = target.with_name(f".{target.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    make_folder(temporary)
    sources = {}
    pooch.get_logger().setLevel("WARNING")
    try:
        for file in find():
            bar = not quiet and sys.stderr.isatty()
            try:
                path = Path(pooch.retrieve(file.url, file.checksum, file.name, temporary, progressbar=bar))
            except ValueError as error:  # a checksum that differs
                raise InputError(f"{file.url}: {_first_line(error)}; download it again") from None
            except Exception as error:  # whatever the network says
                raise InputError(f"cannot download {file.url}: {_first_line(error)}; try again") from None
            digest = pooch.file_hash(str(path))
            if pinned and pinned.get(file.name, {}).get("sha256") != digest:
                expected = pinned.get(file.name, {}).get("sha256", "nothing of that name")
                raise InputError(f"{file.name} has SHA-256 {digest}, but the pin says {expected}")
            sources[file.name] = {"url": file.url, "sha256": digest, "published": file.checksum}
            if path.name.endswith((".zip", ".tar", ".tar.gz")):
                _unpack(path, temporary)
            if file.git_tree is not None:
                folder, expected = file.git_tree
                if (found := git_tree(temporary / folder)) != expected:
                    raise InputError(f"{file.url}: its folder {folder} is {found} for git, not {expected}")
                sources[file.name]["published"] = f"git tree {expected} of {folder}"
        write_json(temporary / SOURCE, {"files": sources})
        if target.exists():
            raise InputError(f"{target} is there, but was not downloaded by this command; give another folder")
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(target)


def data_command(
    command: str,
    words: list[str],
    listed: Callable[[], str],
    get: Callable[[str, Path], Path],
    described: Callable[[Path], str],
) -> None:
    """What `longseq dna data` and `longseq audio data` do with list, get NAME FOLDER, and info PATH..."""
    action, *rest = words
    if action == "list" and not rest:
        print(listed())
    elif action == "get" and len(rest) == 2:
        get(rest[0], Path(rest[1]))
    elif action == "info" and rest:
        for path in rest:
            print(described(Path(path)))
    else:
        raise InputError(f"'{command} {' '.join(words)}' is not list, get NAME FOLDER, or info PATH; see --help")


def git_tree(folder: Path) -> str:
    """The id (SHA-1) that git gives to a folder of plain files, none of them executable; "nothing" without it."""
    if not folder.is_dir():
        return "nothing"
    entries = b""
    for path in sorted(folder.iterdir(), key=lambda path: path.name.encode()):
        content = path.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        entries += b"100644 " + path.name.encode() + b"\0" + blob.digest()
    return hashlib.sha1(b"tree %d\0" % len(entries) + entries, usedforsecurity=False).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _unpack(archive: Path, folder: Path) -> None:
    """The files of an archive in `folder`, without the one folder that may hold all of them; the archive goes."""
    inside = folder / ".inside"
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(inside)  # which keeps names with .. inside
        else:
            with tarfile.open(archive) as opened:
                for member in opened:
                    if member.isfile() and ".." not in PurePosixPath(member.name).parts:
                        path = inside / member.name.lstrip("/")
                        path.parent.mkdir(parents=True, exist_ok=True)
                        with path.open("wb") as file:
                            shutil.copyfileobj(opened.extractfile(member), file)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        kind = "zip" if archive.suffix == ".zip" else "tar"
        raise InputError(f"{archive.name} is not a whole {kind} archive ({error}); download it again") from None
    entries = [path for path in inside.iterdir() if path.name not in ("__MACOSX", ".DS_Store")]
    root = entries[0] if len(entries) == 1 and entries[0].is_dir() else inside
    for path in list(root.iterdir()):
        path.rename(folder / path.name)
    shutil.rmtree(inside)
    archive.unlink()
