"""`pplug-hf push`: upload a saved plug to the Hub."""

from __future__ import annotations

from dataclasses import dataclass

from ..hub.push import push_folder
from .options import option, required


@dataclass
class PushSettings:
    """Upload a plug, its vocabulary and its card to the Hub, in one commit."""

    plug: str = required("Plug folder.")
    repo: str = required("Repository, as 'owner/name'; created if it does not exist.")
    private: bool = option(False, "Make a new repository private.")
    revision: str | None = option(None, "Branch; created if it does not exist (default: main).")
    create_pr: bool = option(False, "Open a pull request instead.")
    subfolder: str = option("", "Folder inside the repository.")
    message: str | None = option(None, "Commit message (default: Upload plug).")
    description: str | None = option(None, "Extended description of the commit.")
    token: str | None = option(
        None, "Access token (default: that of `hf auth login`, or HF_TOKEN, which no process list shows)."
    )
    results: str | None = option(None, "Folder of `pplug-hf bench`, for the card.")
    license: str | None = option(None, "Licence shown on the model card, e.g. apache-2.0.")
    datasets: list[str] | None = option(None, "Hub ids of the training data, for the card.")
    language: list[str] | None = option(None, "Language codes of the data, e.g. en.")
    tags: list[str] | None = option(None, "More tags for the card.")


def push(settings: PushSettings) -> str:
    """Upload the plug; print and return the address of the commit or pull request."""
    commit = push_folder(
        settings.plug,
        settings.repo,
        private=settings.private or None,
        revision=settings.revision,
        create_pr=settings.create_pr,
        subfolder=settings.subfolder,
        commit_message=settings.message,
        commit_description=settings.description,
        token=settings.token,
        results=settings.results,
        license=settings.license,
        datasets=settings.datasets or (),
        language=settings.language or (),
        tags=settings.tags or (),
    )
    url = commit.pr_url or commit.commit_url
    print(url)
    return url
