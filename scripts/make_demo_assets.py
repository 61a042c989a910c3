"""Make everything `pplug-hf demo` needs from one seed: synthetic data, a tiny encoder and a tiny backbone.

    python scripts/make_demo_assets.py --output pplug_hf/demo/assets

The world is a library with eight topics. Books of a topic fit on any of three shelves, and each reader has
one of the three in mind, drawn at random per topic: what a book is about tells which shelves are possible,
and only the reader's history tells which one is right. So a model that knows the world and not the reader is
right in a third of the cases, and so is one that looks at another reader's history.

    data/        {train,dev}_{questions,outputs}.json.gz in LaMP's format, readers disjoint
    encoder/     a SentenceTransformer (2-layer BERT): texts of one topic lie together, and an item's vector
                 also tells its tag to a linear probe
    backbone/    a T5 (2+2 layers) that knows topics and shelves but no reader, and follows hints in front of
                 the prompt, as an instruction-tuned language model does
    report.json  the checks below and the sizes, as printed

No network, no real person's data. Encoder and backbone learn from texts drawn on the fly for readers of their
own, never from `data/`. The same seed on the same machine and library versions gives the same bytes.
"""

import argparse
import gzip
import json
import math
import random
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from sklearn.linear_model import LogisticRegression
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    GenerationConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils.logging import disable_progress_bar

# ----------------------------------------------------------------------------------------------- the world


@dataclass(frozen=True)
class Topic:
    """What a text about the topic may mention, and the three shelves a reader may put it on."""

    shelves: tuple[str, str, str]
    people: str
    deeds: str
    things: str
    places: str


WORLD = {
    "sea": Topic(
        shelves=("nautical", "adventure", "escapism"),
        people="captain sailor fisherman diver helmsman boatswain whaler smuggler",
        deeds="sailed steered moored boarded capsized anchored",
        things="schooner anchor compass mast whale net lifeboat rudder",
        places="harbour lighthouse reef lagoon pier island strait cove",
    ),
    "dragons": Topic(
        shelves=("fantasy", "mythology", "epic saga"),
        people="wizard knight sorceress elf dwarf squire prophet enchantress",
        deeds="tamed enchanted cursed summoned conjured banished",
        things="dragon sword spell rune wand griffin talisman shield",
        places="castle tower realm dungeon cavern throne kingdom moat",
    ),
    "detectives": Topic(
        shelves=("mystery", "true crime", "thriller"),
        people="detective inspector burglar witness forger sergeant informant coroner",
        deeds="investigated stole forged suspected interrogated traced",
        things="fingerprint alibi revolver necklace clue ransom safe poison",
        places="alley courtroom bank museum station casino warehouse precinct",
    ),
    "space": Topic(
        shelves=("science fiction", "futurism", "astronomy"),
        people="astronaut android engineer stargazer cosmonaut alien navigator physicist",
        deeds="launched orbited scanned docked colonised decoded",
        things="rocket satellite telescope comet probe capsule asteroid reactor",
        places="moon galaxy planet nebula airlock observatory crater spaceport",
    ),
    "cooking": Topic(
        shelves=("gastronomy", "comfort reading", "home life"),
        people="chef baker waiter butcher grocer brewer confectioner apprentice",
        deeds="baked roasted seasoned tasted simmered fried",
        things="soup bread cake pepper cheese dumpling omelette stew",
        places="kitchen bakery restaurant pantry market tavern cafe cellar",
    ),
    "ghosts": Topic(
        shelves=("horror", "gothic", "late night"),
        people="ghost medium undertaker phantom vampire exorcist gravedigger spectre",
        deeds="haunted possessed exhumed buried frightened lured",
        things="coffin mirror skull candle portrait seance shroud tombstone",
        places="graveyard crypt attic mansion chapel morgue asylum corridor",
    ),
    "gardens": Topic(
        shelves=("nature", "slow living", "hobby"),
        people="gardener botanist beekeeper florist farmer shepherd forester herbalist",
        deeds="planted watered pruned harvested grafted weeded",
        things="rose tulip orchard beehive hedge seedling fern trellis",
        places="greenhouse meadow allotment vineyard lawn nursery pond terrace",
    ),
    "war": Topic(
        shelves=("history", "military", "human drama"),
        people="soldier general nurse deserter spy prisoner partisan corporal",
        deeds="besieged bombed surrendered defended shelled liberated",
        things="cannon rifle tank treaty medal grenade flag bunker",
        places="trench barracks battlefield border fortress hospital camp bridge",
    ),
}
TOPICS = list(WORLD)
SHELVES = [shelf for topic in WORLD.values() for shelf in topic.shelves]
TOPIC_OF = {shelf: name for name, topic in WORLD.items() for shelf in topic.shelves}

TEMPLATES = (
    "{name}, a {adj} {person}, {deed} the {thing} near the {place} {time}",
    "a {adj} {person} and a {adj2} {person2} {deed} the {thing} {time}",
    "{time} the {person} {deed} a {adj} {thing}, and {name} told nobody",
    "the {adj} {thing} of the {place} and the {person} who {deed} it",
    "{name} left the {place} {time} because the {person} {deed} the {thing}",
    "two friends, one {thing} and a {adj} {place} the {person} never forgot",
    "how a {person} {deed} the {adj} {thing} and what {name} found there",
    "in the {adj} {place}, {name} learns why the {person} {deed} the {thing}",
    "nobody in the {place} believed {name} until a {person} {deed} the {thing}",
    "letters from a {adj} {person} about the {place}, the {thing} and {name}",
    "{name} dreams of the {place}, yet the {adj} {person} {deed} the {thing}",
    "a {thing}, a {thing2} and the {adj} {person} of the {place} {time}",
    "{name} meets a {person} {time} and the {place} is never the same",
    "what happened after {name} and the {adj} {person} {deed} a {thing} {time}",
)
NAMES = "anna tomas mara jonas elif ravi nora hugo wanda pavel aiko samir greta luis zara felix"
ADJECTIVES = (
    "quiet stubborn lonely famous young ancient curious broken golden clumsy proud weary strange gentle "
    "forgotten cheerful"
)
TIMES = (
    "one winter",
    "before dawn",
    "in the spring",
    "after the storm",
    "on a sunday",
    "at midnight",
    "last summer",
    "for ten years",
    "in a single week",
    "long ago",
    "every autumn",
    "without a plan",
)

QUESTION = "Which shelf does this reader put the book on? book: {text}"
ITEM_FOR_ENCODER = "{tag}: {text}"
ITEM_FOR_PROMPT = 'the shelf for the book: "{text}" is "{tag}"'  # as LaMP puts retrieved items into a prompt
HINTS = ("this reader says {tags}. ", "shelves: {tags}. ", "{tags}. ", "{tags} ")


def draw_text(topic: str, rng: random.Random) -> str:
    """One book of 8 to 16 words about the topic."""
    t = WORLD[topic]
    person, person2 = rng.sample(t.people.split(), 2)
    thing, thing2 = rng.sample(t.things.split(), 2)
    adj, adj2 = rng.sample(ADJECTIVES.split(), 2)
    text = rng.choice(TEMPLATES).format(
        name=rng.choice(NAMES.split()),
        adj=adj,
        adj2=adj2,
        person=person,
        person2=person2,
        deed=rng.choice(t.deeds.split()),
        thing=thing,
        thing2=thing2,
        place=rng.choice(t.places.split()),
        time=rng.choice(TIMES),
    )
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def misfile(shelf: str, noise: float, rng: random.Random) -> str:
    """The shelf, or with probability `noise` another one of its topic."""
    if rng.random() >= noise:
        return shelf
    return rng.choice([s for s in WORLD[TOPIC_OF[shelf]].shelves if s != shelf])


def vocabulary() -> list[str]:
    """Every word and punctuation mark the world can produce, sorted."""
    parts = [*TEMPLATES, NAMES, ADJECTIVES, *TIMES, *SHELVES, *HINTS]
    parts += [QUESTION, ITEM_FOR_ENCODER, ITEM_FOR_PROMPT, "an and . , and"]
    parts += [" ".join((t.people, t.deeds, t.things, t.places)) for t in WORLD.values()]
    return sorted(set(re.findall(r"\w+|[^\w\s]", re.sub(r"\{\w+\}", " ", " ".join(parts).lower()))))


def check_world() -> None:
    """Topics share no word, no text mentions a shelf, and a shelf is known by its first word."""
    words = [w for t in WORLD.values() for w in " ".join((t.people, t.deeds, t.things, t.places)).split()]
    assert len(words) == len(set(words)), sorted({w for w in words if words.count(w) > 1})
    shelf_words = [w for shelf in SHELVES for w in shelf.split()]
    assert len(shelf_words) == len(set(shelf_words)), "two shelves share a word"
    rng = random.Random(0)
    texts = [draw_text(rng.choice(TOPICS), rng) for _ in range(5000)]
    assert all(8 <= len(text.split()) <= 16 for text in texts), "a text is too short or too long"
    spoken = set(re.findall(r"\w+", " ".join(texts)))
    assert not spoken & set(shelf_words), spoken & set(shelf_words)


# ------------------------------------------------------------------------------------------------ the data


def draw_reader(
    reader: str, questions: int, noise: float, rng: random.Random, seen: set[str]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """One reader's questions and golds. Noise puts some items on another shelf of the topic, and no gold."""

    def fresh(topic: str) -> str:
        while (text := draw_text(topic, rng)) in seen:
            pass
        seen.add(text)
        return text

    shelf_of = {topic: rng.choice(WORLD[topic].shelves) for topic in TOPICS}
    day = date(2019, 1, 1) + timedelta(days=rng.randrange(365))
    profile = []
    for n in range(rng.randint(12, 40)):
        topic = rng.choice(TOPICS)
        shelf = misfile(shelf_of[topic], noise, rng)
        day += timedelta(days=rng.randint(1, 40))
        profile.append({"id": f"{reader}-{n}", "text": fresh(topic), "tag": shelf, "date": day.isoformat()})
    known = [topic for topic in TOPICS if any(TOPIC_OF[item["tag"]] == topic for item in profile)]
    rows, golds = [], []
    for n, topic in enumerate(rng.sample(known, questions)):
        ask = {"id": f"{reader}-q{n}", "user_id": reader, "input": QUESTION.format(text=fresh(topic))}
        rows.append({**ask, "profile": profile})
        golds.append({"id": f"{reader}-q{n}", "output": shelf_of[topic]})
    return rows, golds


def write_json_gz(path: Path, value: Any) -> None:
    """Compact JSON, gzipped without time or name, so that the same value is the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file:
        file.write(json.dumps(value, separators=(",", ":")).encode())


def make_data(folder: Path, seed: int, noise: float) -> list[tuple[dict[str, Any], str]]:
    """Write both splits and return dev as (question, gold) pairs."""
    seen: set[str] = set()  # no text occurs twice, in or across splits
    pairs: list[tuple[dict[str, Any], str]] = []
    for split, readers, first in (("train", 400, 1), ("dev", 80, 1001)):
        rng = random.Random(f"{seed}-{split}")
        rows, golds = [], []
        for n in range(readers):
            count = rng.randint(1, 2) if split == "train" else 3
            r, g = draw_reader(f"r{first + n:04d}", count, noise, rng, seen)
            rows += r
            golds += g
        write_json_gz(folder / f"{split}_questions.json.gz", rows)
        write_json_gz(folder / f"{split}_outputs.json.gz", {"task": "demo", "golds": golds})
        pairs = list(zip(rows, (g["output"] for g in golds), strict=True))
    return pairs


# ----------------------------------------------------------------------------------------------- the models


def word_tokenizer(specials: dict[str, str], template: str, length: int) -> PreTrainedTokenizerFast:
    """One token per word or mark of the world; `specials` in id order, `template` like "$A </s>"."""
    vocab = {token: n for n, token in enumerate([*specials.values(), *vocabulary()])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token=specials["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "isolated")]
    )
    tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[(token, vocab[token]) for token in specials.values()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **specials)


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Up over the first twentieth, then down along a cosine."""
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def encode(encoder: SentenceTransformer, texts: list[str]) -> torch.Tensor:
    """Texts -> [len(texts), D], with gradients in training mode."""
    return encoder(encoder.preprocess(texts))["sentence_embedding"]


def make_encoder(folder: Path, seed: int, steps: int) -> SentenceTransformer:
    """Train on two losses: a query finds items of its topic, and a linear head reads an item's tag.

    The head is thrown away. It keeps the tag in the vector, as large encoders do of themselves.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"{seed}-encoder")
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = word_tokenizer(names, "[CLS] $A [SEP]", 128)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with tempfile.TemporaryDirectory() as scratch:
        BertModel(config).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        bert = Transformer(scratch, max_seq_length=128)
    encoder = SentenceTransformer(modules=[bert, Pooling(64, "mean"), Normalize()], device="cpu")
    head = torch.nn.Linear(64, len(SHELVES))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=2e-3, weight_decay=0.01)
    scheduler = schedule(optimizer, steps)
    encoder.train()
    for _ in range(steps):
        topics = [rng.choice(TOPICS) for _ in range(64)]
        tags = [rng.choice(WORLD[topic].shelves) for topic in topics]
        items = [ITEM_FOR_ENCODER.format(tag=tag, text=draw_text(TOPIC_OF[tag], rng)) for tag in tags]
        x = encode(encoder, [draw_text(topic, rng) for topic in topics])  # [B, D]
        h = encode(encoder, items)  # [B, D]
        ids = torch.tensor([TOPICS.index(topic) for topic in topics])
        same = (ids[:, None] == ids[None, :]).float()
        find = -((x @ h.T / 0.2).log_softmax(1) * same).sum(1) / same.sum(1)
        read = F.cross_entropy(head(h) * 5, torch.tensor([SHELVES.index(tag) for tag in tags]))
        (find.mean() + 0.5 * read).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    encoder.eval()
    encoder.save(str(folder), create_model_card=False)
    tokenizer.save_pretrained(folder)  # as made here, without what loading and padding left in it
    return encoder


def draw_lesson(kind: str, noise: float, rng: random.Random) -> tuple[str, str]:
    """One (input, shelf) for the backbone, from a reader drawn for it alone; kind: plain, words or items.

    `words`: one to three shelves in front, one of them of the book's topic, and that is the answer.
    `items`: one to four filed books in front, at least one of the book's topic, with noise as in the data.
    """
    shelf = rng.choice(SHELVES)
    topic = TOPIC_OF[shelf]
    prompt = QUESTION.format(text=draw_text(topic, rng))
    others = [s for s in SHELVES if TOPIC_OF[s] != topic]
    if kind == "words":
        tags = [shelf, *rng.sample(others, rng.randint(0, 2))]
        rng.shuffle(tags)
        prompt = rng.choice(HINTS).format(tags=", ".join(tags)) + prompt
    elif kind == "items":
        more = rng.randint(0, 3)
        tags = [shelf] + [shelf if rng.random() < 0.5 else rng.choice(others) for _ in range(more)]
        tags = [misfile(tag, noise, rng) for tag in tags]
        rng.shuffle(tags)
        items = [ITEM_FOR_PROMPT.format(text=draw_text(TOPIC_OF[tag], rng), tag=tag) for tag in tags]
        prompt = ", and ".join(items) + ". " + prompt
    return prompt, shelf


def lessons(seed: int, steps: int, noise: float) -> Iterator[list[tuple[str, str]]]:
    """Batches, half of whose examples carry a hint: words, and every tenth time filed books."""
    rng = random.Random(f"{seed}-backbone")
    for step in range(steps):
        kind = "items" if step % 10 == 9 else "words"
        yield [draw_lesson("plain" if n % 2 else kind, noise, rng) for n in range(64)]


def make_backbone(
    folder: Path, seed: int, steps: int, noise: float
) -> tuple[T5ForConditionalGeneration, PreTrainedTokenizerFast]:
    """Train a T5 to name the shelf: the hinted one, and any of the topic's three if nothing is hinted."""
    torch.manual_seed(seed)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = word_tokenizer(names, "$A </s>", 512)
    tokenizer.save_pretrained(folder)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=96,
        d_kv=24,
        num_heads=4,
        d_ff=192,
        num_layers=2,
        num_decoder_layers=2,
        feed_forward_proj="relu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        max_new_tokens=5, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    scheduler = schedule(optimizer, steps)
    model.train()
    for step, batch in enumerate(lessons(seed, steps, noise), 1):
        inputs = tokenizer([prompt for prompt, _ in batch], padding=True, return_tensors="pt")
        labels = tokenizer([shelf for _, shelf in batch], padding=True, return_tensors="pt")["input_ids"]
        loss = model(**inputs, labels=labels.masked_fill(labels == 0, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            print(f"  backbone step {step}/{steps}: loss {loss.item():.3f}", flush=True)
    model.eval()
    model.save_pretrained(folder)
    return model, tokenizer


# ---------------------------------------------------------------------------------------------- the checks


@torch.no_grad()
def check_encoder(encoder: SentenceTransformer, dev: list[tuple[dict[str, Any], str]]) -> dict[str, float]:
    """On dev readers: does a query find its topic, and does a linear probe read the tag?"""
    lead = QUESTION.format(text="")
    items = {item["id"]: item for row, _ in dev for item in row["profile"]}
    vectors = encode(encoder, [ITEM_FOR_ENCODER.format(**item) for item in items.values()])
    bare = encode(encoder, [item["text"] for item in items.values()])
    place = {key: n for n, key in enumerate(items)}
    queries = encode(encoder, [row["input"].removeprefix(lead) for row, _ in dev])
    nearest, share = [], []
    for (row, gold), x in zip(dev, queries, strict=True):
        scores = vectors[[place[item["id"]] for item in row["profile"]]] @ x
        right = torch.tensor([TOPIC_OF[item["tag"]] == TOPIC_OF[gold] for item in row["profile"]])
        nearest.append(right[scores.argmax()].float())
        share.append((scores / 0.1).softmax(0)[right].sum())
    tags = [item["tag"] for item in items.values()]
    half = len(tags) // 2
    probes = []
    for x in (vectors.numpy(), bare.numpy()):
        probe = LogisticRegression(C=100.0, max_iter=2000).fit(x[:half], tags[:half])
        probes.append(float(probe.score(x[half:], tags[half:])))
    return {
        "nearest item has the query's topic": float(torch.stack(nearest).mean()),
        "weight on the query's topic at temperature 0.1": float(torch.stack(share).mean()),
        "linear probe of the tag, item with tag": probes[0],
        "linear probe of the tag, text alone": probes[1],
    }


@torch.no_grad()
def check_backbone(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, seed: int, noise: float
) -> dict[str, float]:
    """On fresh texts: accuracy by kind of hint, calibration without one; and the embedding rows' size."""
    report = {}
    for kind in ("plain", "words", "items"):
        rng = random.Random(f"{seed}-check-{kind}")
        batch = [draw_lesson(kind, noise, rng) for _ in range(600)]
        inputs = tokenizer([prompt for prompt, _ in batch], padding=True, return_tensors="pt")
        answers = tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True)
        hits = sum(answer == shelf for answer, (_, shelf) in zip(answers, batch, strict=True))
        report[f"accuracy, hint: {kind}"] = hits / len(batch)
        if kind == "plain":
            starts = torch.zeros(len(batch), 1, dtype=torch.long)
            logits = model(**inputs, decoder_input_ids=starts).logits[:, 0]  # [600, vocabulary]
            rivals = [WORLD[TOPIC_OF[shelf]].shelves for _, shelf in batch]
            first = [[tokenizer(name)["input_ids"][0] for name in names] for names in rivals]
            probs = logits.softmax(-1).gather(1, torch.tensor(first))  # [600, 3]
            report["no hint: probability of the topic's three shelves"] = float(probs.sum(1).mean())
            report["no hint: probability of the likeliest shelf, mean"] = float(probs.max(1).values.mean())
            report["no hint: probability of the likeliest shelf, highest"] = float(probs.max())
    report["mean norm of the embedding rows"] = float(
        model.get_input_embeddings().weight[len(tokenizer.all_special_ids) :].norm(dim=1).mean()
    )
    return report


def main() -> None:
    """Make all assets, check them and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="its three parts are replaced")
    parser.add_argument("--seed", type=int, default=0, help="everything random follows from it")
    parser.add_argument("--noise", type=float, default=0.05, help="share of history items on another shelf")
    parser.add_argument("--encoder-steps", type=int, default=400, help="training steps of the encoder")
    parser.add_argument("--backbone-steps", type=int, default=1400, help="training steps of the backbone")
    args = parser.parse_args()
    start = time.perf_counter()
    torch.set_num_threads(1)  # sums in one order: the same bytes on each run
    disable_progress_bar()
    check_world()
    for part in ("data", "encoder", "backbone"):
        shutil.rmtree(args.output / part, ignore_errors=True)

    dev = make_data(args.output / "data", args.seed, args.noise)
    encoder = make_encoder(args.output / "encoder", args.seed, args.encoder_steps)
    report: dict[str, Any] = {"seed": args.seed, "encoder": check_encoder(encoder, dev)}
    print(json.dumps(report, indent=2), f"{time.perf_counter() - start:.0f} s", flush=True)
    model, tokenizer = make_backbone(args.output / "backbone", args.seed, args.backbone_steps, args.noise)
    report["backbone"] = check_backbone(model, tokenizer, args.seed, args.noise)
    files = sorted(p for p in args.output.rglob("*") if p.is_file() and p.name != "report.json")
    report["bytes"] = {p.relative_to(args.output).as_posix(): p.stat().st_size for p in files}
    report["bytes"]["all"] = sum(report["bytes"].values())
    text = json.dumps(report, indent=2)
    (args.output / "report.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    print(f"made {args.output} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
