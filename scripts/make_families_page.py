"""Write docs/families.md: every family of language models that transformers lists, and a verdict on a plug for it.

    python scripts/make_families_page.py

The verdicts are those of tests/test_families.py, on tiny random models.
"""

import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

HEAD = """# Backbones

`from_backbone` tries every backbone on a few tokens and refuses one on which a plug would be worth nothing, before
anything is trained. It compares logits:

- of a prompt as ids and as embeddings,
- of a soft prompt that is two words' embeddings and of these words,
- of a padded row and of the same row alone,
- of the backbone as it came, frozen, and in training mode,

and it lets `generate` answer a soft prompt. What was found is remembered within the process. The check costs a few forward
passes of 18 tokens; `check_backbone=False` leaves it out, in `from_backbone` and in `from_pretrained`.

This table holds every family that transformers {version} lists as a causal or encoder-decoder language model, tried on
tiny random models by `tests/test_families.py`: {works} of {total} work, {refused} are refused, and {rest} were not judged,
because the general rules of the test make no tiny model of them. Your own backbone is checked in any case.

| Verdict | Meaning |
| --- | --- |
| works | Forward, loss, training mode, padding and `generate` are right. |
| equal lengths | As above, but padding changes its answers: it has no attention mask, or counts positions with the padding. Batches whose rows differ in length are refused. |
| by ids | `inputs_embeds` mean something else to it than ids, because it scales, routes or looks up by id. It is given ids, and the vectors of words and soft prompt in the place of what it embeds for them. |
| by ids, partly | Likewise, and each layer also gets an embedding of the id: in the place of a soft token, that of the prompt's first token. |
| refused | `from_backbone` raises a `ConfigurationError` that says why. |
| not judged | No tiny model, or one that cannot read a prompt of ids alone. |

| Family | As | Verdict | Reason |
| --- | --- | --- | --- |
"""
NAMES = {
    "works": "works",
    "works: rows of equal length only": "equal lengths",
    "works: by ids": "by ids",
    "works: by ids, some of which a soft token keeps": "by ids, partly",
}


def main() -> None:
    """Try all families and write the page."""
    from families import families, verdict

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found = {family: verdict(*family) for family in families()}
    rows = []
    for (model_type, kind), said in sorted(found.items()):
        status, _, reason = said.partition(": ")
        if status == "works":
            status, reason = NAMES[said], ""
        reason = reason.partition("; ")[0].replace("|", "\\|").replace("`", "")
        rows.append(f"| {model_type} | {kind} | {status} | {reason} |\n")
    counts = [sum(said.startswith(status) for said in found.values()) for status in ("works", "refused", "not judged")]
    head = HEAD.format(
        version=transformers.__version__, total=len(found), works=counts[0], refused=counts[1], rest=counts[2]
    )
    (ROOT / "docs" / "families.md").write_text(head + "".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
