"""Ask a running server, each question for its own user, with the official OpenAI client.

pplug-hf demo --output demo-output
pplug-hf serve --plug demo-output/plug --store personas
python openai_client.py [--url http://127.0.0.1:8000/v1] [--key KEY]
"""

import argparse
from urllib.parse import quote

from openai import OpenAI

QUESTION = "Which shelf does this reader put the book on? book: a knight cursed the sword of the castle"
READERS = {
    "anna": {"mythology": ["the enchantress summoned the spell", "the dragon of the castle"]},
    "ben": {"epic saga": ["the sorceress and the wand", "a wizard who cursed the dragon"]},
}


def tell(client: OpenAI, user: str, items: list[dict[str, str]]) -> int:
    """Append items to a user's history, and return how many there are now. It may be repeated: ids are kept once."""
    body = {"items": items}
    persona: dict = client.post(f"/personas/{quote(user, safe='')}/items", cast_to=dict, body=body)
    return persona["items"]


def ask(client: OpenAI, user: str, question: str) -> tuple[str, str]:
    """Return the answer for a user, and whether their persona was applied."""
    reply = client.chat.completions.with_raw_response.create(
        model="default",
        messages=[{"role": "user", "content": question}],
        max_tokens=6,
        extra_body={"persona": {"user": user}},
    )
    return reply.parse().choices[0].message.content, reply.headers["x-persona"]


def stream(client: OpenAI, user: str, question: str) -> None:
    """Print the answer for a user as it is made."""
    chunks = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": question}],
        max_tokens=6,
        stream=True,
        extra_body={"persona": {"user": user}},
    )
    for chunk in chunks:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


def forget(client: OpenAI, user: str) -> int:
    """Delete a user, and return how many items are gone."""
    receipt: dict = client.delete(f"/personas/{quote(user, safe='')}", cast_to=dict)
    return receipt["items"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of the server (default: %(default)s)")
    parser.add_argument("--key", default="none", help="API key, where the server asks for one")
    arguments = parser.parse_args()
    with OpenAI(base_url=arguments.url, api_key=arguments.key) as client:
        for user, shelves in READERS.items():
            books = [(shelf, book) for shelf, texts in shelves.items() for book in texts]
            items = [{"id": str(i), "tag": shelf, "text": book} for i, (shelf, book) in enumerate(books)]
            print(f"{user} has {tell(client, user, items)} books")
        for user in (*READERS, "somebody new"):
            answer, state = ask(client, user, QUESTION)
            print(f"for {user} (persona {state}): {answer}")
        print("in pieces for anna: ", end="")
        stream(client, "anna", QUESTION)
        for user in READERS:
            print(f"{forget(client, user)} books of {user} are forgotten")


if __name__ == "__main__":
    main()
