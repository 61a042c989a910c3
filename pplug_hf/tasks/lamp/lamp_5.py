"""LaMP-5: the paper title that this author would choose."""

from ..task import PromptFormat, Task
from .settings import MANY_EXAMPLES, our_recipe, paper_recipe, release_recipe

TASK = Task(
    name="LaMP-5",
    query_marker="paper:",
    query_field="abstract",
    answer_field="title",
    item_template="{title}: {abstract}",
    item_template_unlabelled="{title}: {abstract}",
    retrieval_template="{title} {abstract}",
    prompt=PromptFormat(
        item='"{title}" is a title for "{abstract}" ',
        cut="abstract",
        frame="{head}{items}. Following the given patterns {input}",
        reserved="Following the given patterns",
        item_tokens='"{title}" is a title "{abstract}" ',
    ),
    metric="rouge",
    max_new_tokens=64,
)
PAPER = paper_recipe(TASK, item_template="{title} {abstract}")
RELEASE = release_recipe(PAPER)
OURS = our_recipe(TASK, PAPER, {"epochs": (1, MANY_EXAMPLES)})
