"""The tasks as data: where the query stands in an input, what a history item says, how answers are judged.

Everything task-specific of this package stands in this file. To add a task, add one `Task` to `TASKS`;
outside the package, make a `Task` and hand it over wherever a task's name is accepted.

    task = get_task("LaMP-2")
    task.query("Which tag ... tags: [...] description: A burglar dreams.")  # "A burglar dreams."
    task.item_text({"tag": "sci-fi", "description": "A clock stops."})      # "sci-fi: A clock stops."
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from string import Formatter
from typing import Literal, get_args

from pplug_hf.errors import ConfigurationError

Metric = Literal["accuracy", "mae", "rouge"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One personalised task."""

    name: str = field(metadata={"help": "Name of the task, as in 'LaMP-2'."})
    query_marker: str = field(metadata={"help": "Text of an input after which the query starts (first occurrence)."})
    query_end: str = field(
        default="",
        metadata={"help": "Text at which the query ends (last occurrence); empty: at the end of the input."},
    )
    query_field: str = field(metadata={"help": "Field of a history item that plays the role of the query."})
    answer_field: str | None = field(
        default=None,
        metadata={"help": "Field of a history item with its own answer; None if items carry none."},
    )
    item_template: str = field(metadata={"help": "Text of a history item for the encoder, its answer included."})
    item_template_unlabelled: str = field(
        metadata={"help": "The same as in the paper: without tags and scores (titles stay)."}
    )
    labels: tuple[str, ...] = field(
        default=(),
        metadata={"help": "All possible answers; () for free text, or for 'the labels seen in the golds'."},
    )
    metric: Metric = field(metadata={"help": "How answers are judged: accuracy, mae or rouge."})
    max_new_tokens: int = field(metadata={"help": "Most tokens an answer may have."})

    def __post_init__(self) -> None:
        if self.metric not in get_args(Metric):
            raise ConfigurationError(
                f"Task {self.name!r}: metric is {self.metric!r}; choose one of {', '.join(get_args(Metric))}."
            )
        if not self.query_marker:
            raise ConfigurationError(f"Task {self.name!r}: query_marker is empty; give the text before the query.")
        if self.metric == "mae" and not (self.labels and all(_is_number(label) for label in self.labels)):
            raise ConfigurationError(
                f"Task {self.name!r}: labels are {self.labels!r}; metric 'mae' needs numbers as labels, "
                "as in ('1', '2', '3', '4', '5')."
            )

    @property
    def fields(self) -> frozenset[str]:
        """The fields that every history item of this task has (`id` and `date` come on top, where known)."""
        templates = self.item_template + self.item_template_unlabelled
        named = {name for _, name, _, _ in Formatter().parse(templates) if name}
        return frozenset(named | {self.query_field} | ({self.answer_field} if self.answer_field else set()))

    def query(self, input_text: str) -> str:
        """The part of an input that is the user's own, without the instruction around it.

        Args:
            input_text: An input of this task.

        Returns:
            What stands between `query_marker` and `query_end`. The whole input where the marker is missing:
            the benchmark has such rows (LaMP-2 dev, id 110).
        """
        return self._split(input_text)[1]

    def prompt_for(self, item: Mapping[str, str], like: str) -> str:
        """An input that asks for the answer of a history item; used to train on histories.

        Args:
            item: A history item.
            like: An input of this task, best one with the marker: without it there is no instruction to keep.

        Returns:
            `like` with its query replaced by the item's `query_field`.
        """
        before, _, after = self._split(like)
        return before + _text(item, self.query_field).strip() + after

    def item_text(self, item: Mapping[str, str], labelled: bool = True) -> str:
        """What the history encoder reads of one item.

        Args:
            item: A history item; a missing or null field counts as empty.
            labelled: With the user's tag or score (ours), or without (the paper).

        Returns:
            The filled template.
        """
        template = self.item_template if labelled else self.item_template_unlabelled
        return template.format_map({name: _text(item, name) for name in self.fields})

    def _split(self, input_text: str) -> tuple[str, str, str]:
        """An input as (instruction, query, rest); joined they are the input again."""
        head, marker, tail = input_text.partition(self.query_marker)
        if not marker:
            head, tail = "", input_text
        # From the right, so that a title which quotes something is not cut at its own quotes.
        end = tail.rfind(self.query_end) if marker and self.query_end else -1
        body, rest = (tail[:end], tail[end:]) if end >= 0 else (tail, "")
        query = body.strip()
        start = len(body) - len(body.lstrip())
        return head + marker + body[:start], query, body[start + len(query) :] + rest


def _text(item: Mapping[str, str], name: str) -> str:
    value = item.get(name)
    return "" if value is None else str(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


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

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="LaMP-1",  # which of two papers does this author cite?
            query_marker='title "',
            query_end='", which reference',
            query_field="title",
            item_template="{title}: {abstract}",
            item_template_unlabelled="{title}: {abstract}",
            labels=("[1]", "[2]"),
            metric="accuracy",
            max_new_tokens=8,
        ),
        Task(
            name="LaMP-2",  # which tag would this user give the movie?
            query_marker="description:",
            query_field="description",
            answer_field="tag",
            item_template="{tag}: {description}",
            item_template_unlabelled="{description}",
            labels=MOVIE_TAGS,
            metric="accuracy",
            max_new_tokens=16,
        ),
        Task(
            name="LaMP-3",  # how many stars does this review go with?
            query_marker="review:",
            query_field="text",
            answer_field="score",
            item_template="rated {score} of 5: {text}",
            item_template_unlabelled="{text}",
            labels=("1", "2", "3", "4", "5"),
            metric="mae",
            max_new_tokens=10,
        ),
        Task(
            name="LaMP-4",  # the headline this author would write
            query_marker="article:",
            query_field="text",
            answer_field="title",
            item_template="{title}: {text}",
            item_template_unlabelled="{title}: {text}",
            metric="rouge",
            max_new_tokens=64,
        ),
        Task(
            name="LaMP-5",  # the paper title this author would choose
            query_marker="paper:",
            query_field="abstract",
            answer_field="title",
            item_template="{title}: {abstract}",
            item_template_unlabelled="{title}: {abstract}",
            metric="rouge",
            max_new_tokens=64,
        ),
        Task(
            name="LaMP-6",  # the subject line of an e-mail; the corpus is licensed, users bring it
            query_marker=":",
            query_field="text",
            answer_field="title",
            item_template="{title}: {text}",
            item_template_unlabelled="{title}: {text}",
            metric="rouge",
            max_new_tokens=64,
        ),
        Task(
            name="LaMP-7",  # a tweet in this user's words
            query_marker=":",
            query_field="text",
            item_template="{text}",
            item_template_unlabelled="{text}",
            metric="rouge",
            max_new_tokens=128,
        ),
        Task(
            name="demo",  # on which shelf does this reader put the book? comes with the package
            query_marker="book:",
            query_field="text",
            answer_field="tag",
            item_template="{tag}: {text}",
            item_template_unlabelled="{text}",
            metric="accuracy",
            max_new_tokens=6,
        ),
    )
}


def get_task(name: str | Task) -> Task:
    """The task of that name.

    Args:
        name: "LaMP-2", "LaMP_2" or "lamp-2"; a `Task` is handed back as it is.

    Returns:
        The task.

    Raises:
        ConfigurationError: There is no task of that name.
    """
    if isinstance(name, Task):
        return name
    wanted = name.strip().lower().replace("_", "-")
    for task in TASKS.values():
        if task.name.lower() == wanted:
            return task
    raise ConfigurationError(
        f"There is no task {name!r}; choose one of {', '.join(TASKS)}, or pass a Task of your own."
    )
