"""`TrainedRanker`: dense retrieval with an encoder that `pplug-hf fit` trained, read from its artefact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.vectors import VectorStore
from ..modeling.encoders import freeze_encoder, load_encoder
from ..tasks.task import Task
from .artefacts import Artefact
from .resources import Resources
from .retrievers import DenseRanker

KIND = "ranker"


class TrainedRanker(DenseRanker):
    """Similarity of sentence vectors, of which those of queries, or all, come from a trained encoder.

    Args:
        dated: show the encoder the items' dates.
        **options: of `DenseRanker`.
    """

    def __init__(self, *args: Any, dated: bool = False, **options: Any):
        super().__init__(*args, **options)
        self.dated = dated

    @staticmethod
    def load(artefact: Artefact, resources: Resources) -> TrainedRanker:
        """Return the ranker of an artefact; its vectors lie in a folder of its own in the vector store.

        Raises:
            MismatchError: the encoder that it was trained on top of is not here.
            DataError: the artefact is damaged.
        """
        settings, about = artefact.settings, artefact.about.get("encoder") or {}
        items, queries = settings["prompts"]
        trained = freeze_encoder(load_encoder(str(artefact.folder_of("encoder"))))
        trained = trained.to(resources.language_model.device)
        own = Path(resources.vectors) / "rankers" / artefact.digest
        dated = settings["dated_items"]
        if settings["trained_side"] == "both":
            store = VectorStore(trained, items, own)
            return TrainedRanker(resources.task, store, query_prompt=queries, dated=dated)
        base = resources.encoder_with(settings["encoder"], about.get("name"), about.get("revision"))
        store, query_store = resources.store(base, items), VectorStore(trained, queries, own, task="query")
        return TrainedRanker(resources.task, store, query_prompt=queries, query_store=query_store, dated=dated)

    def _texts(self, items: Sequence[Mapping[str, str]]) -> list[str]:
        return [ranking_text(self.task, item, self.dated) for item in items]


def ranking_text(task: Task, item: Mapping[str, object], dated: bool) -> str:
    """Return the text of an item for the encoder of a ranker, with its date if it has one and that is asked for."""
    date = item.get("date") if dated else None
    return task.retrieval_text(item) + (f" date: {date}" if date else "")
