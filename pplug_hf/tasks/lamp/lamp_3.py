"""LaMP-3: how many stars would this user give with the review?"""

from ..task import PromptFormat, Task
from .settings import UNLABELLED_ITEMS, our_recipe, paper_recipe, release_recipe

TASK = Task(
    name="LaMP-3",
    query_marker="review:",
    query_field="text",
    answer_field="score",
    item_template="rated {score} of 5: {text}",
    item_template_unlabelled="{text}",
    prompt=PromptFormat(item='{score} is the score for "{text}" ', cut="text"),
    labels=("1", "2", "3", "4", "5"),
    metric="mae",
    max_new_tokens=10,
)
PAPER = paper_recipe(TASK, {"epochs": 1}, {"max_new_tokens": 10})
RELEASE = release_recipe(PAPER, {"labelled_items": UNLABELLED_ITEMS})
OURS = our_recipe(TASK, PAPER)
