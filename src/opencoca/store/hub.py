"""Files from and to the Hugging Face Hub; the one module that imports huggingface_hub.

The library's own settings apply: cache (HF_HOME), token (`hf auth login` or HF_TOKEN), mirror (HF_ENDPOINT), offline
mode (HF_HUB_OFFLINE). It shows progress bars and resumes broken downloads. This module adds two things: every
downloaded file is compared with a checksum, and every failure is one sentence.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

# Imported when first used: the import is slow, and most commands need nothing from the hub.
_SHA256_DIGITS, _GIT_DIGITS = 64, 40
_ANSWER_S = 4.0


class HubError(ValueError):
    """Something could not be downloaded or uploaded; the message is one sentence with the remedy."""


class NotInRepositoryError(HubError):
    """The repository is there and can be read, but this file is not in it."""


def download(repo_id: str, file_name: str, revision: str = "main", sha256: str | None = None) -> Path:
    """Returns the path of a repository's file in the cache, and downloads it first if it is not there.

    A file is checked when it arrives: against `sha256`, or else against the checksum under which the hub keeps it
    (SHA-256 for large files, Git's for small ones). One with another checksum is deleted.

    Args:
        repo_id: "organisation/name".
        revision: a branch, a tag or the full id of a commit; with an id, nothing is asked of the network again.

    Raises:
        NotInRepositoryError: the repository has no such file.
        HubError: there is no such repository or revision, it is gated or private, the hub cannot be reached, the
            network is switched off and the file not in the cache, or what arrived is not what the hub holds.
    """
    from huggingface_hub import hf_hub_download

    was_there = find_downloaded(repo_id, file_name, revision)
    with _one_sentence(repo_id, file_name, revision):
        if was_there is None:
            _ask_once(repo_id, file_name, revision)
        path = Path(hf_hub_download(repo_id, file_name, revision=revision, etag_timeout=_answer_s()))
    expected = sha256 or _checksum_of_cache(path)
    if expected and path != was_there and (found := _checksum(path, expected)) != expected:
        _delete(path)
        raise HubError(
            f"{file_name} of {repo_id} arrived with the checksum {found[:12]}... instead of {expected[:12]}... and was "
            "deleted; load it again, and if this repeats, the file was changed where it is kept"
        )
    return path


def find_downloaded(repo_id: str, file_name: str, revision: str = "main") -> Path | None:
    """Returns the path of a file that is in the cache already, else None. Never uses the network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo_id, file_name, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def upload_folder(folder: Path, repo_id: str, *, private: bool = False, message: str = "Upload a CoCa") -> str:
    """Uploads the files of a folder in one commit, creates the repository if needed, and returns its address.

    Raises HubError, a sentence with the remedy.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="opencoca")
    with _one_sentence(repo_id, writing=True):
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    return str(address)


def _ask_once(repo_id: str, file_name: str, revision: str) -> None:
    """Raises HubError if the hub does not answer: the library would try again and again for half a minute."""
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_hf_file_metadata(hf_hub_url(repo_id, file_name, revision=revision), timeout=_answer_s())
    except errors.HFValidationError:
        raise
    except errors.HfHubHTTPError as error:
        if getattr(error.response, "status_code", 500) >= 500:
            raise
    except Exception as error:  # those of the library's HTTP client, which differs between its versions
        raise HubError(_unreachable(f"{repo_id} at {constants.ENDPOINT}", file_name)) from error


def _answer_s() -> float:
    """How long to wait for the hub's first answer: the library's setting if the user set it."""
    from huggingface_hub import constants

    return constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else _ANSWER_S


@contextlib.contextmanager
def _one_sentence(repo_id: str, file_name: str = "", revision: str = "main", writing: bool = False) -> Iterator[None]:
    """Rewrites the library's errors, which are paragraphs, as one sentence."""
    from huggingface_hub import constants, errors, logging

    if "HF_HUB_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()  # its warnings of attempts that failed are not for users
    place = f"{repo_id} at {constants.ENDPOINT}"
    try:
        yield
    except HubError:
        raise
    except errors.GatedRepoError as error:
        raise HubError(
            f"{place} is gated: accept its terms on its page, then run `hf auth login` or set HF_TOKEN to your token"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"there is no repository {place}, or you may not {'write' if writing else 'read'} it; check the name, and "
            "log in with `hf auth login` or HF_TOKEN if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{place} has no revision {revision!r}; give a branch, a tag or the full id of a commit"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        answer = error.__cause__
        answered = isinstance(answer, errors.HfHubHTTPError)
        raise HubError(_refused(answer, place, writing) if answered else _unreachable(place, file_name)) from error
    except errors.EntryNotFoundError as error:
        raise NotInRepositoryError(
            f"{place} has no file {file_name} (revision {revision}); check the name of the repository"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it") from error
    except errors.HFValidationError as error:
        raise HubError(f"{repo_id!r} is no repository's name; write it as organisation/name") from error
    except errors.HfHubHTTPError as error:
        raise HubError(_refused(error, place, writing)) from error
    except Exception as error:  # those of the library's HTTP client, which differs between its versions
        reason = " ".join(str(error).split()) or type(error).__name__
        raise HubError(
            f"the {'upload to' if writing else 'download from'} {place} failed ({reason[:200]}); try again"
        ) from error


def _unreachable(place: str, file_name: str) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return (
            f"HF_HUB_OFFLINE is set and {file_name} of {place} was not downloaded before; unset it once, or copy the "
            f"cache folder {constants.HF_HUB_CACHE} from a machine that has the file"
        )
    return f"{place} cannot be reached and {file_name} is not in the cache; check the network, or set HF_ENDPOINT"


def _refused(error: Exception, place: str, writing: bool) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        wanted = "a token that may write" if writing else "a token that may read it"
        return f"{place} refuses access ({status}); run `hf auth login`, or set HF_TOKEN, with {wanted}"
    return f"{place} answered with the error {status}; try again later"


def _checksum_of_cache(path: Path) -> str | None:
    """Returns the hub's checksum of a cached file, its name in the cache; None where the cache has no links."""
    if not path.is_symlink():
        return None
    name = Path(os.readlink(path)).name
    is_checksum = len(name) in (_SHA256_DIGITS, _GIT_DIGITS) and all(c in "0123456789abcdef" for c in name)
    return name if is_checksum else None


def _checksum(path: Path, like: str) -> str:
    """Computes the file's checksum, of the same kind as the one given."""
    digest = hashlib.sha256() if len(like) == _SHA256_DIGITS else hashlib.sha1(usedforsecurity=False)
    if len(like) == _GIT_DIGITS:
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, lambda: digest).hexdigest()


def _delete(path: Path) -> None:
    content = path.resolve()
    path.unlink(missing_ok=True)
    content.unlink(missing_ok=True)
