"""The server's answers, through the official `openai` client and raw requests."""

import json
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import openai
import pytest
import tiny
from serving import ANNA, CHAT, ITEMS, PROMPT, ask, expected, served
from test_chats import IGNORES_SYSTEM
from test_chats import PLAIN as PLAIN_TEMPLATE

from pplug_hf.serving.engine import Request, Sampling

PLAIN = [Request(PROMPT, sampling=Sampling(1))]


def test_a_chat_is_answered_for_its_user(server, client):
    answer, headers = ask(client)
    (choice,) = answer.choices
    assert choice.message.content.strip() == expected(server) != expected(server, None)
    assert (choice.message.role, choice.finish_reason, choice.index) == ("assistant", "length", 0)
    assert (headers["x-persona"], headers["x-persona-items"]) == ("applied", "4")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (10, 6, 16)
    assert answer.object == "chat.completion" and answer.model == "default"


def test_who_has_no_persona_is_told_so(server, client):
    for extra, state, text in (
        ({"persona": {"user": "nobody"}}, "unknown", expected(server, None)),
        ({}, "none", expected(server, None)),
    ):
        answer, headers = ask(client, extra_body=extra)
        assert answer.choices[0].message.content.strip() == text
        assert (headers["x-persona"], headers["x-persona-items"]) == (state, "0")
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, extra_body={"persona": {"user": "nobody", "required": True}})
    assert caught.value.code == "persona_not_found" and "nobody" not in str(caught.value)


def test_the_user_may_be_in_a_header_percent_encoded(server, client):
    server("PUT", f"/v1/personas/{quote('ä/b', safe='')}/items", {"items": ITEMS})
    for value, state in (("anna", "applied"), ("%C3%A4%2Fb", "applied"), ("anna%20", "unknown")):
        assert ask(client, extra_body={}, extra_headers={"X-Persona-User": value})[1]["x-persona"] == state
    body = {"persona": {"user": "nobody"}}
    assert ask(client, extra_body=body, extra_headers={"X-Persona-User": "anna"})[1]["x-persona"] == "unknown"
    with pytest.raises(openai.UnprocessableEntityError, match="UTF-8"):
        ask(client, extra_body={}, extra_headers={"X-Persona-User": "%FF"})


def test_a_query_and_a_strength_go_with_the_persona(server, client, monkeypatch):
    generate, asked = server.engine.generate, []
    monkeypatch.setattr(server.engine, "generate", lambda questions: asked.extend(questions) or generate(PLAIN))
    ask(client, extra_body={"persona": {"user": "anna", "query": "rain", "strength": 0.5}})
    ask(client, extra_body={**ANNA, "persona_strength": 0.0})
    ask(client)
    assert [(q.query, q.strength) for q in asked] == [("rain", 0.5), (None, 0.0), (None, 1.0)]
    assert all(len(q.persona) == 4 and q.tenant == "" for q in asked)


def test_a_model_is_a_plug(server, client):
    assert [model.id for model in client.models.list()] == ["default", "other"]
    assert client.models.retrieve("other").id == "other"
    answer, _ = ask(client, model="other")
    assert answer.choices[0].message.content.strip() == expected(server, plug="other") != expected(server)
    with pytest.raises(openai.NotFoundError, match="default, other") as caught:
        ask(client, model="gpt-9")
    assert caught.value.code == "model_not_found"


def test_a_stream_is_the_answer_in_pieces(server, client):
    whole, _ = ask(client)
    chunks, headers = ask(client, stream=True, stream_options={"include_usage": True})
    chunks = list(chunks)
    assert headers["x-persona"] == "applied" and headers["content-type"].startswith("text/event-stream")
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == whole.usage
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(texts) == whole.choices[0].message.content and sum(map(bool, texts)) > 2
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == ["length"] and not chunks[-1].choices
    assert not any(chunk.usage for chunk in chunks[:-1]) and len({chunk.id for chunk in chunks}) == 1
    plain, _ = ask(client, stream=True)
    assert all(chunk.usage is None and chunk.choices for chunk in plain)


def test_completions_take_several_prompts_and_give_several_answers(server, client):
    prompts = tiny.PROMPTS[:2]
    answer, headers = ask(client, "complete", prompt=prompts, n=2)
    assert headers["x-persona"] == "applied" and answer.object == "text_completion"
    texts = [choice.text.strip() for choice in answer.choices]
    assert texts == [expected(server, prompt=prompt) for prompt in prompts for _ in range(2)]
    single = [ask(client, "complete", prompt=prompt)[0].usage for prompt in prompts]
    assert answer.usage.prompt_tokens == sum(usage.prompt_tokens for usage in single)
    assert answer.usage.completion_tokens == 2 * sum(usage.completion_tokens for usage in single)
    pieces = ask(client, "complete", prompt=prompts, n=2, stream=True)[0]
    joined = ["", "", "", ""]
    for piece in pieces:
        joined[piece.choices[0].index] += piece.choices[0].text
    assert [text.strip() for text in joined] == texts


def test_draws_follow_the_seed(client):
    def draws(**options):
        return [c.message.content for c in ask(client, temperature=2, n=3, **options)[0].choices]

    for seed in (1, -1):  # of answers with the seeds -1, 0 and 1
        assert len({*draws(seed=seed)}) == 3 and draws(seed=seed) == draws(seed=seed) != draws(seed=5)
    assert draws() != draws()


def test_a_stop_text_ends_an_answer(client):
    whole = ask(client)[0].choices[0].message.content
    stop = whole.split()[2]
    for given in (stop, ["nothing like it", stop]):
        choice = ask(client, stop=given)[0].choices[0]
        assert choice.message.content == whole.partition(stop)[0] and choice.finish_reason == "stop"
    assert ask(client, stop=["a" * 256])[0].choices[0].message.content == whole
    with pytest.raises(openai.UnprocessableEntityError, match=r"1 to 256 characters.* got .* 257"):
        ask(client, stop=["a" * 257])


def test_max_completion_tokens_and_parts_of_content_are_taken(client):
    parts = [
        {"role": "developer", "content": "write"},
        {"role": "user", "content": [{"type": "text", "text": PROMPT}]},
    ]
    answer, _ = ask(client, messages=parts, max_tokens=openai.omit, max_completion_tokens=2)
    assert answer.usage.completion_tokens == 2
    flat = [{"role": "system", "content": "write"}, {"role": "user", "content": PROMPT}]
    assert ask(client, messages=flat, max_tokens=2)[0].choices[0].message == answer.choices[0].message


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, IGNORES_SYSTEM], ids=["plain", "ignores system"])
def test_a_chat_gets_the_system_text_of_its_plug_as_a_text_does(tmp_path, template):
    words = tiny.tokenizer("llama")
    words.chat_template = template
    with served(
        tmp_path, tiny.from_backbone(tiny.backbone("llama"), tiny.shared_encoder(), tokenizer=words, system="cold")
    ) as server:
        _, text, _ = server("POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 6})
        for content in (PROMPT, [{"type": "text", "text": PROMPT[:3]}, {"type": "text", "text": PROMPT[3:]}]):
            chat = {"messages": [{"role": "user", "content": content}], "max_tokens": 6}
            _, answer, _ = server("POST", "/v1/chat/completions", chat)
            assert answer["choices"][0]["message"]["content"] == text["choices"][0]["text"]
            assert answer["usage"] == text["usage"]


def test_many_clients_at_once_get_what_each_would_alone(server, client):
    users = [None, "anna", "anna", None] * 8
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(ask, client, extra_body={"persona": {"user": user}} if user else {}) for user in users]
    texts = [future.result()[0].choices[0].message.content.strip() for future in asked]
    assert texts == [expected(server, user) for user in users]


@pytest.mark.parametrize(
    "options, status, code",
    [
        ({"presence_penalty": 1}, 400, "unsupported_parameter"),
        ({"frequency_penalty": 1}, 400, "unsupported_parameter"),
        ({"logprobs": True}, 400, "unsupported_parameter"),
        ({"create": "text", "logprobs": 0}, 400, "unsupported_parameter"),
        ({"extra_body": {"repetition_penalty": 0}}, 400, "unsupported_parameter"),
        ({"logit_bias": {"5": 1}}, 400, "unsupported_parameter"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, 400, "unsupported_parameter"),
        ({"extra_body": {"prompt_embeds": "AAAA"}}, 400, "unsupported_parameter"),
        ({"extra_body": {"repetition_penalty": 1.2}}, 400, "unsupported_parameter"),
        ({"extra_body": {"min_p": 0.1}}, 400, "unsupported_parameter"),
        ({"extra_body": {"continue_final_message": True}}, 400, "unsupported_parameter"),
        ({"extra_body": {"include_stop_str_in_output": True}}, 400, "unsupported_parameter"),
        ({"extra_body": {"truncate_prompt_tokens": 4}}, 400, "unsupported_parameter"),
        ({"extra_body": {"add_generation_prompt": False}}, 400, "unsupported_parameter"),
        ({"extra_body": {"skip_special_tokens": False}}, 400, "unsupported_parameter"),
        ({"extra_body": {"documents": [{"title": "sea", "text": "cold"}]}}, 400, "unsupported_parameter"),
        ({"extra_body": {"prompt_logprobs": 1}}, 400, "unsupported_parameter"),
        ({"max_tokens": 65}, 422, "too_many_tokens"),
        ({"max_tokens": 0}, 422, "invalid_value"),
        ({"n": 17}, 422, "too_many_choices"),
        ({"temperature": -1}, 422, "invalid_value"),
        ({"top_p": 0}, 422, "invalid_value"),
        ({"stop": [""]}, 422, "invalid_value"),
        ({"stop": ["sea"] * 17}, 422, "invalid_value"),
        ({"stop": ["sea", "a" * 257]}, 422, "invalid_value"),
        ({"messages": []}, 422, "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 422, "invalid_value"),
        ({"messages": [{"role": "user", "content": "sea " * 3000}]}, 422, "invalid_value"),
        ({"extra_body": {"persona": {"user": ""}}}, 422, "invalid_value"),
        ({"extra_body": {"persona": {"user": "a" * 257}}}, 422, "invalid_value"),
        ({"extra_body": {"persona": {"user": 7}}}, 422, "invalid_value"),
        ({"extra_body": {"persona": {"user": "\ud800"}}}, 422, "invalid_value"),
        ({"extra_body": {"persona": {"user": "anna", "vectors": [[1.0]]}}}, 422, "invalid_value"),
        ({"extra_body": {"persona": {"user": "anna", "query": " "}}}, 422, "invalid_value"),
        ({"extra_body": {"persona": {"user": "anna", "query": "sea " * 51}}}, 422, "invalid_value"),
        ({"extra_body": {"persona": {"user": "anna", "strength": -0.5}}}, 422, "invalid_value"),
        ({"extra_body": {"persona_strength": -0.5}}, 422, "invalid_value"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_answered_is_a_clear_error(client, options, status, code, stream):
    try:
        json.dumps(options, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        pytest.skip("this client cannot send half a surrogate pair")
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, stream=stream, **options)
    assert (caught.value.status_code, caught.value.code) == (status, code), caught.value.message


def test_parameters_at_values_that_change_nothing_are_taken(client):
    neutral = {
        "repetition_penalty": 1.0,
        "min_p": 0.0,
        "min_tokens": 0,
        "logprobs": False,
        "top_logprobs": 0,
        "best_of": 1,
        "ignore_eos": False,
        "continue_final_message": False,
        "include_stop_str_in_output": False,
        "truncate_prompt_tokens": None,
        "add_generation_prompt": True,
        "skip_special_tokens": True,
        "response_format": {"type": "text"},
    }
    assert ask(client, extra_body={**ANNA, **neutral})[0].choices == ask(client)[0].choices


def test_penalties_go_without_a_persona(client):
    text = ask(client, extra_body={}, frequency_penalty=2, max_tokens=32)[0].choices[0].message.content
    assert len(text.split()) > 2


def test_bodies_that_are_no_json_or_too_deep_or_hold_half_a_character_are_refused(server):
    path = "/v1/chat/completions"
    assert server("POST", path, b"{no json")[:1] == (400,)
    assert server("POST", path, b"")[0] == 422
    assert server("POST", path, b"[" * 9000 + b"]" * 9000)[0] in (400, 422)
    half = b'{"messages": [{"role": "user", "content": "sea"}], "persona": {"user": "\\ud800"}}'
    status, reply, _ = server("POST", path, half)
    assert (status, reply["error"]["code"]) == (422, "invalid_value")
    half = b'{"messages": [{"role": "user", "content": "sea \\ud800"}], "max_tokens": 2}'
    assert server("POST", path, half)[0] == 200
    assert server("POST", "/v1/completions", b'{"prompt": "sea \\ud800", "max_tokens": 2}')[0] == 200
    status, reply, _ = server("POST", path, {"messages": CHAT}, Content_Type="text/plain")
    assert status == 422 and "application/json" in reply["error"]["message"]
    status, reply, _ = server("POST", path, {"messages": "a secret text"})
    assert status == 422 and "secret" not in json.dumps(reply) and reply["error"]["param"] == "messages"
    assert server("GET", "/v1/nothing")[1]["error"]["code"] == "not_found"
    assert server("PATCH", "/v1/models")[:2][0] == 405
