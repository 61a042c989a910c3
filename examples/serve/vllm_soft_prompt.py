"""Ask `vllm serve` one question for a user and for nobody.

    pplug-hf export-vllm --plug my-plug --output my-plug-vllm       # prints the command line that starts the server
    python examples/serve/vllm_soft_prompt.py --plug my-plug --history history.txt --question "What shall I read?"

This process has the plug and its encoder; the server has the language model, and is sent a soft prompt of a few numbers.
"""

import argparse
from pathlib import Path

from openai import OpenAI

from pplug_hf import Personalizer
from pplug_hf.serving.vllm_export import content_parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plug", required=True, help="folder or Hub id")
    parser.add_argument("--history", required=True, help="text file with one item per line")
    parser.add_argument("--question", required=True)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of vLLM's server")
    parser.add_argument("--max_tokens", type=int, default=64)
    arguments = parser.parse_args()

    personalizer = Personalizer.from_pretrained(arguments.plug)
    history = Path(arguments.history).read_text(encoding="utf-8").splitlines()
    rows = personalizer.soft_prompt(history, query=arguments.question)[0]  # [1 + K, H]

    client = OpenAI(base_url=arguments.url, api_key="none")
    model = client.models.list().data[0].id
    # As in training. If the chat template has no system turn, the README.md of the export shows how training wrote it.
    system = personalizer.config.system
    first = [{"role": "system", "content": system}] if system else []
    personal = content_parts(arguments.question, rows, personalizer.config.placement)
    for who, content in (("for this user", personal), ("for nobody", arguments.question)):
        answer = client.chat.completions.create(
            model=model,
            messages=[*first, {"role": "user", "content": content}],
            temperature=0,
            max_tokens=arguments.max_tokens,
        )
        print(f"{who}: {answer.choices[0].message.content}")


if __name__ == "__main__":
    main()
