"""Downloads and uploads against a server on this machine that speaks the hub's protocol."""

import hashlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from hub_fixtures import hub, switch_off, use_endpoint  # noqa: F401
from hub_server import COMMIT, Hub, running_hub
from opencoca.store.hub import HubError, NotInRepositoryError, download, find_downloaded, upload_folder

REPO = "someone/coca"
WEIGHTS = bytes(range(256)) * 400
NAME = "model.safetensors"


@pytest.fixture
def repository(hub: Hub) -> Hub:  # noqa: F811
    hub.add(REPO, **{NAME: WEIGHTS, "config.json": b'{"a": 1}'})
    return hub


def contents(hub: Hub) -> list[str]:  # noqa: F811
    return [request for request in hub.requests if request.startswith("GET /content")]


def test_the_first_download_brings_the_file_and_the_second_nothing(repository: Hub) -> None:
    assert find_downloaded(REPO, NAME) is None
    path = download(REPO, NAME)
    assert path.read_bytes() == WEIGHTS
    assert download(REPO, NAME) == find_downloaded(REPO, NAME) == path
    assert len(contents(repository)) == 1


def test_a_known_commit_is_not_asked_for_again(repository: Hub) -> None:
    path = download(REPO, NAME, COMMIT)
    repository.requests.clear()
    assert download(REPO, NAME, COMMIT) == path
    assert repository.requests == []


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_what_is_there_is_found_without_a_network(
    repository: Hub, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    path = download(REPO, NAME, revision)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        use_endpoint(monkeypatch, f"http://127.0.0.1:{unused.getsockname()[1]}")
        assert download(REPO, NAME, revision) == path
        with pytest.raises(HubError, match=r"cannot be reached and config\.json is not in the cache; check"):
            download(REPO, "config.json", revision)


def test_offline_mode_uses_what_is_there_and_asks_nothing(repository: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = download(REPO, NAME)
    repository.requests.clear()
    switch_off(monkeypatch)
    assert download(REPO, NAME) == path
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set and config\.json .* was not downloaded before; unset"):
        download(REPO, "config.json")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, so nothing can be uploaded"):
        upload_folder(path.parent, REPO)
    assert repository.requests == []


def test_an_interrupted_download_goes_on_where_it_stopped(repository: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repository.break_once[NAME] = 30_000
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    assert download(REPO, NAME).read_bytes() == WEIGHTS
    first, second = repository.ranges
    assert first is None
    assert second is not None
    assert 20_000 < int(second.removeprefix("bytes=").rstrip("-")) <= 30_000


@pytest.mark.parametrize("length", [0, 30_000])
def test_a_file_that_stays_short_is_no_file(repository: Hub, length: int) -> None:
    repository.break_always[NAME] = length
    with pytest.raises(HubError, match=f"download from {REPO} .*failed .*try again"):
        download(REPO, NAME)
    assert find_downloaded(REPO, NAME) is None
    repository.break_always.clear()
    assert download(REPO, NAME).read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", [NAME, "config.json"])
def test_a_changed_file_is_deleted(repository: Hub, name: str) -> None:
    repository.garbled.add(name)
    with pytest.raises(HubError, match=f"{name} of {REPO} arrived with the checksum .* and was deleted"):
        download(REPO, name)
    assert find_downloaded(REPO, name) is None
    repository.garbled.clear()
    assert download(REPO, name).read_bytes() == repository.repositories[REPO].files[name]


def test_a_pinned_checksum_decides(repository: Hub) -> None:
    with pytest.raises(HubError, match=r"instead of 000000000000\.\.\. and was deleted"):
        download(REPO, NAME, sha256="0" * 64)
    assert find_downloaded(REPO, NAME) is None
    assert download(REPO, NAME, sha256=hashlib.sha256(WEIGHTS).hexdigest()).read_bytes() == WEIGHTS


def test_what_is_missing_is_named(repository: Hub) -> None:
    with pytest.raises(NotInRepositoryError, match=r"someone/coca at http.* has no file vocab\.txt \(revision main\)"):
        download(REPO, "vocab.txt")
    with pytest.raises(HubError, match="has no revision 'v2'; give a branch"):
        download(REPO, NAME, "v2")
    with pytest.raises(HubError, match=r"there is no repository someone/else at .* check the name, and log in"):
        download("someone/else", NAME)
    with pytest.raises(HubError, match="'a/b/c' is no repository's name"):
        download("a/b/c", NAME)


def test_closed_doors_are_named(repository: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for access, message in (("gated", "is gated: accept its terms"), ("private", "or you may not read it")):
        repository.repositories[REPO].access = access
        with pytest.raises(HubError, match=message):
            download(REPO, NAME)
    for status, message in (
        (403, r"refuses access \(403\); run `hf auth login`"),
        (500, "with the error 500"),
    ):
        repository.status = status
        with pytest.raises(HubError, match=message):
            download(REPO, NAME)
    repository.status = 200
    monkeypatch.setenv("HF_TOKEN", repository.token)
    assert download(REPO, NAME).read_bytes() == WEIGHTS


def test_a_hub_that_is_not_there_is_one_sentence_at_once(tmp_path: Path) -> None:
    """In another process, where the library waits as it does for users and prints what it prints."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-m", "opencoca", "caption", __file__, "--model", f"hf-hub:{REPO}"]
        start = time.monotonic()
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert time.monotonic() - start < 15  # the library alone takes 25 s
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        f"opencoca: {REPO} at {address} cannot be reached and config.json is not in the cache; check the network, or "
        "set HF_ENDPOINT"
    ]


def test_an_upload_arrives(repository: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / NAME).write_bytes(WEIGHTS)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nhello\n")
    with pytest.raises(HubError, match=r"refuses access \(401\); run `hf auth login`, or set HF_TOKEN, with a token"):
        upload_folder(folder, "someone/new")
    monkeypatch.setenv("HF_TOKEN", repository.token)
    assert upload_folder(folder, "someone/new") == f"{repository.address}/someone/new"
    assert repository.repositories["someone/new"].files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert download("someone/new", NAME).read_bytes() == WEIGHTS


def test_the_environment_decides_as_for_all_who_use_the_hub(tmp_path: Path) -> None:
    """In another process, as users set it: HF_ENDPOINT and HF_HOME, then the same without network."""
    code = (
        "import sys; from opencoca.store.hub import download; print(download(*sys.argv[1:]).read_bytes() == b'content')"
    )
    command = [sys.executable, "-c", code, REPO, "config.json"]
    with running_hub() as server:
        server.add(REPO, **{"config.json": b"content"})
        environment = {**os.environ, "HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path)}
        environment.pop("HF_HUB_CACHE", None)
        assert subprocess.check_output(command, env=environment, text=True) == "True\n"
        asked = len(server.requests)
        environment["HF_HUB_OFFLINE"] = "1"
        assert subprocess.check_output(command, env=environment, text=True) == "True\n"
        assert len(server.requests) == asked
    assert (tmp_path / "hub").is_dir()
