"""`pplug-hf export-vllm`: what `vllm serve` needs for a plug."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..errors import ConfigurationError
from ..modeling import Persona, Personalizer, plug_folder
from ..modeling.frozen import locate
from ..modeling.plug_folder import absolute_if_local
from ..processing import PPlugProcessor
from ..serving.vllm_export import SOFT_PROMPTS, export, export_soft_prompts
from .generate import read_history
from .options import ExportVllmSettings


def export_vllm(settings: ExportVllmSettings) -> None:
    """Write the template, the page and perhaps a soft prompt, and print the command line of the server.

    Args:
        settings: see the fields.

    Raises:
        PPlugError: settings or a plug that cannot be used.
    """
    given = settings.history if settings.persona is None else settings.persona
    if settings.history is not None and settings.persona is not None:
        raise ConfigurationError("--history and --persona are two forms of one thing: give one of them.")
    if given is not None and not settings.query:
        raise ConfigurationError("--query is missing: a soft prompt is of a user and a query.")
    if given is None and settings.query:
        raise ConfigurationError("--query is of a soft prompt: give --history or --persona, too.")
    location = plug_folder.open_location(settings.plug)
    config = plug_folder.load_config(location)
    backbone = locate("backbone", settings.backbone, config, location)
    personalizer = Personalizer.from_pretrained(location, encoder=settings.encoder)  # type: ignore[arg-type]
    processor = PPlugProcessor.from_pretrained(location)  # type: ignore[arg-type]
    name = absolute_if_local(backbone.full_name) or backbone.full_name
    command = export(Path(settings.output).absolute(), personalizer, processor, name, backbone.commit)
    if given is not None:
        persona = Persona.from_pretrained(given) if settings.history is None else read_history(given)
        path = Path(settings.output, SOFT_PROMPTS)
        export_soft_prompts(personalizer, {"soft_prompt": persona}, {"soft_prompt": settings.query or ""}, path)
        print(f"Soft prompt written: {path}")
    print(f"Written: {settings.output}. Start the server, which must not be reached from outside, with:\n")
    print(shlex.join(command))
