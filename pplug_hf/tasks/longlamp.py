"""LongLaMP (arXiv 2407.11016): long texts in a user's words. Rows as the data set LongLaMP/LongLaMP on the Hub has them.

They are one object per question with `input`, `output` and `profile`, and their user in a field of another name:

    LongLaMP-abstract  abstract_generation_*   name         profile: title, abstract, id, year
    LongLaMP-review    product_review_*        reviewerId   profile: overall, summary, description, reviewText
    LongLaMP-topic     topic_writing_*         author       profile: summary, content, author, id
    LongLaMP-email     licensed (Avocado): users bring it, with profile: title, text

Prompts with retrieved items are worded as in the benchmark's code, which also cuts an abstract to its first 750 words.
The e-mail task follows that code alone: its data cannot be had to try it.
"""

from __future__ import annotations

from functools import partial

from .task import PromptFormat, Task

_task = partial(Task, metric="meteor", max_new_tokens=1024)

ABSTRACT = _task(
    name="LongLaMP-abstract",
    user_field="name",
    query_marker='abstract for the title "',
    query_end='" using the following items:',
    query_field="title",
    answer_field="abstract",
    item_template="{title}: {abstract}",
    item_template_unlabelled="{title}: {abstract}",
    retrieval_template="{title} {abstract}",
    prompt=PromptFormat(
        item='"{abstract}" is the abstract for the title "{title}"',
        cut="abstract",
        frame="{head}{items}. Use the above abstracts as context to understand the style and language of the user and, "
        "{input}",
        reserved="Use the above abstracts as context to understand the style and language of the user and,",
        frame_tokens=3,
    ),
    # A profile has no keywords, and those of another paper would be wrong: the title is all that is known.
    history_prompt_template='Generate an abstract for the title "{title}" using the following items: {title}',
)
REVIEW = _task(
    name="LongLaMP-review",
    user_field="reviewerId",
    query_marker='product with description "',
    query_end='". The summary of the review text is',
    query_field="description",
    answer_field="reviewText",
    item_template="rated {overall} of 5: {summary}. {reviewText}",
    item_template_unlabelled="{summary}. {reviewText}",
    retrieval_template="{overall} {summary} {description} {reviewText}",
    retrieval_query_pattern="(?s)(.+)",  # the whole input, as in the benchmark
    prompt=PromptFormat(
        item='"{overall}" is a rating for the product with description "{description}". "{summary}" is summary for '
        '"{reviewText}" ',
        cut="reviewText",
        frame="{head}{items}. Following the given patterns {input}",
        reserved="Following the given patterns",
        frame_tokens=3,
    ),
    history_prompt_template="Generate the review text written by a reviewer who has a given an overall rating of "  # sic
    '"{overall}" for a product with description "{description}". The summary of the review text is "{summary}".',
)
TOPIC = _task(
    name="LongLaMP-topic",
    user_field="author",
    query_marker="reddit post",
    query_field="summary",
    answer_field="content",
    item_template="{summary}: {content}",
    item_template_unlabelled="{summary}: {content}",
    retrieval_template="{summary} {content}",
    prompt=PromptFormat(
        item='"{summary}" is a summary for "{content}" ',
        cut="content",
        frame="{head}{items}. Following the given patterns, {input}",
        reserved="Following the given patterns,",
        frame_tokens=3,
    ),
)
EMAIL = _task(
    name="LongLaMP-email",
    query_marker=":",
    query_field="title",
    answer_field="text",
    item_template="{title}: {text}",
    item_template_unlabelled="{title}: {text}",
    retrieval_template="{text}",
    prompt=PromptFormat(item='"{title}" is the title for "{text}" ', cut="text"),
)
TASKS = (ABSTRACT, REVIEW, TOPIC, EMAIL)
