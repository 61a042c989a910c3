"""What `vllm serve` is given: the template renders as the model's own does, with the persona beside the text."""

import base64
import io
import shlex

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_chats import IGNORES_SYSTEM, WITHOUT_SYSTEM
from test_processing import CHATS, TEMPLATES

from pplug_hf import ConfigurationError, DataError, PPlugProcessor
from pplug_hf.cli import main
from pplug_hf.serving.vllm_export import chat_template, content_parts, export, export_soft_prompts

SOFT = "<soft>"  # what vLLM's server writes for a soft prompt
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = (
    "{% set loop_messages = messages %}{% for m in loop_messages %}{% set content = '[' + m['role'] + ']\n\n' + "
    "m['content'] | trim + '[end]' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\n\n' }}{% endif %}"
)
MACRO = (
    "{% macro last() %}{{ messages[-1].content }}{% endmacro %}{% if messages[0].role == 'system' %}{{ messages[0].content }}"
    "{% set messages = messages[1:] %}{% endif %}{{ last() }}|{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
OWN = {**TEMPLATES, "chatml": CHATML, "trimmed": TRIMMED, "macro": MACRO}


def made(template=None, family="llama", **choices):
    tokenizer = tiny.tokenizer(family)
    tokenizer.chat_template = template
    return PPlugProcessor(tokenizer, chat=template is not None, **choices)


def in_parts(chat):
    """The chat as vLLM's server gives it to the template: every content is a list, and a soft prompt a text of its own."""
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat]
    parts[-1]["content"].insert(0, {"type": "text", "text": SOFT})
    return parts


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_persona_and_text_are_neighbours(name, chat):
    processor = made(OWN[name])
    tokenizer, options = processor.tokenizer, {"tokenize": False, "add_generation_prompt": True}
    joined = [*chat[:-1], {**chat[-1], "content": SOFT + chat[-1]["content"]}]
    expected = tokenizer.apply_chat_template(joined, **options)
    template = chat_template(processor)
    assert tokenizer.apply_chat_template(in_parts(chat), chat_template=template, **options) == expected
    assert SOFT + chat[-1]["content"].rstrip() in expected
    # And without a persona it is the model's own, whatever form the contents have.
    plain = tokenizer.apply_chat_template(chat, **options)
    assert tokenizer.apply_chat_template(chat, chat_template=template, **options) == plain
    of_parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat]
    assert tokenizer.apply_chat_template(of_parts, chat_template=template, **options) == plain


def test_messages_without_content():
    processor = made("{% for m in messages %}{{ m.role }}{{ m.content or '-' }}{{ m.tool_calls or '' }} {% endfor %}")
    chat = [
        {"role": "user", "content": []},
        {"role": "assistant", "content": None, "tool_calls": "call"},
        {"role": "tool"},
    ]
    render = processor.tokenizer.apply_chat_template
    assert render(chat, chat_template=chat_template(processor), tokenize=False) == "user- assistant-call tool- "


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_plug_that_writes_no_chats(family):
    processor = made(family=family)
    chat = [{"role": "user", "content": [{"type": "text", "text": SOFT}, {"type": "text", "text": "the sea"}]}]
    text = processor.tokenizer.apply_chat_template(chat, chat_template=chat_template(processor), tokenize=False)
    assert text == ("<bos>" if family == "llama" else "") + SOFT + "the sea"
    with pytest.raises(ConfigurationError, match="adds tokens to a text that a chat template cannot add"):
        chat_template(made(family="bart"))


# ---- soft prompts -------------------------------------------------------------------------------------------------


def test_the_parts_of_a_message():
    rows = torch.arange(12.0).view(3, 4)
    for placement, order in (("prompt", ["prompt_embeds", "text"]), ("answer", ["text", "prompt_embeds"])):
        parts = content_parts("the sea", rows[1:], placement)
        assert [part["type"] for part in parts] == order
        soft = next(part for part in parts if part["type"] == "prompt_embeds")
        loaded = torch.load(io.BytesIO(base64.b64decode(soft["data"])), weights_only=True)
        assert loaded.equal(rows[1:]) and loaded.is_contiguous()
        assert loaded.untyped_storage().nbytes() == 32, "not the rows of other users"
    with pytest.raises(DataError, match="NaN"):
        content_parts("the sea", rows / 0, "prompt")


def test_a_file_of_soft_prompts(tmp_path):
    model = tiny.model("llama", placement="answer")
    personas = {"ann": tiny.HISTORY, "bob": model.encode_persona(tiny.HISTORY[:1])}
    queries = {"ann": "the sea", "bob": "rain"}
    export_soft_prompts(model.personalizer, personas, queries, tmp_path / "soft.safetensors")
    rows = load_file(tmp_path / "soft.safetensors")
    for name in personas:
        torch.testing.assert_close(rows[name], model.soft_prompt(personas[name], queries[name])[0])
    with safe_open(tmp_path / "soft.safetensors", framework="pt") as file:
        assert file.metadata()["placement"] == "answer"
    model.personalizer.plug.scale = float("inf")
    with pytest.raises(DataError, match="damaged"):
        export_soft_prompts(model.personalizer, personas, queries, tmp_path / "broken.safetensors")
    assert not (tmp_path / "broken.safetensors").exists()


# ---- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plug(places, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "plug"
    model = tiny.from_backbone(str(places / "llama"), str(places / "encoder"), placement="answer")
    model.tokenizer.chat_template, model.config.chat, model.config.system = CHATML, True, "i like rain"
    model.save_pretrained(folder)
    return str(folder)


def test_the_command(plug, places, tmp_path, capsys):
    history, output = tmp_path / "history.txt", tmp_path / "out put"
    history.write_text("\n".join(tiny.HISTORY))
    arguments = ["export-vllm", "--plug", plug, "--output", str(output)]
    assert main([*arguments, "--history", str(history), "--query", "the sea"]) == 0
    command = capsys.readouterr().out.strip().splitlines()[-1]
    words = shlex.split(command)
    assert words[:3] == ["vllm", "serve", str(places / "llama")] and "127.0.0.1" in words
    assert words[words.index("--chat-template") + 1] == str(output / "chat_template.jinja")
    assert words[words.index("--chat-template-content-format") + 1] == "openai"
    assert (output / "chat_template.jinja").read_text().endswith(CHATML)
    page = (output / "README.md").read_text()
    assert command in page and "i like rain" in page and "behind the text" in page and "Never let others" in page
    assert load_file(output / "soft_prompts.safetensors")["soft_prompt"].shape == (2, 16)


@pytest.mark.parametrize(
    "template, chat, system, first, content",
    [
        (CHATML, True, "i like rain \U0001f327", "'i like rain \U0001f327'", "content_parts(text,"),
        (WITHOUT_SYSTEM, True, "i like rain", None, "content_parts('i like rain\\n\\n' + text,"),
        (IGNORES_SYSTEM, True, "i like rain", None, "content_parts('i like rain\\n\\n' + text,"),
        (CHATML, True, None, None, "content_parts(text,"),
        (CHATML, False, "i like rain", None, "content_parts(text,"),
    ],
)
def test_the_page_writes_the_system_text_as_training_did(tmp_path, template, chat, system, first, content):
    model = tiny.model("llama", placement="answer")
    model.config.chat, model.config.system, model.tokenizer.chat_template = chat, system, template
    export(tmp_path, model.personalizer, PPlugProcessor.from_model(model), "llama")
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert content in page
    said = "" if first is None else f"{{'role': 'system', 'content': {first}}}, "
    assert f'messages=[{said}{{"role": "user", "content": content}}]' in page


@pytest.mark.parametrize(
    "more, message",
    [
        (["--history", "a", "--persona", "b"], "two forms of one thing"),
        (["--history", "a"], "--query is missing"),
        (["--query", "a"], "give --history or --persona, too"),
    ],
)
def test_settings_that_cannot_be_meant(plug, tmp_path, capsys, more, message):
    (tmp_path / "b").mkdir()
    more = [str(tmp_path / "b") if word == "b" else word for word in more]
    assert main(["export-vllm", "--plug", plug, "--output", str(tmp_path / "out"), *more]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_encoder_decoder_models(places, tmp_path, capsys):
    tiny.from_backbone(str(places / "t5"), str(places / "encoder")).save_pretrained(tmp_path / "plug")
    assert main(["export-vllm", "--plug", str(tmp_path / "plug"), "--output", str(tmp_path / "out")]) == 1
    assert "vLLM serves causal language models alone" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
