"""`pplug-hf push`: upload a saved plug to the Hub."""

from __future__ import annotations

from ..hub.push import push_folder
from .options import PushSettings


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
