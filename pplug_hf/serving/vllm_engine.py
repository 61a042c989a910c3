"""`VllmEngine`: answers of vLLM, which serves many users at once and several times faster than `generate`.

engine = VllmEngine.from_pretrained("me/headlines", dtype="bfloat16")
engine.generate([Request("Write a headline: ...", persona=persona, query="...")])

It needs `pip install 'pplug-hf[vllm]'`, and a causal language model: vLLM serves no encoder-decoder models. The plug and its
encoder run here, without the language model; what they make of a persona is checked before vLLM is given it.
"""

from __future__ import annotations

import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self

from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from ..errors import ConfigurationError, DataError, EngineBusyError, EngineError, MismatchError
from ..modeling import Personalizer, frozen, plug_folder
from ..processing import PPlugProcessor
from ..storage.location import Location
from .engine import Answer, Engine, Request, Sampling
from .prompts import check_persona, check_sampling, check_size, prompt_row, query_of
from .vllm_core import VllmCore, Work
from .vllm_prompt import checked_rows, mixed_prompt, sampling_options

DEFAULT = "default"
_QUESTION = "What is the capital of France?"


class LoadedPlug(NamedTuple):
    """A plug, ready to make prompts."""

    personalizer: Personalizer
    processor: PPlugProcessor
    stop_ids: tuple[int, ...] = ()  # of its generation settings


class _Asked(NamedTuple):
    """A request, ready to be sent."""

    prompt: dict[str, object]
    options: dict[str, object]
    length: int  # tokens of the prompt, soft prompt included


class VllmEngine(Engine):
    """An engine on vLLM. Load one with [`from_pretrained`]; `close` it at the end.

    Args:
        core: what answers prompts, see [`VllmCore`].
        plugs: loaded plugs of one language model by name, the default first.
        backbone: configuration of the language model.
        canary: a question, and a text that its right answer contains, for `check`. Default: what the engine answers at its
            start, greedily and without a persona.
        max_queue: requests that may wait for their turn; more are refused.
        time_limit: seconds from asking to the end of an answer.

    Raises:
        ConfigurationError: an encoder-decoder model.
        MismatchError: a plug of another language model.
        EngineError: the engine does not answer, or not the canary.
    """

    def __init__(
        self,
        core: VllmCore,
        plugs: Mapping[str, LoadedPlug],
        backbone: PreTrainedConfig,
        *,
        canary: tuple[str, str] | None = None,
        max_queue: int = 256,
        time_limit: float = 60.0,
    ):
        self._core, self._plugs, self._backbone = core, dict(plugs), backbone
        self._tokenising = threading.Lock()  # a fast tokenizer may refuse a second thread
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._canary, self.max_queue, self.time_limit = canary, max_queue, time_limit
        for name, plug in self._plugs.items():
            _check_backbone(plug.personalizer, backbone)
            if plug.personalizer.config.hidden_size != core.width:
                raise MismatchError(
                    f"The plug {name!r} makes soft tokens of width {plug.personalizer.config.hidden_size}, and vLLM's model "
                    f"has {core.width}: load the language model that the plug was trained on."
                )
        self._is_poisoned = False
        self._known = self._ask_canary() if canary is None else None
        self.check()

    @classmethod
    def from_pretrained(
        cls,
        plug: str,
        plugs: Mapping[str, str] | None = None,
        *,
        backbone: str | None = None,
        encoder: str | SentenceTransformer | None = None,
        device: str | None = None,
        canary: tuple[str, str] | None = None,
        max_queue: int = 256,
        time_limit: float = 60.0,
        **arguments: Any,
    ) -> Self:
        """Load a plug, and start vLLM with its language model.

        Scripts need `if __name__ == "__main__":` around this call, because vLLM starts another process.

        Args:
            plug: folder or Hub id.
            plugs: more plugs of the same language model, by name; the first one has the name "default".
            backbone: folder or Hub id of the language model (default: the plug's).
            encoder: of the plugs, see `Personalizer.from_pretrained`.
            device: of plugs and encoders (default: the encoder's).
            canary, max_queue, time_limit: of the class.
            **arguments: of `vllm.AsyncEngineArgs`: dtype, max_model_len, gpu_memory_utilization, enforce_eager, ...

        Raises:
            MissingPackageError: vLLM is not installed.
            ConfigurationError: an encoder-decoder model, an argument that does not go with personas, or a plug with the
                name of the first one.
            MismatchError: plugs of several language models.
            MissingFileError, DataError, HubError: as `Personalizer.from_pretrained`.
        """
        if DEFAULT in (plugs or {}):
            raise ConfigurationError(
                f"{DEFAULT!r} is the name of the plug that is loaded first: choose another in plugs=."
            )
        location = plug_folder.open_location(plug)
        place = frozen.locate("backbone", backbone, plug_folder.load_config(location), location).pinned()
        if place.gguf_file or place.subfolder:
            kind = "a GGUF file: convert it" if place.gguf_file else "in a folder of a repository: download it"
            raise ConfigurationError(
                f"VllmEngine loads language models from folders of safetensors, and this one is {kind} once, and pass "
                "backbone=<its folder>."
            )
        config = AutoConfig.from_pretrained(place.name, trust_remote_code=False, **place.hub_arguments)
        loaded: dict[str, LoadedPlug] = {}
        for name, where in {DEFAULT: location, **(plugs or {})}.items():
            loaded[name] = _load(where, place, config, encoder, device, loaded)
        folder = tempfile.TemporaryDirectory(prefix="pplug-vllm-")
        try:
            config.save_pretrained(folder.name)  # without it, vLLM does not know the tokenizer's model
            loaded[DEFAULT].processor.tokenizer.save_pretrained(folder.name)
            given = {"tokenizer": folder.name, "revision": place.commit, "hf_token": place.token, **arguments}
            core = VllmCore(place.name, **given)
            try:
                engine = cls(core, loaded, config, canary=canary, max_queue=max_queue, time_limit=time_limit)
            except BaseException:
                core.close()
                raise
        except BaseException:
            folder.cleanup()
            raise
        engine._folder = folder
        return engine

    @property
    def personalizers(self) -> Mapping[str, Personalizer]:
        """The plugs with their encoders by name, the default first."""
        return {name: plug.personalizer for name, plug in self._plugs.items()}

    @property
    def waiting(self) -> int:
        """Number of requests that wait for their turn in vLLM."""
        return max(0, self._core.running - self._core.max_running)

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer requests, in their order. vLLM answers them together with those of other callers.

        Args:
            requests: of any users, plugs and sampling settings.

        Raises:
            DataError, ConfigurationError, MismatchError: a request that cannot be answered; then none is.
            EngineBusyError: too many are waiting already.
            EngineError: the engine is closed or has failed, or an answer took too long.
        """
        asked = self._asked(requests)
        running: list[Work] = []
        try:
            running += [self._core.start(one.prompt, one.options) for one in asked]
            return [self._whole(work, one.length) for work, one in zip(running, asked, strict=True)]
        finally:
            for work in running:
                work.cancel()

    def stream(self, request: Request) -> Iterator[Answer]:
        """Yield an answer in pieces as they are made; closing the iterator ends the work on it.

        Args:
            request: of one user.

        Raises:
            PPlugError: as `generate`, when the first piece is asked for.
        """
        (one,) = self._asked([request])
        work, made = self._core.start(one.prompt, one.options, stream=True), 0
        try:
            for piece in work(self.time_limit):
                made += len(piece.ids)
                if piece.text or piece.finish_reason:
                    yield Answer(piece.text, piece.finish_reason, one.length, made)
        finally:
            work.cancel()

    def check(self) -> None:
        """Ask a question whose answer is known, plain and for a user without history. What failed once stays failed.

        Of answers that are known from the start, the first token counts, for rounding may change later ones: numbers
        depend on what else is in the batch. A poisoned engine writes the token 0 and nothing else.

        Raises:
            EngineError: other answers come, or none.
        """
        answers = [] if self._is_poisoned else self._ask_canary()
        if self._canary is not None:
            is_right = bool(answers) and self._canary[1] in answers[0][0] and any(answers[1][1])
        else:
            known = self._known or answers
            is_right = bool(answers) and all(map(_is_sound, answers, known))
        if not is_right:
            self._is_poisoned = True
            raise EngineError("vLLM does not give the known answer to a known question: it is poisoned, restart it.")

    def close(self) -> None:
        """End vLLM. Requests that are not answered yet fail."""
        self._core.close()
        if self._folder is not None:
            self._folder.cleanup()

    # ---- prompts -------------------------------------------------------------------------------------------

    def _asked(self, requests: Sequence[Request]) -> list[_Asked]:
        """Return requests ready to be sent, after every check."""
        if self.waiting >= self.max_queue:
            raise EngineBusyError(f"{self.waiting} requests are waiting, and no more are taken: ask again later.")
        plugs = [self._plug(request.plug) for request in requests]
        for request, plug in zip(requests, plugs, strict=True):
            check_size(request, self._core.max_length)
            check_sampling(request.sampling)
            if request.persona is not None:
                check_persona(request, plug.personalizer)
        soft = self._soft_prompts(requests)
        return [self._ready(request, plug, rows) for request, plug, rows in zip(requests, plugs, soft, strict=True)]

    def _ready(self, request: Request, plug: LoadedPlug, soft: Tensor | None, salt: str | None = None) -> _Asked:
        with self._tokenising:
            row = prompt_row(plug.processor, self._backbone, request.prompt)
        if not row.ids:
            raise DataError("The prompt is empty.")
        if soft is not None:
            soft = checked_rows(soft, self._core.dtype, self._core.width, plug.personalizer.config.embedding_norm)
        length = len(row.ids) + (0 if soft is None else len(soft))
        room = self._core.max_length - length
        if room < 1:
            raise DataError(
                f"The prompt has {length} tokens, persona included, and the engine reads {self._core.max_length}: shorten "
                "it, or start the engine with a larger max_model_len."
            )
        sampling = replace(request.sampling, max_new_tokens=min(request.sampling.max_new_tokens, room))
        options = sampling_options(sampling, soft is not None, plug.stop_ids)
        return _Asked(mixed_prompt(row, soft, salt or request.tenant), options, length)

    def _soft_prompts(self, requests: Sequence[Request]) -> list[Tensor | None]:
        """Return the soft prompt [P, H] of each request, or None; those of one plug are made together."""
        made: list[Tensor | None] = [None] * len(requests)
        for name in dict.fromkeys(request.plug for request in requests):
            rows = [i for i, r in enumerate(requests) if r.plug == name and r.persona is not None]
            if not rows:
                continue
            personalizer = self._plug(name).personalizer
            queries = [query_of(requests[i], personalizer.config) for i in rows]
            personas, strengths = [requests[i].persona for i in rows], [requests[i].strength for i in rows]
            both = personalizer.soft_prompt(personas, queries, strengths)
            for i, one in zip(rows, both, strict=True):
                made[i] = one
        return made

    def _plug(self, name: str | None) -> LoadedPlug:
        name = next(iter(self._plugs)) if name is None else name
        if name not in self._plugs:
            raise ConfigurationError(f"There is no plug {name!r}; there are {', '.join(self._plugs)}.")
        return self._plugs[name]

    # ---- answers -------------------------------------------------------------------------------------------

    def _whole(self, work: Work, length: int) -> Answer:
        pieces = list(work(self.time_limit))
        made = sum(len(piece.ids) for piece in pieces)
        return Answer("".join(p.text for p in pieces), pieces[-1].finish_reason, length, made)

    def _ask_canary(self) -> list[tuple[str, list[int]]]:
        """Return what the engine answers to the known question: plain, and to a user without history.

        Nothing of it is taken from the cache, and not even an end token ends it.
        """
        plug = self._plug(None)
        request = Request(self._canary[0] if self._canary else _QUESTION, sampling=Sampling(max_new_tokens=8))
        nobody = plug.personalizer.soft_prompt(None, query_of(request, plug.personalizer.config))[0]
        running: list[Work] = []
        try:
            for soft in (None, nobody):
                one = self._ready(request, plug, soft, salt=uuid.uuid4().hex)
                running.append(self._core.start(one.prompt, {**one.options, "ignore_eos": True}))
            answers = [[*work(self.time_limit)] for work in running]
        finally:
            for work in running:
                work.cancel()
        return [("".join(p.text for p in pieces), [i for p in pieces for i in p.ids]) for pieces in answers]


def _is_sound(answer: tuple[str, list[int]], known: tuple[str, list[int]]) -> bool:
    """Return whether an answer begins as the known one, and goes on with tokens other than 0 if that does."""
    (_, ids), (_, expected) = answer, known
    return ids[:1] == expected[:1] and any(ids[1:]) == any(expected[1:])


def _load(
    where: str | Location,
    place: Location,
    backbone: PreTrainedConfig,
    encoder: str | SentenceTransformer | None,
    device: str | None,
    loaded: Mapping[str, LoadedPlug],
) -> LoadedPlug:
    """Load a plug; a sentence encoder that another has loaded already is shared."""
    location = plug_folder.open_location(where)
    config = plug_folder.load_config(location)
    digest = (config.encoder_fingerprint or {}).get("digest")
    known = (one.personalizer for one in loaded.values() if digest and one.personalizer.spec.digest == digest)
    shared = next((one.history_encoder for one in known), encoder)
    personalizer = Personalizer.from_pretrained(location, encoder=shared, device=device)  # type: ignore[arg-type]
    _check_backbone(personalizer, backbone)
    tokenizer = plug_folder.load_tokenizer(location)
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(place.name, trust_remote_code=False, **place.hub_arguments)
    settings = plug_folder.load_generation_config(location)
    ends = () if settings is None or settings.eos_token_id is None else settings.eos_token_id
    stop_ids = (ends,) if isinstance(ends, int) else tuple(ends)
    return LoadedPlug(personalizer, PPlugProcessor.from_config(personalizer.config, tokenizer), stop_ids)


def _check_backbone(personalizer: Personalizer, backbone: PreTrainedConfig) -> None:
    """Refuse a language model that vLLM cannot serve, or that the plug was not made for."""
    if personalizer.config.is_encoder_decoder:
        raise ConfigurationError(
            f"vLLM serves causal language models alone, and {personalizer.config.backbone!r} is an encoder-decoder model: "
            "use TransformersEngine, or `pplug-hf serve` without --engine vllm."
        )
    text = backbone.get_text_config()
    recorded = (personalizer.config.backbone_fingerprint or {}).get("model_type")
    model_type = text.model_type if recorded == text.model_type else backbone.model_type  # the text model alone
    got = {"model_type": model_type, "vocab_size": text.vocab_size, "hidden_size": text.hidden_size}
    frozen.check_fits(personalizer.config, "backbone", got)
