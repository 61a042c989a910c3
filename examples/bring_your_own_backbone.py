"""A plug on a backbone that you loaded yourself: here a causal chat model, built in code.

Any transformers model that generates text from embeddings works, and may be quantised, sharded or fine-tuned: load it and
pass the object (and its tokenizer) to `from_backbone`, and later to `from_pretrained`. The backbone here is a GPT-2 of two
layers that first learns, without any user, which answers there are. It is far from being a useful model.
"""

import argparse
import random
import tempfile
from importlib.resources import files
from pathlib import Path

import torch
from tokenizers import processors
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from pplug_hf import PPlugForConditionalGeneration, PPlugModel, PPlugProcessor, read_lamp

ASSETS = Path(str(files("pplug_hf.demo") / "assets"))
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def make_tokenizer():
    """Return the demo's tokenizer with a chat template. That of a real chat model has all this already."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "backbone")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", special_tokens=[]
    )  # no EOS
    tokenizer.add_tokens(["<user>", "<assistant>"], special_tokens=True)
    tokenizer.chat_template = CHAT
    return tokenizer


def make_backbone(tokenizer):
    """Return what would be `AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-8B", dtype="bfloat16", ...)`."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=96,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    backbone = GPT2LMHeadModel(config)
    words = AutoModelForSeq2SeqLM.from_pretrained(ASSETS / "backbone").get_input_embeddings().weight.detach()
    with torch.no_grad():
        backbone.get_input_embeddings().weight[: len(words)] = 0.2 * words  # copied from the T5, to learn in seconds
    return backbone


def batches(processor, examples, personas, steps, batch_size):
    """Yield random batches to train on: chats that end with the answer, the persona right before the user's text."""
    draw = random.Random(0)
    for _ in range(steps):
        rows = draw.choices(range(len(examples)), k=batch_size)
        yield processor.apply_chat_template(
            [chat(examples[i].prompt) for i in rows],
            persona=[personas[i] for i in rows],
            query=[examples[i].query for i in rows],
            labels=[str(examples[i].target) for i in rows],
        )


def chat(text):
    return [{"role": "user", "content": text}]


def optimise(name, parameters, losses, learning_rate):
    """Train on losses that are computed one by one."""
    parameters = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate)
    for step, loss in enumerate(losses):
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"{name}, step {step}: loss {loss.item():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=150, help="steps for backbone and plug each (default: %(default)s)"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="questions per step (default: %(default)s)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    task, examples = read_lamp(ASSETS / "data", "train")
    examples = examples[: arguments.steps * arguments.batch_size]

    # The backbone, where you would load your own.
    tokenizer = make_tokenizer()
    backbone = make_backbone(tokenizer)
    plain = batches(PPlugProcessor(tokenizer), examples, [[]] * len(examples), arguments.steps, arguments.batch_size)
    inputs = ("input_ids", "attention_mask", "labels")
    optimise("backbone", backbone.parameters(), (backbone(**{k: b[k] for k in inputs}).loss for b in plain), 2e-3)

    # The plug: sizes and the scale of the soft prompt are measured from the object. The encoder stays frozen, so the plug
    # consists only of a projector, two vectors and a temperature.
    model = PPlugForConditionalGeneration.from_backbone(
        backbone,
        encoder=str(ASSETS / "encoder"),
        tokenizer=tokenizer,
        item_template=task.item_template,
    )
    processor = PPlugProcessor.from_model(model)
    model.print_trainable_parameters()
    personas = model.encode_persona([e.history for e in examples])
    own = batches(processor, examples, personas, arguments.steps, arguments.batch_size)
    optimise("plug", model.train().plug.parameters(), (model(**b).loss for b in own), 5e-3)

    # A plug folder contains no backbone; a backbone without a name has to be passed again.
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        print("saved:", ", ".join(sorted(path.name for path in Path(folder).iterdir())))
        model = PPlugModel.from_pretrained(folder, backbone=backbone)

    # Chat: inputs with the persona right behind the user's text.
    _, unseen = read_lamp(ASSETS / "data", "dev")
    question = unseen[0]
    inputs = processor.apply_chat_template(chat(question.prompt), add_generation_prompt=True)
    print(f"\n{question.prompt}\nthe persona goes in front of token {inputs['persona_position'].tolist()[0]}")
    for name, history in (("nobody", None), (question.user, question.history)):
        ids = model.generate(**inputs, persona=history, query=question.query, max_new_tokens=task.max_new_tokens)
        print(f"  for {name}: {processor.decode_answers(ids, prompt_length=inputs['input_ids'].shape[1])[0]}")
    bare = model.backbone.generate(inputs["input_ids"], max_new_tokens=task.max_new_tokens)
    print(
        f"  the backbone alone: {tokenizer.decode(bare[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True)}"
    )

    # The weights of the items, for plots, and the vectors in front of the prompt, for other engines.
    persona = model.encode_persona(question.history)
    weights = model.persona_weights(persona, query=question.query)  # [1, N]
    heaviest = question.history[int(weights[0].argmax())]
    print(f"{persona}; the heaviest item has weight {weights.max():.2f} and tag {heaviest['tag']!r}")
    print("soft prompt [1, 1 + K, H]:", list(model.soft_prompt(persona, query=question.query).shape))


if __name__ == "__main__":
    main()
