"""Training a plug with the Trainer of transformers: only the plug learns, and only the plug is saved."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, run_as_future
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices
from transformers.trainer_utils import HubStrategy

from .data.dataset import PersonaDataset
from .errors import ConfigurationError, DataError, HubError, kind_of
from .modeling import PPlugForConditionalGeneration
from .modeling import backbone as backbones
from .modeling.prompt_cache import PromptCache
from .processing import PPlugProcessor
from .storage.files import write_text
from .storage.layout import TRAIN_SETTINGS

logger = logging.getLogger(__name__)

# Keys of a batch that generation alone needs: a causal model's prompts without their answers.
_PROMPT = "prompt_"
_READ = ("input_ids", "attention_mask", "persona_position")
_SOME = 32  # prompts that tell what all of them begin with
# The arguments that determine the weights. The others hold paths and names of this machine.
_SETTINGS = {
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("encoder_learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "max_grad_norm", "bf16", "fp16"),
    *("load_best_model_at_end", "metric_for_best_model", "seed", "data_seed"),
}


@dataclass
class PPlugCollator:
    """Rows of a `PersonaDataset` (`text`, `query`, `target`, `persona`) to one batch.

    Queries are texts, and a row without one has its text weight the history; or every row has a vector [D]: a tensor,
    an array or a list.

    Args:
        processor: of the model.
        max_length: tokens of a prompt at most.
        max_target_length: tokens of an answer at most.
    """

    processor: PPlugProcessor
    max_length: int | None = 256
    max_target_length: int | None = 128

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate one batch.

        Args:
            rows: B of them.

        Returns:
            What [`PPlugProcessor`] gives for them; for a causal model also the prompts without answers, from which
            `predict_with_generate` answers.

        Raises:
            DataError: a row without a text, vectors for queries of some rows alone or of several widths, or something
                that [`PPlugProcessor`] refuses.
        """
        if any("text" not in row for row in rows):
            raise DataError(
                f"A row needs a 'text' (and 'target', 'persona', 'query'), got {sorted(map(str, rows[0]))}: name the columns "
                "so, and leave remove_unused_columns=False, as PPlugTrainingArguments do."
            )
        text = [row["text"] for row in rows]
        query: list[Any] = [row.get("query") for row in rows]
        target: list[Any] = [row.get("target") for row in rows]
        vectors = [q for q in query if q is not None and not isinstance(q, str)]
        if 0 < len(vectors) < len(rows):
            raise DataError(
                f"{len(vectors)} of {len(rows)} rows have a vector for a query, and the others a text or none: give "
                "all rows vectors, or none."
            )
        asked = [t if q is None else q for t, q in zip(text, query, strict=True)]
        batch = dict(
            self.processor(
                text=text,
                persona=[row.get("persona") for row in rows],
                query=asked if not vectors and any(one is not None for one in query) else None,
                labels=None if all(answer is None for answer in target) else target,  # withheld, as of a test split
                max_length=self.max_length,
                max_target_length=self.max_target_length,
            )
        )
        if vectors:
            batch["query"] = _stacked(vectors)
        if not self.processor.is_encoder_decoder:
            prompts = self.processor(text=text, persona=None, max_length=self.max_length)
            batch |= {_PROMPT + name: values for name, values in prompts.items()}
        return batch


def _stacked(vectors: list[Any]) -> Tensor:
    """Return vectors [D] of any kind as one tensor [B, D]."""
    try:
        made = [one if isinstance(one, Tensor) else torch.as_tensor(one, dtype=torch.float32) for one in vectors]
        return torch.stack(made)
    except (TypeError, ValueError, RuntimeError) as error:
        kinds = ", ".join(sorted({kind_of(one) for one in vectors}))
        raise DataError(
            f"The queries of a batch must be texts, or vectors of one width, got {kinds} that make no matrix."
        ) from error


@dataclass
class PPlugTrainingArguments(Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the few defaults and fields a plug needs."""

    learning_rate: float = field(default=1e-2, metadata={"help": "Learning rate of projector and instruction."})
    encoder_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of a trained input encoder (default: a twentieth of learning_rate)."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=True,
        metadata={
            "help": "Stays on: where nobody of a process's batch has a history, its input encoder is not asked."
        },
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Must stay off: rows hold texts and personas, which the collator turns into tensors."},
    )

    def __post_init__(self) -> None:
        # Several processes without accelerators would not know of each other, and each write the same folder.
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()


class _SetEpoch(TrainerCallback):
    """Set the epoch of the training data, which accelerate does not in a resumed epoch and with several processes."""

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: object = None,
        **kwargs: object,
    ) -> None:
        _set_epoch(getattr(train_dataloader, "dataset", None), int(state.epoch or 0))


def _set_epoch(data: Any, epoch: int) -> None:
    """Tell a data set its epoch, or those that it is a part of or made of, as torch's `Subset` and `ConcatDataset`."""
    if hasattr(data, "set_epoch"):
        data.set_epoch(epoch)
        return
    for inner in (*getattr(data, "datasets", ()), getattr(data, "dataset", None)):
        if inner is not None:
            _set_epoch(inner, epoch)


class _SimilarLengths(LengthGroupedSampler):
    """Batches of prompts of similar length; the order of an epoch follows from its number, also in a resumed run."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


# Arguments that could not do what they say.
_OTHER_LOSS = "A plug learns from the loss of its model, so {} has no effect: leave it out."
_NO_EFFECT = {
    "label_smoothing_factor": _OTHER_LOSS,
    "neftune_noise_alpha": "A plug learns on a backbone without noise, so {} has no effect: leave it out.",
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"),
        "{} would leave the plug in half precision, which trains and is saved in float32: leave it out, and load the "
        "backbone in half precision, with backbone_kwargs={{'dtype': 'bfloat16'}}.",
    ),
}


def _check_arguments(args: Seq2SeqTrainingArguments) -> None:
    """Raise a `ConfigurationError` for arguments that a plug cannot be trained with."""
    for name, message in _NO_EFFECT.items():
        if getattr(args, name):
            raise ConfigurationError(message.format(name))
    if args.push_to_hub and args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ConfigurationError(
            f"hub_strategy is {args.hub_strategy.value!r}, and only plugs are pushed, not the state of a training, "
            "which is pickled and names folders of this machine: use 'every_save' or 'end'."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and args.world_size == 1:
        raise ConfigurationError(
            f"Of {os.environ['WORLD_SIZE']} processes without accelerators, these arguments know one, and each would "
            "write the same folder: use PPlugTrainingArguments, or pass use_cpu=True."
        )


def check_encoder_rate(rate: float | None, trained: bool) -> None:
    """Raise a `ConfigurationError` for a learning rate of an input encoder that is not trained."""
    if rate is not None and not trained:
        raise ConfigurationError(
            f"encoder_learning_rate={rate} has no effect, because this plug trains no input encoder: leave it out (pass "
            "none if a recipe sets it), or make the plug with train_input_encoder=True."
        )


class PPlugTrainer(Seq2SeqTrainer):
    """`Seq2SeqTrainer` for a `PPlugForConditionalGeneration`.

    What it adds: the optimiser holds exactly the plug's parameters, the input encoder with its own learning rate;
    `predict_with_generate` answers with personas, for causal models from the prompt alone; checkpoints hold the plug
    and no pickled arguments; a `PersonaDataset` always knows its epoch; `train_sampling_strategy="group_by_length"`
    groups by the length of the prompts, which saves padding.

    Args:
        model, args: as of `Seq2SeqTrainer`; the arguments are `PPlugTrainingArguments`, or `Seq2SeqTrainingArguments`.
        data_collator: of batches (default: a [`PPlugCollator`] of `processing_class`, or of the model's processor).
        *others: as of `Seq2SeqTrainer`.
        prompt_cache: for plugs with `placement="answer"`: every prompt is read once, rather than in every step. For passes
            over a data set, make it with `evict=False`. It becomes the model's, and stays so; likewise of each that a
            `model_init` makes.
        **kwargs: as of `Seq2SeqTrainer`.

    Raises:
        ConfigurationError: other arguments, another loss than the model's, noisy embeddings, evaluation in half
            precision, pushes of checkpoints, several processes that do not know of each other, or a prompt cache for a
            soft prompt in front of the prompt.
    """

    model: PPlugForConditionalGeneration
    args: Any  # Seq2SeqTrainingArguments, which declare that there may be no output folder

    def __init__(
        self,
        model: Any = None,
        args: Seq2SeqTrainingArguments | None = None,
        data_collator: Any = None,
        *others: Any,
        prompt_cache: PromptCache | None = None,
        **kwargs: Any,
    ):
        if not isinstance(args, Seq2SeqTrainingArguments):
            raise ConfigurationError(f"args must be PPlugTrainingArguments, got {kind_of(args)}.")
        _check_arguments(args)
        # One process uses one accelerator. On several, the Trainer would use nn.DataParallel, which divides tensors
        # among them but gives each all personas: start several processes instead.
        if args.n_gpu > 1:
            args._n_gpu = 1
        self._prompt_cache = prompt_cache
        super().__init__(model, args, data_collator, *others, **kwargs)
        if self.compute_loss_func is not None:
            raise ConfigurationError(_OTHER_LOSS.format("compute_loss_func"))
        if data_collator is None:  # the Trainer's own would take texts and personas for tensors
            given = self.processing_class if isinstance(self.processing_class, PPlugProcessor) else None
            self.data_collator = PPlugCollator(given or PPlugProcessor.from_model(self.model))
        if self.model_init is None:
            self._prepare_model(self.model)
        if prompt_cache is not None:
            self._share_beginning(prompt_cache)
        self.add_callback(_SetEpoch)

    def call_model_init(self, trial: Any = None) -> Any:
        """Make a model with `model_init`, as the Trainer does at first and for every training, ready to be trained."""
        model = super().call_model_init(trial)
        self._prepare_model(model)
        return model

    def _prepare_model(self, model: Any) -> None:
        if self._prompt_cache is not None:
            model.check_prompt_cache()
            model.prompt_cache = self._prompt_cache
        # Every process has loaded the frozen parts itself: sending them would take long, and quantised ones break.
        weights = [*model.named_parameters(), *model.named_buffers()]
        frozen = [name for name, _ in weights if not name.startswith("plug.")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            model.plug.sync_query_encoder = True

    def _share_beginning(self, cache: PromptCache) -> None:
        """Have a cache store what prompts of the training data begin with once."""
        data: Any = self.train_dataset
        if hasattr(data, "__len__") and len(data):
            batch = self.data_collator([data[i] for i in range(0, len(data), -(-len(data) // _SOME))])
            pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
            cache.share(ids[mask.bool()].tolist() for ids, mask in pairs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does, with the faster kind of attention where prompts are kept."""
        cached = self.model.prompt_cache is not None
        with backbones.training_attention(self.model.backbone) if cached else nullcontext():
            return super()._inner_training_loop(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the Trainer's optimiser, over the plug alone.

        Raises:
            ConfigurationError: nothing to train, something outside of the plug that would be trained, a learning rate
                for an input encoder that is frozen, or a quantised backbone that passes no gradient.
        """
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ConfigurationError(
                "No parameter of this model is trainable: the optimiser would be empty. Unfreeze the plug with "
                "model.plug.requires_grad_(True)."
            )
        if foreign := [name for name in trainable if not name.startswith("plug.")]:
            raise ConfigurationError(
                f"{len(foreign)} parameters outside of the plug are trainable (first {foreign[0]!r}): backbone and "
                "history encoder must stay frozen. Call model.backbone.requires_grad_(False)."
            )
        backbones.check_gradients(self.model.backbone)
        encoder = {id(p) for name, p in trainable.items() if name.startswith("plug.input_encoder.")}
        rate = getattr(self.args, "encoder_learning_rate", None)
        check_encoder_rate(rate, bool(encoder))
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and encoder:
            rate = self.args.learning_rate / 20 if rate is None else rate
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if id(p) in encoder]
                if own:
                    group["params"] = [p for p in group["params"] if id(p) not in encoder]
                    optimizer.add_param_group({**group, "params": own, "lr": rate})
        return optimizer

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        data = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(data, PersonaDataset):
            return super()._get_train_sampler(train_dataset)
        # The Trainer would look for token ids in the rows, which hold texts.
        # Of all processes together, so that several see what one would.
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        lengths = [len(data.examples[number].prompt) for number, _ in data.views]
        return _SimilarLengths(batch, lengths, seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        # The Trainer would group these too, and predictions would come in another order than the questions.
        return SequentialSampler(eval_dataset) if self.args.world_size == 1 else None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if inputs.get("labels") is None:
            raise DataError("These examples have no answers to learn from: their target is None.")
        inputs = {key: value for key, value in inputs.items() if not key.startswith(_PROMPT)}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Seq2SeqTrainer's own also keeps the rows that are repeated so that every process has a last batch.
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[float | None, Tensor | None, Tensor | None]:
        prompts = {key.removeprefix(_PROMPT): value for key, value in inputs.items() if key.startswith(_PROMPT)}
        inputs = {key: value for key, value in inputs.items() if not key.startswith(_PROMPT)}
        if not self.args.predict_with_generate or prediction_loss_only:
            whole = not prediction_loss_only and not self.model.config.is_encoder_decoder
            with self._without_cache() if whole else nullcontext():
                return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)

        loss = None
        if inputs.get("labels") is not None:
            loss, _, _ = super().prediction_step(model, inputs, prediction_loss_only=True, ignore_keys=ignore_keys)
        causal = not self.model.config.is_encoder_decoder
        if not causal:
            prompts = {key: inputs[key] for key in _READ if key in inputs}
        elif not prompts:
            raise ConfigurationError(
                "predict_with_generate on a causal model needs the prompts without answers: use PPlugCollator."
            )
        prompts = {key: value.to(self.args.device) for key, value in prompts.items()}
        options = {k: v for k, v in (gen_kwargs or getattr(self, "_gen_kwargs", {})).items() if v is not None}
        output = self.model.generate(**prompts, persona=inputs.get("persona"), query=inputs.get("query"), **options)
        generated = output if isinstance(output, Tensor) else output["sequences"]
        answers = generated[:, prompts["input_ids"].shape[1] :] if causal else generated
        return loss, answers.contiguous(), inputs.get("labels")  # the evaluation loop pads both with -100

    @contextmanager
    def _without_cache(self) -> Iterator[None]:
        """Let a causal model compute the logits of prompts, too, so that each stands beside its label."""
        cache, self.model.prompt_cache = self.model.prompt_cache, None
        try:
            yield
        finally:
            self.model.prompt_cache = cache

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save plug, processor and arguments; the Trainer's own method would pickle the arguments."""
        folder = Path(output_dir or self.args.output_dir)
        self.model.save_pretrained(folder, state_dict=state_dict, is_main_process=self.args.should_save)
        if self.args.should_save:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            arguments = self.args.to_dict()
            defaults = {f.name: f.default for f in fields(self.args) if f.name in _SETTINGS}
            settings = {"settings": {name: arguments[name] for name in defaults}, "defaults": defaults}
            for name, content in (("training_args.json", arguments), (TRAIN_SETTINGS, settings)):
                text = json.dumps(content, indent=2, sort_keys=True, default=str)
                write_text(folder / name, text + "\n")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:  # its own state would hold the backbone, too
            engine: Any = self.model_wrapped
            engine.save_checkpoint = partial(type(engine).save_checkpoint, engine, exclude_frozen_parameters=True)
        super()._save_optimizer_and_scheduler(output_dir)

    # ---- sharing -------------------------------------------------------------------------------------------

    def create_model_card(self, *, repo_id: str | None = None, **options: Any) -> None:  # type: ignore[override]
        """Write the card of the plug that is saved in the output folder, or bring it up to date.

        Args:
            repo_id: where the plug will be on the Hub.
            **options: for the card: results, license, datasets, language, tags; or those of the Trainer's own.

        Raises:
            ConfigurationError: an unknown option, or a name that the Hub does not take.
        """
        from .hub.cards import card_options, write_card

        options = card_options(options)
        if self.is_world_process_zero():
            write_card(self.args.output_dir, self.model.config, repo_id=repo_id, **options)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Save the plug and push it with its card. Nothing else of the output folder is uploaded.

        Args:
            commit_message, token, revision, private: as in the Trainer's own.
            blocking: wait for the end of it.
            **card: as of `create_model_card`.

        Returns:
            The commit, or the future of one.

        Raises:
            HubError: the Hub refuses, or the connection broke; the repository is as it was.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        push = self._push if blocking else partial(run_as_future, self._push)
        folder = self.args.output_dir
        return push(folder, commit_message, token=token, revision=revision, private=private, **card)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the plug of a checkpoint, but neither its optimiser nor the arguments, which the Trainer would pickle."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        try:
            self._push(checkpoint_folder, f"Training in progress, step {self.state.global_step}")
        except HubError as error:
            logger.warning("The training goes on without this push: %s", error)

    def _push(
        self, folder: str, commit_message: str | None, *, token: str | None = None, **options: Any
    ) -> CommitInfo:
        from .hub.push import push_folder

        args = self.args
        options["revision"] = options.get("revision") or args.hub_revision
        if options.get("private") is None:
            options["private"] = args.hub_private_repo
        repo_id = self.hub_model_id or args.hub_model_id or Path(args.output_dir).absolute().name
        return push_folder(folder, repo_id, commit_message=commit_message, token=token or args.hub_token, **options)
