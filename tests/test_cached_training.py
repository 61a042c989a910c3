"""A prompt cache in the Trainer, the train command and the pipeline."""

import bench_data
import pytest
import tiny
import torch
from reference import close
from test_training import make_examples, make_model, plug_of
from transformers import TrainerCallback, pipeline

from pplug_hf import PPlugCollator, PPlugProcessor, PromptCache
from pplug_hf.commands import train as command
from pplug_hf.commands.train import TrainSettings, memory_for_prompts, train
from pplug_hf.data.dataset import PersonaDataset
from pplug_hf.data.vectors import VectorStore
from pplug_hf.errors import ConfigurationError
from pplug_hf.training import PPlugTrainer, PPlugTrainingArguments

FAMILIES = ("t5", "bart", "gpt2", "llama", "qwen3")
TEMPLATE = (
    "<system> good <eos> {% for m in messages %}<{{ 'bot' if m.role == 'assistant' else m.role }}> {{ m.content }} <eos> "
    "{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    store = VectorStore(tiny.shared_encoder(), folder=tmp_path_factory.mktemp("vectors"))
    return PersonaDataset(make_examples(12), store, history_dropout=0.5), PersonaDataset(
        make_examples(5, seed=1), store
    )


def plug_on(family, **choices):
    model = make_model(family, placement="answer", train_input_encoder=False, **choices)
    model.tokenizer.chat_template = TEMPLATE
    model.config.chat = True
    return model


def trained(model, folder, data, cache=None, callbacks=(), **arguments):
    processor = PPlugProcessor.from_model(model)
    trainer = PPlugTrainer(
        model=model,
        args=PPlugTrainingArguments(
            **{
                "output_dir": str(folder),
                "per_device_train_batch_size": 4,
                "per_device_eval_batch_size": 3,
                "max_steps": 6,
                "learning_rate": 0.5,
                "optim": "sgd",  # whose step is the gradient
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "use_cpu": True,
                "disable_tqdm": True,
                "predict_with_generate": True,
            }
            | arguments
        ),
        data_collator=PPlugCollator(processor),
        processing_class=processor,
        train_dataset=data[0],
        eval_dataset=data[1],
        prompt_cache=cache,
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trainer_learns_the_same(family, data, tmp_path):
    cache = PromptCache(evict=False)
    made = [trained(plug_on(family), tmp_path / str(i), data, one) for i, one in enumerate((None, cache))]
    plain, cached = (plug_of(trainer.model) for trainer in made)
    for name in plain:
        close(cached[name], plain[name])
    plain, cached = ([log["loss"] for log in t.state.log_history if "loss" in log] for t in made)
    assert cached == pytest.approx(plain, rel=1e-4)
    steps = cache.computed
    scores = [trainer.predict(data[1], max_new_tokens=5) for trainer in made]
    assert scores[0].predictions.tolist() == scores[1].predictions.tolist()
    assert scores[1].metrics["test_loss"] == pytest.approx(scores[0].metrics["test_loss"], rel=1e-4)
    if family in tiny.CAUSAL:  # "<system> good <eos> <user>" is read once
        texts = {example.prompt for example in data[0].examples}
        assert steps == 4 + sum(len(text.split()) for text in texts) and len(cache) == 1 + len(
            texts | {example.prompt for example in data[1].examples}
        )


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_metrics_of_logits_see_one_for_each_label(family, data, tmp_path):
    options = {"predict_with_generate": False, "max_steps": 1}
    made = [
        trained(plug_on(family), tmp_path / str(i), data, one, **options)
        for i, one in enumerate((None, PromptCache()))
    ]
    plain, cached = (trainer.predict(data[1]) for trainer in made)
    close(*(torch.tensor(one.predictions[0] if family == "t5" else one.predictions) for one in (cached, plain)), 1e-3)
    assert made[1].model.prompt_cache is not None


def test_every_model_that_the_trainer_makes_has_the_cache(data, tmp_path):
    """A `model_init` is asked for a first model, and for another in every training."""
    made, cache, seen = [], PromptCache(evict=False), []

    def model_init():
        made.append(plug_on("llama"))
        made[-1].backbone.to(torch.bfloat16)
        return made[-1]

    class Seen(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(made[-1].backbone.config._attn_implementation)

    arguments = PPlugTrainingArguments(str(tmp_path), max_steps=1, save_strategy="no", report_to="none", use_cpu=True)
    trainer = PPlugTrainer(
        args=arguments, model_init=model_init, train_dataset=data[0], prompt_cache=cache, callbacks=[Seen()]
    )
    trainer.train()
    computed = cache.computed
    trainer.train()
    assert len(made) == 3 and all(model.prompt_cache is cache for model in made)
    assert seen == ["eager"] * 2 and 0 < computed == cache.computed
    ignored = [set(model._ddp_params_and_buffers_to_ignore) for model in made]
    assert ignored == [ignored[0]] * len(made) and not any(name.startswith("plug.") for name in ignored[0])
    assert {model.backbone.config._attn_implementation for model in made} == {"sdpa"}


def test_the_trainer_refuses_a_cache_for_a_soft_prompt_in_front(data, tmp_path):
    with pytest.raises(ConfigurationError, match="'default' stands in front"):
        trained(make_model("llama"), tmp_path, data, PromptCache())


def test_mixed_precision(data, tmp_path):
    made = [
        trained(plug_on("llama"), tmp_path / str(i), data, one, bf16=True)
        for i, one in enumerate((None, PromptCache()))
    ]
    plain, cached = ([log["loss"] for log in t.state.log_history if "loss" in log] for t in made)
    assert cached == pytest.approx(plain, rel=0.03)


@pytest.mark.parametrize(
    "dtype, cache, expected", [("bfloat16", True, "eager"), ("float32", True, "sdpa"), ("bfloat16", False, "sdpa")]
)
def test_short_passes_in_bfloat16_attend_without_the_fused_kernel(dtype, cache, expected, data, tmp_path):
    model, seen = plug_on("llama"), set()
    model.backbone.to(getattr(torch, dtype))

    class Seen(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.add(model.backbone.config._attn_implementation)

        def on_train_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(model, tmp_path, data, PromptCache() if cache else None, callbacks=[Seen()])
    assert seen == {expected} and model.backbone.config._attn_implementation == "sdpa"


# ---- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(places, tmp_path):
    data = bench_data.write_data(tmp_path / "data", bench_data.SHELVES, users=4)
    return TrainSettings(
        data=str(data),
        output=str(tmp_path / "plug"),
        backbone=str(places / "llama"),
        encoder=str(places / "encoder"),
        epochs=3,
        batch_size=4,
        history_dropout=0.0,
        vectors=str(tmp_path / "vectors"),
    )


CHOICES = {"placement": "answer", "train_input_encoder": False}


def caches_of(monkeypatch):
    """The caches that commands make from now on."""
    made = []

    class Seen(PromptCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(command, "PromptCache", Seen)
    return made


def run(settings, **changes):
    model = train(TrainSettings(**vars(settings) | changes), bench_data.SHELVES, **CHOICES)
    assert model.prompt_cache is None
    return plug_of(model)


def test_the_command_reads_every_prompt_once(settings, tmp_path, monkeypatch, capsys):
    made = caches_of(monkeypatch)
    plain = run(settings, output=str(tmp_path / "plain"), prompt_cache="0")
    assert not made
    for memory in ("4GB", "1KB"):
        folder = tmp_path / memory
        cached = run(settings, output=str(folder), prompt_cache=memory)
        for name in plain:
            close(cached[name], plain[name])
        assert not list(folder.glob(".pplug*"))
    assert made[0].computed == made[1].computed > 0 and not made[0]._files and made[1]._files


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"prompt_cache": "0"}])
def test_without_a_cache(settings, monkeypatch, changes):
    made = caches_of(monkeypatch)
    run(settings, **changes, epochs=1)
    assert not made


def kill(settings, folder, monkeypatch):
    """Train until the second checkpoint, with a cache of which most is in files."""
    steps = []

    def killed(self, *args, **kwargs):
        steps.append(1)
        if len(list(folder.glob("checkpoint-*"))) and len(steps) % 3 == 0:
            raise KeyboardInterrupt
        return own(self, *args, **kwargs)

    own = PPlugTrainer.compute_loss
    with monkeypatch.context() as patch:
        patch.setattr(PPlugTrainer, "compute_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            run(settings, prompt_cache="1KB")
    return list((folder / ".pplug-prompts" / "0").glob("*.safetensors"))


def test_a_killed_training_leaves_its_prompts_to_the_next(settings, tmp_path, monkeypatch):
    plain = run(settings, output=str(tmp_path / "plain"))
    made, folder = caches_of(monkeypatch), tmp_path / "plug"
    files = kill(settings, folder, monkeypatch)
    assert files and len(files) == len(made[0]._files)
    files[0].write_bytes(files[0].read_bytes()[:-3])
    resumed = run(settings, prompt_cache="2KB")  # another budget is no other training
    for name in plain:
        close(resumed[name], plain[name])
    assert 0 < made[1].computed < made[0].computed
    assert not list(folder.glob(".pplug*"))


@pytest.mark.parametrize(
    "changes",
    [{"prompt_cache": "0"}, {"prompt_cache": "0", "resume": False}, {"gradient_checkpointing": True, "resume": False}],
)
def test_whichever_run_ends_leaves_no_prompts(changes, settings, tmp_path, monkeypatch):
    """Those of a killed run, those of more processes, and without a cache of its own, too."""
    folder = tmp_path / "plug"
    assert kill(settings, folder, monkeypatch)
    (folder / ".pplug-prompts" / "1").mkdir()
    (folder / ".pplug-prompts" / "1" / "prompt.safetensors").touch()
    run(settings, **changes)
    assert (folder / "model.safetensors").exists() and not list(folder.glob(".pplug*"))


def test_a_size_that_is_none(settings, tmp_path):
    with pytest.raises(ConfigurationError, match="'much'"):
        run(settings, prompt_cache="much")
    assert not (tmp_path / "plug").exists()


# ---- the pipeline -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_pipeline_reads_a_prompt_once_for_all_users(family):
    pipe = pipeline("personalized-text-generation", model=plug_on(family))
    cache = PromptCache()
    options = {"max_new_tokens": 5, "do_sample": False}
    for history in tiny.HISTORIES:
        for one in (options, options | {"num_beams": 2}):
            expected = pipe(tiny.PROMPTS[0], persona=history, **one)
            assert pipe(tiny.PROMPTS[0], persona=history, prompt_cache=cache, **one) == expected
    asked = {"persona": tiny.HISTORIES, "batch_size": 3, **options}
    assert pipe(tiny.PROMPTS, prompt_cache=cache, **asked) == pipe(tiny.PROMPTS, **asked)
    assert len(cache) == 3
    made_once = pipeline("personalized-text-generation", model=pipe.model, prompt_cache=cache)
    read = cache.computed
    assert made_once(tiny.PROMPTS, **asked) == pipe(tiny.PROMPTS, **asked) and cache.computed == read


def test_a_chat_goes_on_where_it_was():
    pipe = pipeline("personalized-text-generation", model=plug_on("llama"))
    cache, chat, read = PromptCache(), [], 0
    for text in tiny.PROMPTS:
        chat = [*chat, {"role": "user", "content": text}]
        options = {"persona": tiny.HISTORY, "max_new_tokens": 4, "do_sample": False}
        expected = pipe(chat, **options)
        assert pipe(chat, prompt_cache=cache, **options) == expected
        chat = expected[0]["generated_text"]
        assert cache.computed - read < 20
        read = cache.computed
    with torch.no_grad():
        ids = pipe.processor.apply_chat_template(chat[:-1], add_generation_prompt=True)
    assert read == ids["persona_position"].item()


def test_only_a_cpu_has_a_cache_that_nobody_asked_for():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert memory_for_prompts("auto", cpu) == memory_for_prompts("4GB", gpu) == 4 * 10**9
    assert memory_for_prompts("auto", gpu) == memory_for_prompts("0", cpu) == 0
