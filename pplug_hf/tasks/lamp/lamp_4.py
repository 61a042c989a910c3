"""LaMP-4: the headline that this author would write."""

from ..task import PromptFormat, Task
from .settings import MANY_EXAMPLES, our_recipe, paper_recipe, release_recipe

TASK = Task(
    name="LaMP-4",
    query_marker="article:",
    query_field="text",
    answer_field="title",
    item_template="{title}: {text}",
    item_template_unlabelled="{title}: {text}",
    retrieval_template="{title} {text}",
    prompt=PromptFormat(item='"{title}" is the title for "{text}" ', cut="text"),
    metric="rouge",
    max_new_tokens=64,
)
PAPER = paper_recipe(TASK, item_template="{text} {title}")
RELEASE = release_recipe(PAPER)
OURS = our_recipe(TASK, PAPER, {"epochs": (1, MANY_EXAMPLES)})
