"""LaMP-1: which of two papers would this author cite?"""

from ..task import PromptFormat, Task
from .settings import FEW_EXAMPLES, our_recipe, paper_recipe, release_recipe

TASK = Task(
    name="LaMP-1",
    query_marker='title "',
    query_end='", which reference',
    query_field="title",
    item_template="{title}: {abstract}",
    item_template_unlabelled="{title}: {abstract}",
    retrieval_template="{title} {abstract}",
    retrieval_query_pattern=r'(?s)\[1\]: "(.*?)" \[2\]: "(.*)"',
    prompt=PromptFormat(
        item='"{title}"',
        cut="title",
        after="title",
        frame="{head}, and {items}{input}",
        frame_tokens=0,
        item_tokens=2,
    ),
    own_prompt="Write the abstract of a paper with this title: {title}",
    own_answer="{abstract}",
    labels=("[1]", "[2]"),
    metric="accuracy",
    max_new_tokens=8,
)
PAPER = paper_recipe(TASK, item_template="{title} {abstract}")
RELEASE = release_recipe(PAPER)
OURS = our_recipe(TASK, PAPER, {"epochs": (5, FEW_EXAMPLES)})
