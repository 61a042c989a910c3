"""`Resources`: what the methods of one comparison share, each part loaded once and only if it is needed.

    resources = Resources(task, plugs={"pplug": ["runs/a", "runs/b"]}, decoding=Decoding(num_beams=4))
    answers = Plug("pplug", "runs/a").answer(examples, resources)

The vectors of history items come from one store per encoder and prompt, which personas and dense retrieval share.

n examples, N items of one user, D encoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from sentence_transformers import SentenceTransformer
from tqdm import tqdm
from transformers import PreTrainedModel

from ..configuration import PPlugConfig
from ..data.records import Example
from ..data.vectors import VectorStore
from ..errors import ConfigurationError, MismatchError, MissingFileError
from ..modeling import PPlugForConditionalGeneration, PPlugModel, backbone, encoders
from ..modeling import plug_folder as files
from ..modeling.backbone import backbone_digest, find_tokenizer
from ..modeling.device import checked_device
from ..modeling.prompt_cache import PromptCache
from ..processing import PPlugProcessor
from ..storage.layout import DEFAULT_FOLDER
from ..tasks.task import Task
from .artefacts import Artefact, class_of, read_artefact
from .decoding import Answers, ModelInputs, answer
from .digests import json_digest
from .retrievers import FUSION_C, RANKERS, Ranker, get_ranker

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Settings of `generate`, the same for all methods."""

    num_beams: int = 1
    max_new_tokens: int | None = None  # default: the task's
    max_length: int = 256  # maximum prompt length in tokens, retrieved items included
    constrained: bool = False  # label tasks: nothing but labels


@dataclass
class Resources:
    """Everything that methods share.

    Args:
        task: what is asked.
        plugs: name -> plug folders or Hub ids, one per seed.
        trained: name -> folders of trained artefacts, one per seed.
        backbone: a language model, or where it is (default: where the first plug says).
        backbone_dtype: its data type.
        device: where it runs (default: an accelerator if there is one).
        chat: write prompts in the language model's chat template: "auto" (if it has one), "always" or "never". A plug
            is asked as it was trained.
        system: system text of these chats (default: the first plug's).
        decoding: of all methods.
        batch_size: prompts at once; does not change the answers.
        retriever: sentence encoder of dense retrieval (default: the first plug's, with its vectors).
        seed: of shuffled histories and of random retrieval.
        vectors: folder of the vector store.
        fuse: rankers that `rrf` fuses (default: recency, bm25 and, where there is an encoder for it, dense).
    """

    task: Task
    plugs: dict[str, list[str]] = field(default_factory=dict)
    trained: dict[str, list[str]] = field(default_factory=dict, kw_only=True)
    backbone: str | PreTrainedModel | None = None
    backbone_dtype: str = "auto"
    device: str | None = None
    chat: str = "auto"
    system: str | None = None
    decoding: Decoding = field(default_factory=Decoding)
    batch_size: int = 32
    retriever: str | None = None
    seed: int = 0
    vectors: str = DEFAULT_FOLDER
    fuse: list[str] | None = None

    def __post_init__(self) -> None:
        self._made: dict[Hashable, Any] = {}
        self._encoders: dict[str, SentenceTransformer] = {}
        self._loaded: tuple[str, PPlugForConditionalGeneration] | None = None

    def check(self) -> None:
        """Raise for what would fail later, before anything is loaded.

        Raises:
            ConfigurationError: the settings contradict each other or the task.
            MissingFileError: a plug is not there.
        """
        if self.decoding.constrained and not self.task.labels:
            raise ConfigurationError(
                f"constrained needs a task with a list of labels, and {self.task.name} has none: leave it out."
            )
        if self.device is not None:
            checked_device(self.device)
        if self.backbone is None and not self.plugs:
            raise ConfigurationError("No backbone: pass backbone, or a plug, which knows the one it was made for.")
        for place in self._places:
            self.config(place)

    def once(self, key: Hashable, make: Callable[[], T], examples: Sequence[Example] = ()) -> T:
        """Return what `make` returned when it was first called with this key (and these examples)."""
        key = (key, id(examples) if examples else None)
        if key not in self._made:
            self._made[key] = (make(), examples)  # which are kept, so that no other list gets their id
        return self._made[key][0]

    # ---- models ----------------------------------------------------------------------------------------------

    @property
    def _places(self) -> list[str]:
        return [place for places in self.plugs.values() for place in places]

    def config(self, place: str) -> PPlugConfig:
        """Return a plug's configuration; nothing else of it is loaded."""
        return self.once(("config", place), lambda: files.load_config(place))

    @cached_property
    def language_model(self) -> PreTrainedModel:
        """The frozen backbone, on its device."""
        source: Any = self.backbone
        kwargs: dict[str, Any] = {"dtype": self.backbone_dtype}
        if source is None:
            config = self.config(self._places[0])
            if config.backbone is None:
                raise ConfigurationError("The first plug does not say where its backbone is: pass backbone.")
            source, kwargs["revision"] = config.backbone, config.backbone_revision
        if isinstance(source, str):
            source = backbone.load_backbone(source, **kwargs)
            available = torch.accelerator.is_available()
            device = self.device or (torch.accelerator.current_accelerator() if available else None)
            source = source.to(device) if device else source
        backbone.freeze_backbone(source)
        return source.eval()

    @cached_property
    def processor(self) -> PPlugProcessor:
        """The processor of the language model without a plug."""
        tokenizer = find_tokenizer(self.language_model)
        for place in self._places:
            tokenizer = tokenizer or files.load_tokenizer(place)
        if tokenizer is None:
            raise ConfigurationError(
                "There is no tokenizer next to the backbone or in a plug: save it in the backbone's folder."
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        system = self.system
        if system is None and self._places:
            system = self.config(self._places[0]).system
        return PPlugProcessor(
            tokenizer,
            is_encoder_decoder=bool(self.language_model.config.is_encoder_decoder),
            chat=backbone.writes_chats(tokenizer, self.chat),
            system=system,
        )

    @cached_property
    def prompts(self) -> PromptCache:
        """The states of prompts, which all rows of plugs share that stand behind them."""
        return PromptCache()

    def plug(self, place: str) -> PPlugForConditionalGeneration:
        """Return a plug on the shared language model and encoder. One is kept in memory at a time."""
        if self._loaded is None or self._loaded[0] != place:
            self._loaded = None
            model = PPlugModel.from_pretrained(place, backbone=self.language_model, encoder=self.encoder(place))
            # On an accelerator, reading a prompt may cost less than copying its states there; nobody has measured it.
            on_cpu = self.language_model.device.type == "cpu"
            model.prompt_cache = self.prompts if on_cpu and model.config.placement == "answer" else None
            self._loaded = (place, model)
        return self._loaded[1]

    # ---- encoders --------------------------------------------------------------------------------------------

    def encoder(self, place: str | None) -> SentenceTransformer:
        """Return the sentence encoder of a plug, or the one of dense retrieval; each is loaded once."""
        config = None if place is None else self.config(place)
        name, revision, digest = self.retriever, None, None
        if config is not None:
            name, revision = config.encoder, config.encoder_revision
            digest = (config.encoder_fingerprint or {}).get("digest")
        known = next((self._encoders[each] for each in (digest, name) if each in self._encoders), None)
        if known is not None:
            return known
        if name is None:
            raise ConfigurationError(f"The plug {place!r} does not say where its encoder is.")
        return self._load_encoder(name, revision)

    def encoder_with(self, digest: str, name: str | None, revision: str | None = None) -> SentenceTransformer:
        """Return the sentence encoder with a digest: one that is loaded, a plug's, the retriever, or the one of that name.

        Raises:
            MismatchError: none of them has this digest.
        """
        for plug in self._places:
            if (self.config(plug).encoder_fingerprint or {}).get("digest") == digest:
                return self.encoder(plug)
        for place, commit in ((self.retriever, None), (name, revision)):
            if digest in self._encoders:
                return self._encoders[digest]
            if place is not None and place not in self._encoders:
                with suppress(MissingFileError):  # another machine's folder
                    self._load_encoder(place, commit)
        if digest not in self._encoders:
            tried = ", ".join(repr(place) for place in (self.retriever, name) if place) or "none is named"
            raise MismatchError(
                f"This ranker belongs to the sentence encoder with the digest {digest}, and there is no such encoder here "
                f"({tried}): pass retriever=<its folder or Hub id>."
            )
        return self._encoders[digest]

    def _load_encoder(self, name: str, revision: str | None) -> SentenceTransformer:
        encoder = encoders.freeze_encoder(encoders.load_encoder(name, revision=revision))
        encoder = encoder.to(self.language_model.device)
        self._encoders[name] = self._encoders.setdefault(encoders.fingerprint(encoder)["digest"], encoder)
        return self._encoders[name]

    def store(self, encoder: SentenceTransformer, prompt: str, task: str = "document") -> VectorStore:
        """Return the vectors of an encoder with a prompt, of its side for a task ("document", "query")."""
        return self.once(
            ("store", id(encoder), prompt, task if encoders.has_routes(encoder) else ""),
            lambda: VectorStore(encoder, prompt, self.vectors, task),
        )

    def artefact(self, folder: str) -> Artefact:
        """Return a trained artefact."""
        return self.once(("artefact", folder), lambda: read_artefact(folder))

    @cached_property
    def backbone_digest(self) -> str:
        """A fingerprint of the language model, as it was before anything wrapped it."""
        return backbone_digest(self.language_model, self.processor.tokenizer)

    @property
    def asking(self) -> dict[str, object]:
        """Form of the prompts, and decoding, that the language model is asked with, as JSON takes them."""
        decoding = replace(self.decoding, max_new_tokens=self.decoding.max_new_tokens or self.task.max_new_tokens)
        chat = self.processor.chat and [self.processor.tokenizer.chat_template, self.processor.system]
        return {"chat": chat, "decoding": asdict(decoding)}

    # ---- rankers -----------------------------------------------------------------------------------------------

    def ranking(self, name: str, examples: Sequence[Example], folder: str = "", draw: int = 0) -> list[list[int]]:
        """Return all positions of each history in a ranker's order; worked out once.

        Args:
            name: of a ranker.
            examples: n of them.
            folder: of the ranker, if it is a trained one.
            draw: of random orders, which of several.
        """

        def rank() -> list[list[int]]:
            ranker = self.ranker(name, folder, draw)
            ranker.prepare(examples)
            return [ranker.rank(e) for e in tqdm(examples, desc=f"Ranking by {name}")]

        return self.once(("ranking", name, folder, draw), rank, examples)

    def ranker(self, name: str, folder: str = "", draw: int = 0) -> Ranker:
        """Return a ranker, trained or not; arguments as in `ranking`."""
        if folder:
            artefact = self.artefact(folder)
            load = getattr(class_of(artefact.kind), "load")  # noqa: B009 - the class is known by its kind alone
            return self.once(("ranker", folder), lambda: load(artefact, self))
        options: dict[str, object] = {}
        if name == "random":
            options = {"seed": self.seed + draw}
        elif name == "rrf":
            options = {"rankers": [self.ranker(each, place) for each, place in self.fused().items()]}
        elif name == "dense":
            encoder, template, items, queries = self._dense()
            options = {"store": self.store(encoder, items), "item_template": template, "query_prompt": queries}
        return get_ranker(name, self.task, **options)

    def check_ranker(self, name: str, folder: str = "") -> None:
        """Raise a `PPlugError` if there is no such ranker for this task; nothing is loaded. Arguments as in `ranking`."""
        if folder:
            self.artefact(folder).check_task(self.task.name, self.task.digest)
        elif name == "rrf":
            for each, place in self.fused().items():
                self.check_ranker(each, place)
        elif name != "dense":
            get_ranker(name, self.task)
        elif not (self.retriever or self.plugs):
            raise ConfigurationError("The ranker dense needs a sentence encoder: pass retriever, or a plug.")

    def ranker_key(self, name: str, folder: str = "") -> dict[str, object]:
        """Return what determines a ranker's orders besides its name, as JSON takes it. Arguments as in `ranking`."""
        if folder:
            return {"retriever": {"artefact": self.artefact(folder).digest}}
        if name == "rrf":
            return {
                "fused": {each: self.ranker_key(each, place) for each, place in self.fused().items()},
                "c": FUSION_C,
            }
        if name == "random":
            return {"seed": self.seed}
        return {"retriever": self.dense_key()} if name == "dense" else {}

    def fused(self) -> dict[str, str]:
        """Return the rankers that `rrf` fuses: name -> folder of the first seed, or ""."""
        usual = ["recency", "bm25", *(["dense"] if self.retriever or self.plugs else [])]
        names = usual if self.fuse is None else self.fuse
        for name in names:
            if name == "rrf" or (name not in RANKERS and name not in self.trained):
                known = [each for each in RANKERS if each != "rrf"]
                raise ConfigurationError(f"fuse names {name!r}; choose among {', '.join((*known, *self.trained))}.")
        return {name: self.trained.get(name, [""])[0] for name in names}

    def dense_key(self) -> dict[str, object]:
        """Return what determines the order of dense retrieval, as JSON takes it."""
        encoder, template, *prompts = self._dense()
        return {"encoder": encoders.fingerprint(encoder)["digest"], "template": template, "prompts": prompts}

    def _dense(self) -> tuple[SentenceTransformer, str | None, str, str]:
        """Return encoder, item template, and the prompts of items and of queries for dense retrieval."""
        if self.retriever is None:
            config = self.config(self._places[0])
            encoder = self.encoder(self._places[0])
            return encoder, config.item_template, config.history_prompt, config.query_prompt
        prompts = self.encoder(None).prompts
        return self.encoder(None), None, prompts.get("document") or "", prompts.get("query") or ""

    # ---- answers ---------------------------------------------------------------------------------------------

    def answers(
        self,
        row: str,
        key: Mapping[str, object],
        examples: Sequence[Example],
        make: Callable[[Sequence[Example]], list[str]],
        chosen: Sequence[int] | None = None,
    ) -> list[str]:
        """Return the answers of a row's method, those that are there or what `make` returns.

        Args:
            row: its name.
            key: of its method, which says if answers are the same.
            examples: n of them.
            make: makes the answers to some examples.
            chosen: answer only these examples (default: all).
        """
        name = ("answers", row, json_digest(key))
        if chosen is not None and (name, id(examples)) not in self._made:
            return make([examples[i] for i in chosen])
        answers = self.once(name, lambda: make(examples), examples)
        return answers if chosen is None else [answers[i] for i in chosen]

    def generate(
        self, inputs: ModelInputs, model: PPlugForConditionalGeneration | None = None, description: str = "Answering"
    ) -> Answers:
        """Answer n prompts with the decoding that all methods share, by a plug or by the language model alone.

        Args:
            inputs: the prompts.
            model: the plug.
            description: title of the progress bar; "" shows none.
        """
        decoding, task = self.decoding, self.task
        asked: Any = model or self.language_model  # no type of transformers says that a model generates
        texts = answer(
            asked.generate,
            PPlugProcessor.from_model(model) if model else self.processor,
            inputs.prompts,
            personas=inputs.personas,
            queries=inputs.queries,
            persona_positions=inputs.positions,
            persona_strength=inputs.strength,
            turns=inputs.turns,
            batch_size=self.batch_size,
            max_length=decoding.max_length,
            max_new_tokens=decoding.max_new_tokens or task.max_new_tokens,
            num_beams=decoding.num_beams,
            labels=task.labels if decoding.constrained else None,
            description=description,
        )
        return Answers(texts, inputs.counts)
