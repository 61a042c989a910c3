"""A LangChain chat model that answers each question for its own user, through a running server.

pplug-hf demo --output demo-output
pplug-hf serve --plug demo-output/plug --store personas
python langchain_chat.py [--url http://127.0.0.1:8000/v1] [--key KEY]
"""

import argparse

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from openai_client import READERS, OpenAI, forget, tell


def model_of(user: str, url: str, key: str) -> ChatOpenAI:
    """Return a chat model whose answers are for one user."""
    persona = {"persona": {"user": user}}
    return ChatOpenAI(model="default", base_url=url, api_key=key, max_tokens=6, extra_body=persona)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of the server (default: %(default)s)")
    parser.add_argument("--key", default="none", help="API key, where the server asks for one")
    arguments = parser.parse_args()
    prompt = ChatPromptTemplate([("user", "Which shelf does this reader put the book on? book: {book}")])
    with OpenAI(base_url=arguments.url, api_key=arguments.key) as client:
        for user, shelves in READERS.items():
            books = [(shelf, book) for shelf, texts in shelves.items() for book in texts]
            tell(client, user, [{"id": book, "tag": shelf, "text": book} for shelf, book in books])
            chain = prompt | model_of(user, arguments.url, arguments.key) | StrOutputParser()
            print(f"for {user}: {chain.invoke({'book': 'a knight cursed the sword of the castle'})}")
            print(f"{user}, in pieces: {list(chain.stream({'book': 'the haunted castle'}))}")
            forget(client, user)


if __name__ == "__main__":
    main()
