"""A page to try a plug: one prompt, answered by the bare model, for a user and for another user.

It listens on loopback, loads nothing from elsewhere, and sends nothing to anybody.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from html import escape
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from ..errors import PPlugError
from ..optional import require
from ..serving.rebinding import is_from_elsewhere
from .assistant import Assistant, items_of

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response
    from gradio import Blocks

T = TypeVar("T")

OWN_ITEMS = "your own items"
WRITTEN, STORED = "the history above", "the stored user of this name"
SHOWN = 8  # items with their weights

_CSS = """
.gradio-container {max-width: 1200px !important; margin: 0 auto !important;}
.answer textarea {font-size: 1.1rem !important; font-weight: 600;}
.own.answer {border: 2px solid #24528f !important;}
.weights {display: grid; grid-template-columns: 3.4em 18% 1fr; gap: 5px 10px; align-items: center; font-size: .9rem;}
.weights .number {text-align: right; font-variant-numeric: tabular-nums;}
.weights .bar {background: #24528f; height: 11px; border-radius: 3px; min-width: 2px;}
.weights .text {line-height: 1.25;}
.note {color: #6b7280; font-size: .85rem; margin: 6px 0 0 0;}
footer {display: none !important;}
"""
# The browser itself refuses whatever is not from this page, should a version of Gradio ask for it.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' ws: wss:; form-action 'self'"
)


def load_gradio() -> ModuleType:
    """Import Gradio with its analytics switched off."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    return require("gradio", "app", "The page")


def build(assistant: Assistant, title: str) -> Blocks:
    """Return the page as `gradio.Blocks`.

    Args:
        assistant: what answers.
        title: of the page.

    Raises:
        MissingPackageError: Gradio is not installed.
    """
    gr = load_gradio()
    samples = {sample.user: sample for sample in assistant.samples}
    names = list(samples)
    first = samples[names[0]] if names else None
    second = names[1] if len(names) > 1 else OWN_ITEMS

    def lines(user: str) -> str:
        return "\n".join(samples[user].items) if user in samples else ""

    def choose(user: str) -> tuple[str, str, str]:
        sample = samples.get(user)
        return lines(user), sample.prompt if sample else "", sample.query if sample else ""

    def ask(
        source: str, items: str, user: str, other: str, prompt: str, query: str, strength: float
    ) -> tuple[str, str, str, str]:
        made = assistant.ask(prompt, query, user if source == STORED else items_of(items), items_of(other), strength)
        return made.bare, made.own, made.other, weights_table(made.weights)

    def keep(user: str, items: str) -> str:
        return assistant.keep(user, items_of(items))

    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(
            f"## {title}\nOne prompt, three answers. The language model is the same; only the soft prompt differs."
        )
        with gr.Row():
            with gr.Column(scale=5):
                with gr.Row():
                    chosen = gr.Dropdown([*names, OWN_ITEMS], value=first.user if first else OWN_ITEMS, label="User")
                    compared = gr.Dropdown([*names, OWN_ITEMS], value=second, label="Another user")
                items = gr.Textbox(
                    lines(chosen.value),
                    lines=9,
                    max_lines=9,
                    label="History of the user, one item per line",
                    elem_id="items",
                )
                with gr.Accordion("History of the other user", open=False):
                    other = gr.Textbox(lines(second), lines=6, max_lines=6, show_label=False, elem_id="other")
                source = gr.Radio([WRITTEN, STORED], value=WRITTEN, label="Answer for", elem_id="source")
                user = gr.Textbox(label="Name in the store", placeholder="ann", elem_id="user")
                with gr.Row():
                    store = gr.Button("Store this user", elem_id="store")
                    forget = gr.Button("Delete this user", variant="stop", elem_id="forget")
                status = gr.Markdown(elem_id="status")
            with gr.Column(scale=7):
                prompt = gr.Textbox(first.prompt if first else "", lines=2, label="Prompt", elem_id="prompt")
                query = gr.Textbox(
                    first.query if first else "",
                    label="Query that weights the items (empty: the prompt)",
                    elem_id="query",
                )
                with gr.Row():
                    strength = gr.Slider(
                        0,
                        3,
                        value=1,
                        step=0.05,
                        label="Strength (1: as trained)",
                        elem_id="strength",
                        scale=4,
                    )
                    button = gr.Button("Ask", variant="primary", elem_id="ask", scale=1)
                with gr.Row():
                    answers = [
                        gr.Textbox(label=label, lines=2, interactive=False, elem_id=id_, elem_classes=["answer", id_])
                        for label, id_ in (("Bare model", "bare"), ("This user", "own"), ("Another user", "another"))
                    ]
                gr.Markdown("**Items of this user with the largest weights**")
                table = gr.HTML(weights_table([]), elem_id="weights")

        private = {"api_visibility": "private"}
        asked = [source, items, user, other, prompt, query, strength]
        chosen.change(choose, chosen, [items, prompt, query], **private)
        compared.change(lines, compared, other, **private)
        # One event of both: two would answer side by side, and the older answer could be shown last. What is asked while
        # an answer is written is asked next.
        gr.on(
            [button.click, strength.release],
            _told(gr, ask),
            asked,
            [*answers, table],
            trigger_mode="always_last",
            **private,
        )
        store.click(_told(gr, keep), [user, items], status, **private)
        forget.click(_told(gr, assistant.forget), user, status, **private)
    return page


def _told(gr: ModuleType, work: Callable[..., T]) -> Callable[..., T]:
    """Return a function that shows an error of this package on the page."""

    def run(*values: object) -> T:
        try:
            return work(*values)
        except PPlugError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return run


def weights_table(weights: list[tuple[float, str]]) -> str:
    """Return the heaviest items as a table with bars.

    Args:
        weights: and items, the heaviest first.
    """
    if not weights:
        return '<p class="note">Ask something to see them.</p>'
    cells = []
    heaviest = weights[0][0]
    for weight, text in weights[:SHOWN]:
        if weight < heaviest / 100:
            break  # the rest has hardly any
        width = 100 * weight / heaviest
        cells.append(
            f'<div class="number">{weight:.1%}</div><div><div class="bar" style="width:{width:.0f}%"></div></div>'
            f'<div class="text" title="{escape(text)}">{escape(text)}</div>'
        )
    note = f"{len(weights)} items in all; their weights add up to 100 %."
    return f'<div class="weights">{"".join(cells)}</div><p class="note">{note}</p>'


def web_app(page: Blocks) -> FastAPI:
    """Return the page as an ASGI application that lets a browser load nothing from elsewhere, and no other page in.

    Args:
        page: as of `build`.
    """
    gr = load_gradio()
    fastapi = require("fastapi", "app", "The page")
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def refuse_other_places(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if is_from_elsewhere(request.scope):
            return fastapi.Response("This page is at http://127.0.0.1 and http://localhost alone.", 421)
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    theme = gr.themes.Default(
        primary_hue="blue",
        spacing_size="sm",
        text_size="md",
        font=["system-ui", "sans-serif"],  # which are there; the theme's own would be fetched
        font_mono=["ui-monospace", "monospace"],
    )
    return gr.mount_gradio_app(
        app, page, path="/", theme=theme, css=_CSS, footer_links=[], ssr_mode=False, enable_monitoring=False
    )
