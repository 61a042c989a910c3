"""The demo: on which shelf would this reader put the book? Its data comes with the package."""

from .task import PromptFormat, Task

TASK = Task(
    name="demo",
    query_marker="book:",
    query_field="text",
    answer_field="tag",
    item_template="{tag}: {text}",
    item_template_unlabelled="{text}",
    prompt=PromptFormat(item='the shelf for the book: "{text}" is "{tag}" ', cut="text"),
    metric="accuracy",
    max_new_tokens=6,
)
