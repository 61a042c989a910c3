"""Registration of plugs with transformers' Auto classes and `pipeline`, once pplug_hf is imported.

These take seconds to import, and `import pplug_hf` should not. So plugs are registered with each of them right after it is
imported, before or after pplug_hf; and a stand-in is registered, which imports our code when a plug is loaded.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import ConfigurationError

if TYPE_CHECKING:
    from .configuration import PPlugConfig
    from .modeling import PPlugForConditionalGeneration
    from .processing import PPlugProcessor


def _register_config(auto: ModuleType) -> None:
    from .configuration import PPlugConfig

    auto.AutoConfig.register(PPlugConfig.model_type, PPlugConfig, exist_ok=True)


def _register_models(auto: ModuleType) -> None:
    from .configuration import PPlugConfig

    for name, seq2seq in (("AutoModel", None), ("AutoModelForSeq2SeqLM", True), ("AutoModelForCausalLM", False)):
        # Errors and pipelines name the class.
        stand_in = type("PPlugForConditionalGeneration", (_Model,), {"auto_class": name, "seq2seq": seq2seq})
        getattr(auto, name).register(PPlugConfig, stand_in, exist_ok=True)


def _register_processor(auto: ModuleType) -> None:
    from .configuration import PPlugConfig

    # A processor's folder names the class, and AutoProcessor finds it by that name.
    auto.AutoProcessor.register(PPlugConfig, type("PPlugProcessor", (_Processor,), {}), exist_ok=True)


def _register_pipelines(pipelines: ModuleType) -> None:
    from . import pipeline  # noqa: F401 - registers itself


_REGISTER = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.processing_auto": _register_processor,
    "transformers.pipelines": _register_pipelines,
}


class _Model:
    """Stands in for [`PPlugForConditionalGeneration`] in an Auto class."""

    auto_class: str
    seq2seq: bool | None  # the kind of backbone that the Auto class is for; None: any

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, config: PPlugConfig, **kwargs: Any
    ) -> PPlugForConditionalGeneration:
        if cls.seq2seq not in (None, config.is_encoder_decoder):
            kind, other = ("encoder-decoder", "Seq2Seq") if config.is_encoder_decoder else ("causal", "Causal")
            raise ConfigurationError(
                f"The backbone of the plug {str(pretrained_model_name_or_path)!r} is {kind}, which {cls.auto_class} is "
                f"not for: use AutoModelFor{other}LM, or PPlugModel or AutoModel for both kinds."
            )
        # Added by the Auto classes. Trust in the code of this repository is not trust in the backbone's.
        kwargs = {key: value for key, value in kwargs.items() if key not in ("adapter_kwargs", "trust_remote_code")}
        from .modeling import PPlugModel

        return PPlugModel.from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: object, **kwargs: object) -> NoReturn:
        raise ConfigurationError(
            f"{cls.auto_class}.from_config would make a plug without its frozen backbone: use "
            "PPlugForConditionalGeneration.from_backbone(backbone, encoder=...)."
        )


class _Processor:
    """Stands in for [`PPlugProcessor`]."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> PPlugProcessor:
        from .processing import PPlugProcessor

        return PPlugProcessor.from_pretrained(*args, **kwargs)


class _AfterImport(MetaPathFinder):
    """Finds the modules of `_REGISTER` as the other finders do, and registers plugs once they have run."""

    def __init__(self) -> None:
        self.busy: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _REGISTER or fullname in self.busy:
            return None
        self.busy.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.busy.remove(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                if module.__name__ == fullname:  # one loader may load several modules
                    _REGISTER[fullname](module)

            spec.loader.exec_module = run_and_register
        return spec


def register() -> None:
    """Register plugs with transformers: now, as far as it is imported, or as soon as it is."""
    sys.meta_path.insert(0, _AfterImport())
    for name, register_with in _REGISTER.items():
        if name in sys.modules:
            register_with(sys.modules[name])
