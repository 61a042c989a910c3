"""The Trainer: what it trains, what it saves, and that its numbers are those of equation (6)."""

import hashlib
import json
import math
import random
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import reference
import tiny
import torch
from reference import close
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import ConcatDataset, Subset
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from pplug_hf import PPlugModel, PPlugProcessor
from pplug_hf.data.dataset import PersonaDataset
from pplug_hf.data.lamp import Example
from pplug_hf.data.vectors import VectorStore
from pplug_hf.errors import ConfigurationError, DataError, HubError
from pplug_hf.training import PPlugCollator, PPlugTrainer, PPlugTrainingArguments

FAMILIES = ("t5", "bart", "gpt2")
every_family = pytest.mark.parametrize("family", FAMILIES)


def sentence(rng, least, most):
    return " ".join(rng.choices(tiny.WORDS, k=rng.randint(least, most)))


def make_examples(n=8, seed=0, items=6):
    """Answers of one to nine words, histories of none to `items` texts; the first user is new."""
    rng = random.Random(seed)
    return [
        Example(
            id=str(i),
            user=str(i),
            prompt=sentence(rng, 1, 6),
            query=sentence(rng, 1, 3),
            target=sentence(rng, 1, 9),
            history=[sentence(rng, 2, 5) for _ in range(rng.randint(1, items) if i else 0)],
        )
        for i in range(n)
    ]


def make_model(family, seed=0, **choices):
    """As `tiny.model`, but the same weights whenever it is asked."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return tiny.model(family, seed, **choices)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return VectorStore(tiny.shared_encoder(), folder=tmp_path_factory.mktemp("vectors"))


@pytest.fixture
def dataset(store):
    return PersonaDataset(make_examples(), store)


def make_trainer(model, folder, train=None, **arguments):
    evaluated = arguments.pop("eval_dataset", None)
    processor = PPlugProcessor.from_model(model)
    arguments = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    } | arguments
    return PPlugTrainer(
        model=model,
        args=PPlugTrainingArguments(output_dir=str(folder), **arguments),
        data_collator=PPlugCollator(processor),
        processing_class=processor,
        train_dataset=train,
        eval_dataset=evaluated,
    )


def quiet(model):
    """The input encoder without its dropout, so that the batch size changes nothing."""
    for module in model.plug.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def plug_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def checksums(model):
    return {
        f"{part}.{name}": hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for part in ("backbone", "history_encoder")
        for name, tensor in getattr(model, part).state_dict().items()
    }


def negative_log_likelihoods(model, examples):
    """Equation (6), token by token, row by row, for each example a list."""
    end = [] if model.config.is_encoder_decoder else [tiny.EOS]
    result = []
    for e in examples:
        answer = model.tokenizer(e.target, add_special_tokens=not end)["input_ids"] + end
        soft = reference.soft_prompt(model, e.history, e.query)
        tokens = reference.log_likelihood(model, soft, reference.row(model, e.prompt), answer)
        result.append([-token for token in tokens])
    return result


def mean(numbers):
    return sum(numbers) / len(numbers)


# ---- the batch --------------------------------------------------------------------------------------------------


@every_family
def test_a_batch_has_all_that_training_and_generation_need(family, dataset):
    model = make_model(family)
    processor = PPlugProcessor.from_model(model)
    rows = [dataset[i] for i in range(3)]
    batch = PPlugCollator(processor)(rows)
    expected = processor(
        text=[row["text"] for row in rows],
        persona=[row["persona"] for row in rows],
        query=[row["query"] for row in rows],
        labels=[row["target"] for row in rows],
    )
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(batch[name], expected[name]), name
    assert [len(persona) for persona in batch["persona"]] == [len(e.history) for e in dataset.examples[:3]]
    assert batch["query"] == [e.query for e in dataset.examples[:3]]
    assert processor.decode_answers(batch["labels"], 0) == [e.target for e in dataset.examples[:3]]
    assert ("prompt_input_ids" in batch) == (family == "gpt2")
    if family == "gpt2":
        assert processor.decode_answers(batch["prompt_input_ids"], 0) == [e.prompt for e in dataset.examples[:3]]


def test_a_row_without_a_query_has_its_text_for_one(dataset):
    collator = PPlugCollator(PPlugProcessor.from_model(make_model("t5")))
    rows = [dataset[i] for i in range(3)]
    for i in range(3):
        asked = [{**row, "query": None} if j == i else row for j, row in enumerate(rows)]
        assert collator(asked)["query"] == [row["text"] if j == i else row["query"] for j, row in enumerate(rows)]
    assert "query" not in collator([{**row, "query": None} for row in rows])
    with pytest.raises(DataError, match=r"needs a 'text'.*got \['prompt'\].*remove_unused_columns"):
        collator([{"prompt": "the sea"}])


@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, lambda values: np.array(values, dtype="float32"), torch.tensor]
)
def test_queries_may_be_vectors_of_any_kind(kind, dataset):
    collator = PPlugCollator(PPlugProcessor.from_model(make_model("gpt2", train_input_encoder=False)))
    vectors = [[float(i), 1.0] for i in range(3)]
    rows = [{**dataset[i], "query": kind(vectors[i])} for i in range(3)]
    query = collator(rows)["query"]
    assert query.dtype == torch.float32 and query.tolist() == vectors
    for i, other in [(0, None), (0, "sea"), (2, None), (1, "sea")]:
        with pytest.raises(DataError, match="2 of 3 rows have a vector for a query"):
            collator([{**row, "query": other} if j == i else row for j, row in enumerate(rows)])
    for other in (kind([1.0]), ["sea", "moon"], {"a": 1}):
        with pytest.raises(DataError, match=r"texts, or vectors of one width, got .* that make no matrix"):
            collator([*rows[:2], {**rows[2], "query": other}])


@pytest.mark.parametrize("processing_class", [True, False])
def test_the_trainer_has_a_collator_and_arguments_of_its_own(processing_class, dataset, tmp_path):
    model = make_model("gpt2")
    options = {"processing_class": PPlugProcessor.from_model(model)} if processing_class else {}
    arguments = PPlugTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    trainer = PPlugTrainer(model, arguments, train_dataset=dataset, **options)
    assert trainer.evaluate(dataset)["eval_loss"] == pytest.approx(
        make_trainer(model, tmp_path, per_device_eval_batch_size=8).evaluate(dataset)["eval_loss"]
    )
    with pytest.raises(ConfigurationError, match="must be PPlugTrainingArguments, got a TrainingArguments"):
        PPlugTrainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def test_long_texts_are_cut(dataset):
    processor = PPlugProcessor.from_model(make_model("gpt2"))
    rows = [{"text": "the sea " * 9, "query": "sea", "target": "the moon " * 9, "persona": None}]
    batch = PPlugCollator(processor, max_length=5, max_target_length=4)(rows)
    assert batch["input_ids"].shape == (1, 9) and batch["prompt_input_ids"].shape == (1, 5)
    assert (batch["labels"] != -100).sum() == 4 and batch["labels"][0, -1] == tiny.EOS


# ---- what is trained --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate, expected", [(None, 1e-2 / 20), (3e-4, 3e-4), (0.0, 0.0)])
@every_family
def test_the_optimiser_holds_the_plug_and_nothing_else(family, rate, expected, tmp_path):
    model = make_model(family, learn_temperature=True)
    trainer = make_trainer(model, tmp_path, encoder_learning_rate=rate, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    held = [(id(p), group) for group in optimizer.param_groups for p in group["params"]]
    groups = dict(held)
    assert len(groups) == len(held)  # each once
    plug = {name: p for name, p in model.plug.named_parameters() if ".pooler." not in name}
    assert set(groups) == {id(p) for p in plug.values()}
    for name, p in plug.items():
        assert groups[id(p)]["lr"] == (expected if name.startswith("input_encoder.") else 1e-2), name
        decays = p.ndim > 1 and "LayerNorm" not in name and name != "no_persona"
        if name.endswith((".weight", ".bias")):  # of layers; norms and biases never decay
            assert groups[id(p)]["weight_decay"] == (0.1 if decays else 0), name
    groups = len(optimizer.param_groups)
    assert trainer.create_optimizer() is optimizer and len(optimizer.param_groups) == groups  # asked again


def test_both_learning_rates_follow_the_schedule(dataset, tmp_path):
    trainer = make_trainer(make_model("gpt2"), tmp_path, dataset, max_steps=4, lr_scheduler_type="linear")
    trainer.train()
    rates = {group["initial_lr"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {1e-2: 0, 1e-2 / 20: 0}
    trainer = make_trainer(make_model("gpt2"), tmp_path)
    trainer.create_optimizer_and_scheduler(10)
    for _ in range(5):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert sorted({group["lr"] for group in trainer.optimizer.param_groups}) == pytest.approx([2.5e-4, 5e-3])


def test_plugs_without_an_input_encoder_train_too(store, tmp_path):
    examples = make_examples()
    for choices, queries in (
        ({"aggregator": "mean"}, None),
        ({"train_input_encoder": False}, None),
        ({"train_input_encoder": False}, store([e.query for e in examples], show_progress=False)),
    ):
        model = make_model("gpt2", **choices)
        before = plug_of(model)
        trainer = make_trainer(model, tmp_path, PersonaDataset(examples, store, queries=queries), max_steps=2)
        trainer.train()
        assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.0}  # one rate, at its end
        assert all(not torch.equal(model.state_dict()[name], old) for name, old in before.items())


@pytest.mark.parametrize("stage", ["create_optimizer", "train"])
@pytest.mark.parametrize(
    "mistake, message",
    [
        (lambda model: model.plug.requires_grad_(False), "No parameter .* trainable"),
        (lambda model: model.backbone.requires_grad_(True), r"first 'backbone\."),
        (lambda model: next(model.backbone.parameters()).requires_grad_(True), "1 parameters outside"),
        (lambda model: next(model.history_encoder.parameters()).requires_grad_(True), r"first 'history_encoder\."),
    ],
    ids=["nothing to train", "backbone", "one of the backbone", "one of the history encoder"],
)
def test_the_wrong_parameters_are_refused(mistake, message, stage, dataset, tmp_path):
    model = tiny.from_backbone(tiny.backbone("gpt2"), tiny.encoder(), tokenizer=tiny.tokenizer("gpt2"))
    mistake(model)
    with pytest.raises(ConfigurationError, match=message):
        getattr(make_trainer(model, tmp_path, dataset, max_steps=1), stage)()


@pytest.mark.parametrize(
    "placed, parallel",
    [
        ({"transformer": 0, "lm_head": 1}, True),
        ({"": 0}, False),
        ({"": torch.device("cpu")}, False),
        ({"transformer": 0, "lm_head": "cpu"}, False),
    ],
)
def test_a_backbone_on_several_devices_stays_there(placed, parallel, dataset, tmp_path, monkeypatch):
    model = make_model("gpt2")
    monkeypatch.setattr(model.backbone, "hf_device_map", placed, raising=False)
    model._freeze(model.backbone, check=False)
    moved = []
    monkeypatch.setattr(type(model), "to", lambda self, *args, **kwargs: moved.append(args) or self)
    trainer = make_trainer(model, tmp_path, dataset, max_steps=1)
    assert trainer.is_model_parallel == hasattr(model, "hf_device_map") == parallel
    trainer.train()
    assert trainer.state.global_step == 1 and bool(moved) != parallel
    trainer.save_model(str(tmp_path / "plug"))
    monkeypatch.setattr(model.backbone, "hf_device_map", {})
    model._freeze(model.backbone, check=False)
    assert not hasattr(model, "hf_device_map")


@pytest.mark.parametrize("kind", [PPlugTrainingArguments, Seq2SeqTrainingArguments])
def test_one_process_uses_one_accelerator_of_several(kind, tmp_path, monkeypatch):
    """`nn.DataParallel` would give every replica the personas of all rows."""

    def devices(self):
        self._n_gpu, self.distributed_state = 2, None  # as of transformers without a launcher
        return torch.device("cpu")

    found = cached_property(devices)
    found.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", found)
    trainer = PPlugTrainer(make_model("t5"), kind(output_dir=str(tmp_path), per_device_train_batch_size=4))
    assert trainer.args.n_gpu == 1 and trainer.args.train_batch_size == 4
    assert trainer._wrap_model(trainer.model) is trainer.model


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"label_smoothing_factor": 0.1}, "so label_smoothing_factor has no effect"),
        ({"neftune_noise_alpha": 0.1}, "so neftune_noise_alpha has no effect"),
        ({"bf16_full_eval": True}, "bf16_full_eval would leave the plug in half precision.*{'dtype': 'bfloat16'}"),
        ({"fp16_full_eval": True}, "fp16_full_eval would"),
        (
            {"push_to_hub": True, "hub_strategy": "checkpoint"},
            "hub_strategy is 'checkpoint', and only plugs are pushed",
        ),
        ({"push_to_hub": True, "hub_strategy": "all_checkpoints"}, "is 'all_checkpoints'.*use 'every_save' or 'end'"),
    ],
)
def test_arguments_that_could_not_do_what_they_say_are_refused(arguments, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(make_model("gpt2"), tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    arguments = Seq2SeqTrainingArguments(output_dir=str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match=r"Of 2 processes .* know one.*pass use_cpu=True"):
        PPlugTrainer(make_model("gpt2"), arguments)


@pytest.mark.parametrize("choices", [{"train_input_encoder": False}, {"aggregator": "mean"}])
def test_a_rate_for_an_encoder_that_is_not_trained_is_refused(choices, dataset, tmp_path):
    trainer = make_trainer(make_model("gpt2", **choices), tmp_path, dataset, encoder_learning_rate=1e-3)
    with pytest.raises(
        ConfigurationError, match=r"encoder_learning_rate=0.001 has no effect.*train_input_encoder=True"
    ):
        trainer.train()


def test_a_loss_of_the_users_is_refused(tmp_path):
    """It would get labels that the model was not given: a soft prompt at the answer would stand behind it."""
    arguments = PPlugTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ConfigurationError, match="compute_loss_func"):
        PPlugTrainer(model=make_model("gpt2"), args=arguments, compute_loss_func=lambda *args, **kwargs: None)


@every_family
def test_training_changes_the_plug_and_no_bit_of_the_rest(family, dataset, tmp_path):
    model = make_model(family)
    frozen, before = checksums(model), plug_of(model)
    trainer = make_trainer(model, tmp_path, dataset, eval_dataset=dataset, max_steps=6)
    loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < loss
    assert checksums(model) == frozen
    for name, old in before.items():
        assert not torch.equal(model.state_dict()[name], old), name
    assert not list(tmp_path.rglob("*.safetensors"))  # told not to save


# ---- the loss of a step -----------------------------------------------------------------------------------------


@every_family
def test_accumulated_gradients_equal_one_large_batch(family, dataset, tmp_path):
    tokens = negative_log_likelihoods(quiet(make_model(family)), dataset.examples)
    expected = mean(sum(tokens, []))
    assert abs(expected - mean([mean(row) for row in tokens])) > 0.01  # or the test could not tell
    trained = []
    for batch_size, accumulated in ((8, 1), (4, 2), (2, 4)):
        model = quiet(make_model(family))
        trainer = make_trainer(
            model,
            tmp_path,
            dataset,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
            optim="sgd",  # whose step is the gradient
            learning_rate=1.0,
            encoder_learning_rate=1.0,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
        )
        assert trainer.train().training_loss == pytest.approx(expected, rel=1e-4)
        trained.append(plug_of(model))
    start = plug_of(make_model(family))
    assert any((tensor - start[name]).abs().max() > 0.01 for name, tensor in trained[0].items())
    for other in trained[1:]:
        for name, tensor in trained[0].items():
            close(other[name] - start[name], tensor - start[name], 2e-4)


@every_family
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing")
def test_activation_checkpointing_changes_nothing(family, dataset, tmp_path):
    plugs = []
    for on in (False, True):
        model = make_model(family)
        trainer = make_trainer(
            model, tmp_path, dataset, max_steps=2, gradient_checkpointing=on, optim="sgd", learning_rate=0.1
        )
        trainer.train()
        assert model.backbone.is_gradient_checkpointing == on
        plugs.append(plug_of(model))
        assert model.generate(torch.tensor([[9, 10]]), persona=tiny.HISTORY, max_new_tokens=4).ndim == 2
    for name, tensor in plugs[0].items():
        close(plugs[1][name], tensor, 1e-5)


@pytest.mark.parametrize("family, autocast", [*((family, False) for family in FAMILIES), ("gpt2", True)])
def test_a_half_precision_backbone_trains_a_full_precision_plug(family, autocast, dataset, tmp_path):
    model = tiny.from_backbone(
        tiny.backbone(family).to(torch.bfloat16), tiny.shared_encoder(), tokenizer=tiny.tokenizer(family)
    )
    frozen = checksums(model)
    trainer = make_trainer(model, tmp_path, dataset, max_steps=6, bf16=autocast, eval_dataset=dataset)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert checksums(model) == frozen and model.backbone.dtype == torch.bfloat16
    assert {p.dtype for p in model.plug.parameters()} == {torch.float32}
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {trainer.optimizer.state[p]["exp_avg"].dtype for p in held} == {torch.float32}
    trainer.save_model()
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}


# ---- checkpoints ------------------------------------------------------------------------------------------------


@every_family
def test_a_checkpoint_is_a_plug_and_the_state_of_the_training(family, dataset, tmp_path):
    model = make_model(family)
    trainer = make_trainer(
        model, tmp_path, dataset, max_steps=2, save_strategy="steps", save_steps=1, hub_token="hf_secret"
    )
    trainer.train()
    final = plug_of(model)
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "checkpoint-2", tmp_path / "final"):
        names = {path.name for path in folder.iterdir()}
        weights = load_file(folder / "model.safetensors")
        assert set(weights) == set(final) and all(name.startswith("plug.") for name in weights)
        assert all(torch.equal(weights[name], tensor) for name, tensor in final.items())
        assert "training_args.bin" not in names and json.loads((folder / "training_args.json").read_text())
        assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
        numbers = sum(tensor.numel() for tensor in final.values())
        assert (folder / "model.safetensors").stat().st_size < 4 * numbers + 20_000
        # Pickles: optimiser and so on of a checkpoint, which a final plug does not need.
        pickles = {name for name in names if name.endswith((".pt", ".pth", ".bin", ".pkl"))}
        assert pickles == ({"optimizer.pt", "scheduler.pt", "rng_state.pth"} if folder.name != "final" else set())
        for path in folder.iterdir():
            content = path.read_bytes()
            assert b"hf_secret" not in content
            assert not any(text.encode() in content for e in dataset.examples for text in e.history)
        arguments = json.loads((folder / "training_args.json").read_text())
        assert (arguments["max_steps"], arguments["learning_rate"]) == (2, 1e-2)

    processor = PPlugProcessor.from_pretrained(tmp_path / "checkpoint-2")
    assert processor.is_encoder_decoder == model.config.is_encoder_decoder
    again = PPlugModel.from_pretrained(
        tmp_path / "checkpoint-2", backbone=tiny.backbone(family), encoder=tiny.shared_encoder()
    )
    rows = [dataset[i] for i in range(4)]
    batch = PPlugCollator(processor)(rows)
    batch = {name: value for name, value in batch.items() if not name.startswith("prompt_")}
    close(again(**batch).loss, model.eval()(**batch).loss, 1e-6)


@pytest.fixture(scope="module")
def uninterrupted(store, tmp_path_factory):
    """Two and a half epochs of four steps, with a checkpoint every second step, for each family."""
    return {
        family: run_with_drop_out(family, store, tmp_path_factory.mktemp(f"uninterrupted-{family}"))
        for family in ("t5", "gpt2")
    }


def run_with_drop_out(family, store, folder, checkpoint=None, **arguments):
    """(folder, seen, plug): where, the personas of each epoch in the order seen, and what came out."""
    data = PersonaDataset(make_examples(items=12), store, history_dropout=0.9, seed=3)
    model = make_model(family, seed=0 if checkpoint is None else 5)
    options = {"per_device_train_batch_size": 2, "max_steps": 10, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(model, folder, data, **options | arguments)
    collate, seen = trainer.data_collator, []

    def noted(rows):
        seen.append([row["persona"].vectors for row in rows])
        return collate(rows)

    trainer.data_collator = noted
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 10
    return folder, seen, plug_of(model)


@pytest.mark.parametrize("family, step", [("t5", 2), ("t5", 4), ("t5", 6), ("gpt2", 6), ("gpt2", 8)])
def test_a_resumed_training_ends_as_an_uninterrupted_one(family, step, uninterrupted, store, tmp_path):
    folder, seen, expected = uninterrupted[family]
    _, resumed, plug = run_with_drop_out(family, store, tmp_path, checkpoint=str(folder / f"checkpoint-{step}"))
    for batch, before in zip(resumed[::-1], seen[::-1], strict=False):  # the last ones are the same
        assert [len(one) for one in batch] == [len(one) for one in before]
        assert all(torch.equal(one, other) for one, other in zip(batch, before, strict=True))
    for name, tensor in expected.items():
        close(plug[name], tensor, 1e-6)


def test_every_epoch_draws_other_items(uninterrupted):
    _, seen, _ = uninterrupted["t5"]
    first, second = ([len(one) for batch in seen[i : i + 4] for one in batch] for i in (0, 4))
    assert sorted(first) != sorted(second) and sum(first) > 0


def test_batches_of_similar_length(store, tmp_path):
    data = PersonaDataset(make_examples(64), store)
    padding = {}
    for strategy in ("random", "group_by_length"):
        trainer = make_trainer(make_model("t5"), tmp_path, data, train_sampling_strategy=strategy)
        lengths = [batch["attention_mask"].sum(1) for batch in trainer.get_train_dataloader()]
        assert sum(map(len, lengths)) == len(data)
        assert list(trainer.get_eval_dataloader(data).sampler) == list(range(len(data)))
        padding[strategy] = sum(float((one.max() - one).sum()) for one in lengths)
    assert padding["group_by_length"] < padding["random"] / 2


def test_repeated_examples_are_grouped_too(store, tmp_path):
    data = PersonaDataset(make_examples(), store, history_dropout=0.5, repeats=2)
    trainer = make_trainer(make_model("t5"), tmp_path, data, train_sampling_strategy="group_by_length")
    assert len(data) > len(data.examples)
    assert sorted(trainer._get_train_sampler()) == list(range(len(data)))


def test_a_resumed_training_groups_by_length_as_before(store, tmp_path):
    options = {"train_sampling_strategy": "group_by_length"}
    folder, seen, expected = run_with_drop_out("t5", store, tmp_path / "whole", **options)
    orders = [[len(one) for batch in seen[i : i + 4] for one in batch] for i in (0, 4)]
    assert orders[0] != orders[1]
    checkpoint = str(folder / "checkpoint-6")
    _, resumed, plug = run_with_drop_out("t5", store, tmp_path / "rest", checkpoint=checkpoint, **options)
    for batch, before in zip(resumed[::-1], seen[::-1], strict=False):
        assert all(torch.equal(one, other) for one, other in zip(batch, before, strict=True))
    for name, tensor in expected.items():
        close(plug[name], tensor, 1e-6)


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_draw_the_same_items(workers, uninterrupted, store, tmp_path):
    _, _, expected = uninterrupted["gpt2"]
    _, _, plug = run_with_drop_out("gpt2", store, tmp_path, dataloader_num_workers=workers, save_strategy="no")
    for name, tensor in expected.items():
        close(plug[name], tensor, 1e-6)


class Epochs(PersonaDataset):
    """Rows whose query tells the epoch."""

    def __getitem__(self, index):
        return {**super().__getitem__(index), "query": f"epoch {self.epoch}"}


@pytest.mark.parametrize("options", [{}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}])
@pytest.mark.parametrize(
    "wrapped",
    [
        lambda data: data,
        lambda data: Subset(data, range(4)),
        lambda data: ConcatDataset([Subset(data, [0, 1]), Subset(data, [2, 3])]),
    ],
    ids=["itself", "Subset", "ConcatDataset"],
)
def test_whatever_wraps_or_loads_it_a_data_set_knows_its_epoch(options, wrapped, store, tmp_path):
    data = wrapped(Epochs(make_examples(4), store, history_dropout=0.9))
    trainer = make_trainer(make_model("gpt2"), tmp_path, data, num_train_epochs=3, **options)
    losses, seen = trainer.compute_loss, []
    trainer.compute_loss = lambda model, inputs, **more: (
        seen.extend(set(inputs["query"])) or losses(model, inputs, **more)
    )
    trainer.train()
    assert seen == ["epoch 0", "epoch 1", "epoch 2"]


@pytest.mark.parametrize("higher", [False, True])
def test_the_best_checkpoint_is_what_remains(higher, store, dataset, tmp_path):
    model = make_model("t5")
    trainer = make_trainer(
        model,
        tmp_path,
        dataset,
        eval_dataset=PersonaDataset(make_examples(5, seed=1), store),
        max_steps=4,
        learning_rate=0.3,  # jumps about
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=higher,
        prediction_loss_only=True,
    )
    trainer.train()
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    best = (max if higher else min)(losses, key=losses.get)
    worst = (min if higher else max)(losses, key=losses.get)
    assert len(set(losses.values())) == 4
    kept, other = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (best, worst))
    for name, tensor in plug_of(model).items():
        assert torch.equal(tensor, kept[name]), name
    assert not torch.equal(kept["plug.projector.output.weight"], other["plug.projector.output.weight"])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)


# ---- evaluation -------------------------------------------------------------------------------------------------


@every_family
def test_the_validation_loss(family, dataset, tmp_path):
    model = make_model(family)
    model.train()  # as in the middle of a training: dropout must go
    tokens = negative_log_likelihoods(make_model(family), dataset.examples)
    expected = mean([mean(sum(batch, [])) for batch in (tokens[:4], tokens[4:])])  # as every Trainer does
    for arguments in ({"prediction_loss_only": True}, {"predict_with_generate": True}):
        trainer = make_trainer(
            model, tmp_path, eval_dataset=dataset, per_device_eval_batch_size=4, generation_max_length=32, **arguments
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


def answers_one_by_one(model, examples, **options):
    """Texts, from the model alone: no batch, no padding, no Trainer, no finished persona."""
    answers = []
    for e in examples:
        ids = torch.tensor([reference.row(model, e.prompt)])
        output = model.generate(ids, persona=e.history, query=e.query, **options)[0]
        new = output if model.config.is_encoder_decoder else output[ids.shape[1] :]
        answers.append(model.tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 6}, {"max_new_tokens": 30}, {"num_beams": 3, "max_new_tokens": 5}]
)
@every_family
def test_predictions_are_the_models_own_answers(family, options, dataset, tmp_path):
    model = make_model(family, attention_temperature=0.2)
    trainer = make_trainer(model, tmp_path, predict_with_generate=True)
    output = trainer.predict(dataset, **options)
    processor = trainer.processing_class
    answers = processor.decode_answers(output.predictions, 0)
    assert answers == answers_one_by_one(model, dataset.examples, **options)
    assert len(set(answers)) > 1
    assert processor.decode_answers(output.label_ids, 0) == [e.target for e in dataset.examples]
    assert math.isfinite(output.metrics["test_loss"])
    if family == "gpt2":  # new tokens alone
        assert output.predictions.shape[1] <= options["max_new_tokens"]


@every_family
def test_predictions_are_the_same_where_generate_returns_more_than_ids(family, dataset, tmp_path):
    trainer = make_trainer(make_model(family), tmp_path, predict_with_generate=True)
    ids, outputs = (
        trainer.predict(dataset, max_new_tokens=6, return_dict_in_generate=more).predictions for more in (False, True)
    )
    assert (ids == outputs).all()


@every_family
def test_the_history_changes_the_predictions(family, store, tmp_path):
    examples = make_examples(items=12)
    trainer = make_trainer(make_model(family), tmp_path, predict_with_generate=True)
    own, none = (
        trainer.predict(PersonaDataset(examples, store, use_history=use), max_new_tokens=6).predictions
        for use in (True, False)
    )
    assert own.shape != none.shape or (own != none).any()


@pytest.mark.parametrize("placement", ["prompt", "answer"])
def test_predictions_in_chats_are_those_of_generate(placement, store, tmp_path):
    tokenizer = tiny.tokenizer("llama")
    tokenizer.chat_template = "{% for m in messages %}<{{ 'bot' if m.role == 'assistant' else m.role }}> {{ m.content }} <eos> {% endfor %}<bot> "
    model = tiny.from_backbone(
        tiny.backbone("llama"), tiny.shared_encoder(), tokenizer=tokenizer, placement=placement, system="good"
    )
    tiny.randomise(model.plug)
    dataset = PersonaDataset(make_examples(items=6), store)
    trainer = make_trainer(model, tmp_path, predict_with_generate=True)
    predicted = trainer.predict(dataset, max_new_tokens=6).predictions
    processor = PPlugProcessor.from_model(model)
    for i, answer in enumerate(processor.decode_answers(predicted, 0)):
        row = dataset[i]
        asked = processor(row["text"], persona=row["persona"], query=row["query"], max_length=256)
        ids = model.generate(**asked, max_new_tokens=6)
        assert answer == processor.decode_answers(ids, asked["input_ids"].shape[1])[0]


@every_family
def test_metrics_during_training_see_answers_and_golds(family, dataset, tmp_path):
    model = make_model(family)
    trainer = make_trainer(
        model,
        tmp_path,
        dataset,
        eval_dataset=dataset,
        predict_with_generate=True,
        generation_max_length=32,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
    )
    processor = trainer.processing_class
    seen = []

    def metrics(prediction):
        seen.append(processor.decode_answers(prediction.predictions, 0))
        assert processor.decode_answers(prediction.label_ids, 0) == [e.target for e in dataset.examples]
        return {"words": mean([len(text.split()) for text in seen[-1]])}

    trainer.compute_metrics = metrics
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_words" in log]
    assert len(logs) == len(seen) == 2 and all(math.isfinite(log["eval_loss"]) for log in logs)
    if family != "gpt2":  # a causal model's max_length counts the (padded) prompt too
        assert seen[-1] == answers_one_by_one(model.eval(), dataset.examples, max_length=32)


@every_family
def test_answers_may_be_withheld_from_predictions_but_not_from_training(family, store, tmp_path):
    examples = make_examples(4)
    for example in examples:
        example.target = None
    dataset = PersonaDataset(examples, store)
    trainer = make_trainer(make_model(family), tmp_path, dataset, predict_with_generate=True, max_steps=1)
    output = trainer.predict(dataset, max_new_tokens=4)
    answers = trainer.processing_class.decode_answers(output.predictions, 0)
    assert answers == answers_one_by_one(trainer.model, examples, max_new_tokens=4)
    assert output.label_ids is None and "test_loss" not in output.metrics
    with pytest.raises(DataError, match="no answers"):
        trainer.train()


def test_causal_predictions_need_prompts_without_answers(dataset, tmp_path):
    trainer = make_trainer(make_model("gpt2"), tmp_path, predict_with_generate=True)
    collate = trainer.data_collator

    def without(rows):
        return {name: value for name, value in collate(rows).items() if not name.startswith("prompt_")}

    trainer.data_collator = without
    with pytest.raises(ConfigurationError, match="PPlugCollator"):
        trainer.predict(dataset, max_new_tokens=2)


# ---- sharing ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pushes(monkeypatch):
    """What would be pushed, as (folder, repository, options); the Trainer's own ways to the Hub are closed."""
    made = []
    monkeypatch.setattr("pplug_hf.hub.push.push_folder", lambda *args, **options: made.append((*args, options)))
    monkeypatch.setattr(PPlugTrainer, "init_hf_repo", lambda self, **_: setattr(self, "hub_model_id", "me/plug"))
    monkeypatch.setattr("transformers.trainer.hf_api", None)
    return made


def test_the_trainer_pushes_plugs_and_nothing_else(pushes, dataset, tmp_path):
    arguments = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "push_to_hub": True}
    arguments |= {"hub_token": "hf_secret", "hub_private_repo": True, "hub_revision": "two"}
    trainer = make_trainer(make_model("t5"), tmp_path, dataset, **arguments)
    trainer.train()
    trainer.save_model()
    assert [(Path(folder).name, repo) for folder, repo, _ in pushes] == [
        ("checkpoint-1", "me/plug"),
        ("checkpoint-2", "me/plug"),
        (tmp_path.name, "me/plug"),
    ]
    options = {"token": "hf_secret", "private": True, "revision": "two"}
    assert [o for _, _, o in pushes] == [
        {**options, "commit_message": message}
        for message in ("Training in progress, step 1", "Training in progress, step 2", "Model save")
    ]
    pushes.clear()
    trainer.push_to_hub("done", token="hf_other", private=False, revision="three", license="mit")
    assert pushes[0][2] == {
        **{"commit_message": "done", "token": "hf_other", "private": False, "revision": "three"},
        "license": "mit",
    }
    trainer.push_to_hub(blocking=False).result()
    assert len(pushes) == 2 and not list(tmp_path.rglob("*.bin"))


def test_a_push_that_fails_stops_no_training(pushes, dataset, tmp_path, monkeypatch, caplog):
    def refused(*_, **__):
        raise HubError("no")

    monkeypatch.setattr("pplug_hf.hub.push.push_folder", refused)
    arguments = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "push_to_hub": True}
    trainer = make_trainer(make_model("t5"), tmp_path, dataset, **arguments)
    trainer.train()
    assert trainer.state.global_step == 2 and caplog.text.count("goes on without this push: no") == 2
    with pytest.raises(HubError):
        trainer.push_to_hub()


def test_a_push_at_the_end_alone(pushes, dataset, tmp_path):
    arguments = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "push_to_hub": True}
    make_trainer(make_model("t5"), tmp_path, dataset, hub_strategy="end", **arguments).train()
    assert pushes == []


def test_the_trainers_card_is_the_plugs(dataset, tmp_path):
    trainer = make_trainer(make_model("t5"), tmp_path, dataset, max_steps=1, learning_rate=2e-2, hub_token="hf_secret")
    trainer.train()
    trainer.save_model()
    with pytest.raises(ConfigurationError, match="A card has no option licence"):
        trainer.create_model_card(licence="mit")
    trainer.create_model_card(license="mit", finetuned_from="gpt2", tasks="summarization")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "library_name: pplug-hf" in card and "| `learning_rate` | 0.02 | 0.01 |" in card and "license: mit" in card
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert f"| trained parameters | {trainable:,} " in card
    assert str(tmp_path) not in card and "hf_secret" not in card
    recorded = json.loads((tmp_path / "train_settings.json").read_text())
    defaults = PPlugTrainingArguments(output_dir=str(tmp_path)).to_dict()
    assert {name: defaults[name] for name in recorded["defaults"]} == recorded["defaults"]
    changed = {name for name, value in recorded["settings"].items() if value != recorded["defaults"][name]}
    assert changed == {name for name in changed if f"| `{name}` |" in card} and "seed" in recorded["defaults"]
    assert not {"output_dir", "run_name", "hub_token", "hub_model_id", "logging_dir"} & set(recorded["settings"])
