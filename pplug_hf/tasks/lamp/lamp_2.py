"""LaMP-2: which tag would this user give the movie?"""

from ..task import PromptFormat, Task
from .settings import UNLABELLED_ITEMS, our_recipe, paper_recipe, release_recipe

MOVIE_TAGS = (
    "sci-fi",
    "based on a book",
    "comedy",
    "action",
    "twist ending",
    "dystopia",
    "dark comedy",
    "classic",
    "psychology",
    "fantasy",
    "romance",
    "thought-provoking",
    "social commentary",
    "violence",
    "true story",
)
TASK = Task(
    name="LaMP-2",
    query_marker="description:",
    query_field="description",
    answer_field="tag",
    item_template="{tag}: {description}",
    item_template_unlabelled="{description}",
    prompt=PromptFormat(item='the tag for the movie: "{description}" is "{tag}" ', cut="description"),
    labels=MOVIE_TAGS,
    metric="accuracy",
    max_new_tokens=16,
)
PAPER = paper_recipe(TASK)
RELEASE = release_recipe(PAPER, {"labelled_items": UNLABELLED_ITEMS})
OURS = our_recipe(
    TASK,
    PAPER,
    {
        "batch_size": (16, "Smaller batches make more steps of few examples, and this task has the fewest."),
        "synthetic_users": (3000, "Synthetic users: a plug memorises the hundred or so of a small data set."),
    },
    {
        "item_template": (
            "tag: {tag}. tag: {tag}. {description}",
            "In the vector of a long description one mention of the tag drowns.",
        ),
    },
)
