"""LaMP-6: the subject line of an e-mail. The corpus is licensed: users bring it."""

from ..task import PromptFormat, Task
from .settings import MANY_EXAMPLES, our_recipe, paper_recipe, release_recipe

TASK = Task(
    name="LaMP-6",
    query_marker=":",
    query_field="text",
    answer_field="title",
    item_template="{title}: {text}",
    item_template_unlabelled="{title}: {text}",
    retrieval_template="{text}",
    prompt=PromptFormat(item='"{title}" is the title for "{text}" ', cut="text"),
    metric="rouge",
    max_new_tokens=64,
)
PAPER = paper_recipe(
    TASK,
    not_reproduced=(
        "Paper and code have no LaMP-6, whose corpus is licensed: these are their settings for the other tasks.",
    ),
)
RELEASE = release_recipe(PAPER)
OURS = our_recipe(TASK, PAPER, {"epochs": (1, MANY_EXAMPLES)})
