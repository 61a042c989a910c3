"""Answers of any rows (`rows.py`) to the same examples: one backbone, loaded once, and one decoding for all.

    bench = Bench(task, examples, plugs={"pplug": ["runs/a", "runs/b"]}, decoding=Decoding(num_beams=4))
    for done in bench.run([(parse_row("bm25@4"), 0), (parse_row("pplug:top-4", ["pplug"]), 1)]):
        print(done.row, done.run, done.answers)

Item vectors come from one store per encoder and prompt, which personas and dense retrieval share. `bench.key(row, run)`
says everything that determines the answers of a row (`keys.py`), so that they need not be worked out twice.

n examples, N items of one user, D encoder width.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..configuration import PPlugConfig
from ..data.dataset import PersonaDataset
from ..data.lamp import Example
from ..data.vectors import DEFAULT_FOLDER, VectorStore
from ..errors import ConfigurationError, DataError
from ..methods.decoding import answer, shuffle_histories
from ..methods.label_frequencies import LabelFrequencies, history_labels, label_log_probs
from ..methods.names import Row
from ..methods.prompts import persona_positions, retrieval_prompt
from ..methods.retrievers import Ranker, RecencyRanker, get_ranker
from ..modeling import PPlugForConditionalGeneration, PPlugModel, backbone, encoders
from ..modeling import plug_folder as files
from ..modeling.backbone import find_tokenizer
from ..modeling.persona import Persona
from ..processing import PPlugProcessor
from ..tasks.task import Task
from .attention_profile import weight_profile
from .provenance import Keys


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How every row answers."""

    num_beams: int = 1
    max_new_tokens: int | None = None  # default: the task's
    max_length: int = 256  # tokens of a prompt at most, retrieved items included
    constrained: bool = False  # label tasks: nothing but labels


class Inputs(NamedTuple):
    """What the backbone is given, for n examples."""

    prompts: list[str]
    personas: list[Persona] | None = None
    queries: list[str] | Tensor | None = None  # texts, or vectors [n, D] for a plug with a frozen input encoder
    positions: Tensor | None = None  # [n] tokens in front of the soft prompt, where that is not its usual place
    counts: dict[str, int] = {}  # noqa: RUF012 - never written to


class Done(NamedTuple):
    """One run of one row."""

    row: Row
    run: int
    answers: list[str]
    counts: dict[str, int]  # of retrieved items
    seconds: float
    weights: dict[str, Any] | None = None  # which items spoke, see `weights.py`; of a plug's own row


@dataclass
class Bench:
    """What all rows share.

    Args:
        task: what is asked.
        examples: n of them.
        plugs: name -> plug folders or Hub ids, one per seed.
        backbone: a language model's place or a loaded one (default: where the first plug says).
        backbone_dtype: its data type.
        device: where it runs (default: an accelerator if there is one).
        decoding: of every row.
        batch_size: prompts at once; does not change the answers.
        retriever: sentence encoder of dense retrieval (default: the first plug's, with its vectors).
        training: examples that the label frequencies are fitted on, of users whom the backbone does not know.
        seed: of the wrong users and of random retrieval.
        vectors: folder of the vector store.
    """

    task: Task
    examples: Sequence[Example]
    plugs: dict[str, list[str]] = field(default_factory=dict)
    backbone: Any = None
    backbone_dtype: str = "auto"
    device: str | None = None
    decoding: Decoding = field(default_factory=Decoding)
    batch_size: int = 32
    retriever: str | None = None
    training: Sequence[Example] = ()
    seed: int = 0
    vectors: str = DEFAULT_FOLDER

    def __post_init__(self) -> None:
        self._configs: dict[str, PPlugConfig] = {}
        self._encoders: dict[str, Any] = {}
        self._stores: dict[tuple[str, str], VectorStore] = {}
        self._personas: dict[tuple[str, str, str | None], list[Persona]] = {}
        self.key = Keys(self)
        self._found: dict[str, list[list[dict[str, str]]]] = {}
        if not self.examples:
            raise DataError("There are no questions to answer: choose another split.")

    # ---- what may be asked -----------------------------------------------------------------------------------

    def check(self, rows: Iterable[Row]) -> None:
        """Raise for what would fail later, before anything is loaded.

        Raises:
            ConfigurationError: a row or the decoding needs something that the task or the settings do not have.
            DataError: a row needs other examples.
            MissingFileError: a plug is not there.
        """
        if self.decoding.constrained and not self.task.labels:
            raise ConfigurationError(
                f"constrained needs a task with a list of labels, and {self.task.name} has none: leave it out."
            )
        try:
            torch.device(self.device or "cpu")
        except RuntimeError:
            raise ConfigurationError(
                f"The device is {self.device!r}; write it as torch does: cpu, cuda, cuda:1, mps."
            ) from None
        if self.backbone is None and not self.plugs:
            raise ConfigurationError("No backbone: pass backbone, or a plug, which knows the one it was made for.")
        for row in rows:
            if row.frequencies and not (self.task.labels and self.task.answer_field):
                raise ConfigurationError(
                    f"The row {row} is for tasks whose items carry one of a list of labels, and {self.task.name} has "
                    "none: leave it out."
                )
            if row.frequencies and not self.training:
                raise ConfigurationError(
                    f"The row {row} is fitted on the train split, and no examples of it are there or left: leave it "
                    "out, or choose another leave_out_users."
                )
            if row.shown == "wrong-user":
                shuffle_histories(self.examples, self.seed)
            if row.ranker and row.ranker != "dense":
                get_ranker(row.ranker, self.task)
            if row.ranker:
                self.task.prompt_format  # noqa: B018 - raises if there is none
            if row.ranker == "dense" and not self.retriever and not self.plugs:
                raise ConfigurationError(
                    f"The row {row} needs a sentence encoder: pass retriever, or a plug, which brings its own."
                )
        for places in self.plugs.values():
            for place in places:
                self.config(place)

    def config(self, place: str) -> PPlugConfig:
        """A plug's configuration; nothing else of it is loaded."""
        if place not in self._configs:
            self._configs[place] = files.load_config(place)
        return self._configs[place]

    # ---- what all rows share ---------------------------------------------------------------------------------

    @cached_property
    def language_model(self) -> Any:
        """The frozen backbone, on its device."""
        source: Any = self.backbone
        kwargs: dict[str, Any] = {"dtype": self.backbone_dtype}
        if source is None:
            config = self.config(self._first_plug)
            if config.backbone is None:
                raise ConfigurationError("The first plug does not say where its backbone is: pass backbone.")
            source, kwargs["revision"] = config.backbone, config.backbone_revision
        if isinstance(source, str):
            source = backbone.load_backbone(source, **kwargs)
            device: Any = self.device
            if device is None and torch.accelerator.is_available():
                device = torch.accelerator.current_accelerator()
            source = source if device is None else source.to(device)
        backbone.freeze_backbone(source)
        return source.eval()

    @cached_property
    def processor(self) -> PPlugProcessor:
        """Of the bare backbone."""
        tokenizer = find_tokenizer(self.language_model)
        for place in [place for places in self.plugs.values() for place in places]:
            tokenizer = tokenizer or files.load_tokenizer(place)
        if tokenizer is None:
            raise ConfigurationError(
                "No tokenizer is beside the backbone or in a plug: save it in the backbone's folder."
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return PPlugProcessor(tokenizer, is_encoder_decoder=bool(self.language_model.config.is_encoder_decoder))

    @property
    def _first_plug(self) -> str:
        return next(places[0] for places in self.plugs.values())

    def encoder(self, place: str | None) -> Any:
        """The sentence encoder of a plug, or the retriever's; each is loaded once."""
        if place is None:
            name: Any = self.retriever
            revision = None
        else:
            config = self.config(place)
            known = (config.encoder_fingerprint or {}).get("digest")
            if known in self._encoders:
                return self._encoders[known]
            name, revision = config.encoder, config.encoder_revision
            if name is None:
                raise ConfigurationError(f"The plug {place!r} does not say where its encoder is.")
        if name not in self._encoders:
            encoder = encoders.freeze_encoder(
                encoders.load_encoder(name, **({"revision": revision} if revision else {}))
            )
            encoder = encoder.to(self.language_model.device)
            digest = encoders.fingerprint(encoder)["digest"]
            self._encoders[name] = self._encoders.setdefault(digest, encoder)
        return self._encoders[name]

    def store(self, encoder: Any, prompt: str) -> VectorStore:
        """The vectors of an encoder behind a prompt."""
        key = (str(id(encoder)), prompt)
        if key not in self._stores:
            self._stores[key] = VectorStore(encoder, prompt, self.vectors)
        return self._stores[key]

    def load(self, place: str) -> PPlugForConditionalGeneration:
        """A plug on the shared backbone and encoder."""
        return PPlugModel.from_pretrained(place, backbone=self.language_model, encoder=self.encoder(place))

    def personas(self, model: PPlugForConditionalGeneration) -> list[Persona]:
        """Everybody's whole history, as this plug encodes it."""
        config, store = model.config, self.store(model.history_encoder, model.config.history_prompt)
        key = (str(id(model.history_encoder)), config.history_prompt, config.item_template)
        if key not in self._personas:
            dataset = PersonaDataset(self.examples, store, config.item_template)
            self._personas[key] = [dataset.persona(i) for i in range(len(dataset))]
        return self._personas[key]

    def queries(self, model: PPlugForConditionalGeneration) -> list[str] | Tensor:
        """The requests: vectors of the frozen encoder, or texts for a plug that trained its own."""
        texts = [e.query for e in self.examples]
        if model.plug.input_encoder is not None:
            return texts
        return self.store(model.history_encoder, model.config.query_prompt)(texts)

    def ranker(self, name: str) -> Ranker:
        """A ranker with this bench's seed and encoder."""
        if name != "dense":
            return get_ranker(name, self.task, **({"seed": self.seed} if name == "random" else {}))
        place, template, items, requests = self.dense()
        store = self.store(self.encoder(place), items)
        return get_ranker("dense", self.task, store=store, item_template=template, query_prompt=requests)

    def dense(self) -> tuple[str | None, str | None, str, str]:
        """(plug that lends its encoder, template, prompt of items, prompt of requests) of dense retrieval."""
        if self.retriever is None:
            config = self.config(self._first_plug)
            return self._first_plug, config.item_template, config.history_prompt, config.query_prompt
        prompts = self.encoder(None).prompts
        return None, None, prompts.get("document") or "", prompts.get("query") or ""

    def retrieved(self, name: str, k: int) -> list[list[dict[str, str]]]:
        """The first k items of every history in a ranker's order, which is worked out once."""
        if name not in self._found:
            ranker = self.ranker(name)
            ranker.prepare(self.examples)
            bar = tqdm(self.examples, desc=f"Ranking by {name}")
            self._found[name] = [[e.history[i] for i in ranker.rank(e)] for e in bar]
        return [items[:k] for items in self._found[name]]

    # ---- one row ---------------------------------------------------------------------------------------------

    def inputs(self, row: Row, model: PPlugForConditionalGeneration | None = None) -> Inputs:
        """What a row shows the backbone.

        Args:
            row: any but the label frequencies.
            model: its plug, if it has one.
        """
        inputs = Inputs([e.prompt for e in self.examples])
        processor = self.processor if model is None else PPlugProcessor.from_model(model)
        if row.ranker:
            found = self.retrieved(row.ranker, row.k)
            budget = self.decoding.max_length
            shown = [
                retrieval_prompt(self.task, e.prompt, items, processor.tokenizer, budget)
                for e, items in zip(tqdm(self.examples, desc="Writing prompts"), found, strict=True)
            ]
            counts = {
                "retrieved_items": sum(map(len, found)),
                "shown_items": sum(prompt.items for prompt in shown),
                "prompts_without_items": sum(prompt.items == 0 for prompt in shown),
            }
            positions = persona_positions(processor, shown, budget) if row.paper_order else None
            inputs = Inputs([prompt.text for prompt in shown], positions=positions, counts=counts)
        if model is None or row.ignores_history:
            return inputs
        personas = self.personas(model)
        queries = self.queries(model) if model.plug.aggregator.needs_query else None
        if row.shown == "wrong-user":
            personas = [personas[other] for other in shuffle_histories(self.examples, self.seed)]
        elif row.shown == "last":
            newest = RecencyRanker(self.task)
            personas = [_part(p, newest.rank(e)[: row.items]) for p, e in zip(personas, self.examples, strict=True)]
        elif row.shown == "top":
            personas = self._loudest(model, personas, queries, row.items)
        return inputs._replace(personas=personas, queries=queries)

    def _loudest(
        self, model: PPlugForConditionalGeneration, personas: list[Persona], queries: Any, most: int
    ) -> list[Persona]:
        """The items of each persona with the largest weight; where all weigh the same, those closest to the request."""
        kept: list[Persona] = []
        if queries is None:
            requests = self.store(model.history_encoder, model.config.query_prompt)([e.query for e in self.examples])
            for persona, request in zip(personas, requests, strict=True):
                scores = F.normalize(persona.vectors, dim=-1) @ F.normalize(request, dim=-1)
                kept.append(_part(persona, _best(scores, most)))
            return kept
        weights = self._weights(model, personas, queries)
        return [_part(p, _best(w, most)) for p, w in zip(personas, weights, strict=True)]

    def weights(self, model: PPlugForConditionalGeneration) -> list[Tensor]:
        """How much each item of each example's history speaks, n vectors [N]; of a plug that looks at requests."""
        return self._weights(model, self.personas(model), self.queries(model))

    def _weights(self, model: PPlugForConditionalGeneration, personas: list[Persona], queries: Any) -> list[Tensor]:
        found: list[Tensor] = []
        for start in range(0, len(personas), self.batch_size):
            part = personas[start : start + self.batch_size]
            weights = model.persona_weights(part, query=queries[start : start + self.batch_size])  # [B, N]
            found += [w[: len(p)] for p, w in zip(part, weights, strict=True)]
        return found

    def answer(self, row: Row, model: PPlugForConditionalGeneration | None = None, title: str = "") -> Inputs:
        """As `inputs`, with the answers in the place of the prompts."""
        title = title or str(row)
        if row.frequencies:
            return Inputs(self._by_frequencies())
        inputs, decoding = self.inputs(row, model), self.decoding
        return inputs._replace(
            prompts=answer(
                self.language_model.generate if model is None else model.generate,
                self.processor if model is None else PPlugProcessor.from_model(model),
                inputs.prompts,
                personas=inputs.personas,
                queries=inputs.queries,
                persona_positions=inputs.positions,
                batch_size=self.batch_size,
                max_length=decoding.max_length,
                max_new_tokens=decoding.max_new_tokens or self.task.max_new_tokens,
                num_beams=decoding.num_beams,
                labels=self.task.labels if decoding.constrained else None,
                description=title,
            )
        )

    def _by_frequencies(self) -> list[str]:
        """The rival's answers; its two weights are fitted on training users."""
        task = self.task

        def log_probs(examples: Sequence[Example]) -> Tensor:
            prompts = [e.prompt for e in examples]
            options = {"batch_size": self.batch_size, "max_length": self.decoding.max_length}
            return label_log_probs(self.language_model, self.processor, prompts, task.labels, **options)

        rival = LabelFrequencies.fit(
            log_probs(self.training),
            [history_labels(e, task) for e in self.training],
            [str(e.target) for e in self.training],
            task.labels,
        )
        return rival.predict(log_probs(self.examples), [history_labels(e, task) for e in self.examples], task.metric)

    def run(self, wanted: Iterable[tuple[Row, int]], titles: dict[Row, str] | None = None) -> Iterator[Done]:
        """Answers of rows, plug by plug, so that each is loaded once; with a progress bar over them.

        Args:
            wanted: (row, number of its plug). The order in which they are done is another one.
            titles: of rows, for the progress bar.
        """
        names = list(self.plugs)
        todo = sorted(wanted, key=lambda pair: (names.index(pair[0].plug) if pair[0].plug else -1, pair[1]))
        loaded: tuple[str, Any] = ("", None)
        with tqdm(total=len(todo), desc="Rows", unit="row", disable=len(todo) < 2) as bar:
            for row, run in todo:
                start = time.monotonic()
                place = self.plugs[row.plug][run] if row.plug else ""
                if loaded[0] != place:
                    loaded = ("", None)  # one plug at a time
                    loaded = (place, self.load(place) if place else None)
                done = self.answer(row, loaded[1], (titles or {}).get(row, ""))
                seconds = time.monotonic() - start
                profile = self._profile(row, loaded[1])
                yield Done(row, run, done.prompts, done.counts, seconds, profile)
                bar.update()

    def _profile(self, row: Row, model: PPlugForConditionalGeneration | None) -> dict[str, Any] | None:
        """Which items spoke, for a plug's own row; there is nothing to say where all items weigh the same."""
        if model is None or row != Row(plug=row.plug) or row.ignores_history:
            return None
        if not model.plug.aggregator.needs_query:
            return None
        return weight_profile(self.weights(model), self.examples)


def _part(persona: Persona, places: Sequence[int]) -> Persona:
    """Some of a persona's items, in their order."""
    return persona if len(places) == len(persona) else persona.select(places)


def _best(scores: Tensor, most: int) -> list[int]:
    """Positions of the largest, of equals the later."""
    return np.argsort(scores.float().cpu().numpy(), kind="stable")[::-1][:most].tolist()
