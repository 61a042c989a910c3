"""Translation of the Hub client's errors into errors of this package that say what to do."""

from __future__ import annotations

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from ..errors import HubError, MissingFileError

# Errors that the client raises; their common base class is not an OSError in every version.
FAILURES = (OSError, HTTPError, RevisionResolutionError, HFValidationError, EntryNotFoundError)


def hub_error(error: BaseException, task: str, remedy: str = "") -> MissingFileError | HubError:
    """Translate an error of the Hub's client. Its text is not quoted, since it may contain signed addresses.

    Args:
        error: raised by the client, transformers or sentence-transformers; its causes are looked at too.
        task: the step that failed, e.g. "Cannot load config.json of the plug 'me/plug'".
        remedy: another way out, e.g. ", or pass backbone=<a loaded model>".

    Returns:
        A [`MissingFileError`] if there is no such repository or file (as far as the token can see), else a
        [`HubError`].
    """
    chain = chain_of(error)
    status = status_of(error)
    missing, reason = _reason(chain, status)
    return (MissingFileError if missing else HubError)(f"{task}: {reason}{remedy}.")


def _reason(chain: list[BaseException], status: int | None) -> tuple[bool, str]:
    """Return True if there is no such thing, and the reason in words."""
    name = type(chain[0]).__name__
    if any(isinstance(error, GatedRepoError) for error in chain):
        return False, "its owner grants access one by one (gated): ask for it on its page on the Hub and pass token="
    if any(isinstance(error, RevisionNotFoundError) for error in chain):
        return True, "the Hub knows the repository, but no such branch, tag or commit. Check revision="
    if status == 401 and any("Invalid credentials" in header_of(error, "X-Error-Message") for error in chain):
        return False, "the Hub does not accept the token (401): pass another token=, or log in with `hf auth login`"
    # Without a token, missing and private repositories are both a 401.
    if status == 401 or any(isinstance(error, RepositoryNotFoundError) for error in chain):
        hidden = f"the Hub has no such repository, or a private one that this token may not see ({status or 404})"
        return True, f"{hidden}. Check the name, pass token=, or log in with `hf auth login`"
    if status == 403:
        return False, "the token may not do this (403): pass a token= with the right to, or ask the repository's owner"
    if status == 404:
        return True, "the Hub has no such file (404). Check the name, revision= and subfolder="
    if status == 429:
        return False, "the Hub asks to slow down (429): try again in some minutes; with a token= the limits are higher"
    if status is not None and status >= 500:
        return False, f"the Hub is out of order ({status}): try again later"
    if status is not None:
        return False, f"the Hub refuses it ({status})"
    if any(isinstance(error, HTTPError) for error in chain):
        return False, f"the Hub cannot be reached, or the connection broke ({name}). Check it and try again"
    if is_incomplete_download(chain[0]):
        return False, "the connection broke: the file does not have the length that the Hub says. Try again"
    if own := next((e for e in chain if isinstance(e, OSError) and e.errno is not None and e.strerror), None):
        return False, f"this machine cannot keep it ({own.strerror}). Check its disk and cache_dir="
    if any(isinstance(error, HFValidationError) for error in chain):
        return True, "there is no such folder, and it is not a Hub id (owner/name). Check the path"
    if any(isinstance(error, OfflineModeIsEnabled) for error in chain):
        return True, "there is no such folder, the cache does not have it, and HF_HUB_OFFLINE is set. Unset it"
    nowhere = f"it is in no local folder of that name, and neither the cache nor the Hub answered for it ({name})"
    return True, f"{nowhere}. Check the name and the connection"


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of the Hub's answer, if there was one."""
    codes = (getattr(getattr(e, "response", None), "status_code", None) for e in chain_of(error))
    return next((code for code in codes if code), None)


def header_of(error: BaseException, name: str) -> str:
    """Return a header of the Hub's answer; "" if there is none."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    return headers.get(name) or ""


def is_incomplete_download(error: BaseException) -> bool:
    """Return True if a file is shorter or longer than announced, which the client reports in words only."""
    return any(isinstance(e, OSError) and "Consistency check failed" in str(e) for e in chain_of(error))


def chain_of(error: BaseException | None) -> list[BaseException]:
    """Return an error and its causes."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
