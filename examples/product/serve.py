"""Answer over HTTP, each request for its own user: one language model, one plug, one file of vectors per user.

    python serve.py --plug shop-plug --personas personas --instruction "Which shelf does ... book:"

    POST /answer {"user": "r0066", "text": "a knight ..."}                        ->  {"answer": "...", "items": 15}
    POST /items  {"user": "r0066", "items": [{"text": "...", "answer": "..."}]}   ->  {"items": 16}

A small server from the standard library that shows the steps. It answers one request after another and trusts whoever
can reach it: put your own authentication in front, and send user ids from your backend, never from a browser.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from encode import persona_file

from pplug_hf import Persona, PPlugError, PPlugForConditionalGeneration, PPlugModel, PPlugProcessor


class Service:
    """A plug on its language model, and the users' vectors in a folder."""

    def __init__(self, model: PPlugForConditionalGeneration, personas: str, instruction: str, max_new_tokens: int):
        self.model, self.folder = model, personas
        self.instruction, self.max_new_tokens = instruction, max_new_tokens
        self.processor = PPlugProcessor.from_model(model)

    def persona(self, user: str) -> Persona | None:
        """Return a user's vectors; None for somebody new, whom the plug answers with its learned default."""
        path = persona_file(self.folder, user)
        return Persona.from_pretrained(path) if path.is_file() else None

    def answer(self, user: str, text: str) -> dict[str, Any]:
        """Return the answer for a user: asked in the words of the training, with the text as the query of the history."""
        persona = self.persona(user)
        inputs = self.processor(text=[f"{self.instruction} {text}"], persona=[persona], query=[text])
        ids = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens)
        (answer,) = self.processor.decode_answers(ids, prompt_length=inputs["input_ids"].shape[1])
        return {"answer": answer, "items": 0 if persona is None else len(persona)}

    def add(self, user: str, items: list[dict[str, str]]) -> dict[str, Any]:
        """Append what a user did since; only these items are encoded."""
        persona, newer = self.persona(user), self.model.encode_persona(items)
        persona = newer if persona is None else persona + newer
        persona.save_pretrained(persona_file(self.folder, user))
        return {"items": len(persona)}


class Handler(BaseHTTPRequestHandler):
    """JSON in, JSON out."""

    service: Service

    def do_POST(self) -> None:
        """Answer one request. Errors of this package say what to change and contain no text of a user."""
        try:
            given = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            method = {"/answer": self.service.answer, "/items": self.service.add}[self.path]
            status, result = 200, method(**given)
        except KeyError:
            status, result = 404, {"error": "POST to /answer or /items"}
        except PPlugError as error:
            status, result = 400, {"error": str(error)}
        except (AttributeError, TypeError, ValueError):
            status, result = 400, {"error": "send JSON with the fields that are shown at the top of serve.py"}
        body = json.dumps(result, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Write no log: a line per request would say who asked when."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plug", required=True, help="plug folder or Hub id")
    parser.add_argument("--personas", required=True, help="folder with the users' files")
    parser.add_argument("--instruction", required=True, help="words in front of every text, as in training")
    parser.add_argument("--backbone", help="use the language model at this place")
    parser.add_argument("--encoder", help="use the sentence encoder at this place")
    parser.add_argument("--max_new_tokens", type=int, default=16, help="length of an answer (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="on this machine alone (default: %(default)s)")
    arguments = parser.parse_args()

    model = PPlugModel.from_pretrained(arguments.plug, backbone=arguments.backbone, encoder=arguments.encoder)
    Handler.service = Service(model, arguments.personas, arguments.instruction, arguments.max_new_tokens)
    server = HTTPServer(("127.0.0.1", arguments.port), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
