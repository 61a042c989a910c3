"""LaMP-7: a tweet in this user's words."""

from ..task import PromptFormat, Task
from .settings import FEW_EXAMPLES, our_recipe, paper_recipe, release_recipe

TASK = Task(
    name="LaMP-7",
    query_marker=":",
    query_field="text",
    item_template="{text}",
    item_template_unlabelled="{text}",
    prompt=PromptFormat(
        item='"{text}" ',
        cut="text",
        frame="{head}{items} are written by a person. Following the given patterns {input}",
        reserved="are written by user. Following the given patterns",
        item_tokens='"" ',
    ),
    own_prompt="Complete this tweet: {text:start}",
    own_answer="{text:rest}",
    metric="rouge",
    max_new_tokens=128,
)
PAPER = paper_recipe(TASK)
RELEASE = release_recipe(PAPER)
OURS = our_recipe(TASK, PAPER, {"epochs": (5, FEW_EXAMPLES)})
