"""Write the soft prompts of several users to one safetensors file, for any engine that takes prompt embeddings.

    python examples/serve/export_soft_prompts.py --plug my-plug --histories histories.json --query "a film about war" \
        --output soft_prompts.safetensors

`histories.json` maps users to their items. No language model is loaded; the file holds no text, but it is personal data.
"""

import argparse
import json
from pathlib import Path

from pplug_hf import Personalizer
from pplug_hf.serving.vllm_export import export_soft_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plug", required=True, help="folder or Hub id")
    parser.add_argument("--histories", required=True, help="JSON object of user -> list of items")
    parser.add_argument("--query", required=True, help="what the items are weighted by")
    parser.add_argument("--output", default="soft_prompts.safetensors")
    arguments = parser.parse_args()
    histories = json.loads(Path(arguments.histories).read_text(encoding="utf-8"))
    personalizer = Personalizer.from_pretrained(arguments.plug)
    export_soft_prompts(personalizer, histories, dict.fromkeys(histories, arguments.query), arguments.output)
    print(f"{len(histories)} soft prompts of {personalizer.config.prefix_length} tokens: {arguments.output}")


if __name__ == "__main__":
    main()
