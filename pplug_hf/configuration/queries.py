"""The query in a prompt: what stands between two texts of a task's instruction."""

from __future__ import annotations


def split_prompt(text: str, marker: str, end: str = "") -> tuple[str, str, str]:
    """Return a prompt as (instruction, query, rest), which joined are the prompt.

    Args:
        text: the prompt.
        marker: text after which the query begins (first occurrence). Where it is missing or empty, all of it is the query.
        end: text before which the query ends (last occurrence, so that a title which quotes something stays whole).
    """
    head, found, tail = text.partition(marker) if marker else ("", "", text)
    if not found:
        head, tail = "", text
    cut = tail.rfind(end) if found and end else -1
    body, rest = (tail[:cut], tail[cut:]) if cut >= 0 else (tail, "")
    query = body.strip()
    start = len(body) - len(body.lstrip())
    return head + found + body[:start], query, body[start + len(query) :] + rest


def query_of(text: str, marker: str, end: str = "") -> str:
    """Return the query in a prompt; the whole prompt where nothing stands between the two texts. Arguments as above."""
    return split_prompt(text, marker, end)[1] or text
