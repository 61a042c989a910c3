"""A private soft prompt of one user at a time: its tokens are trained, instead of computed from a history by a plug.

B batch, P soft tokens, H backbone width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..configuration import PPlugConfig
from ..modeling import PPlugForConditionalGeneration
from ..modeling.backbone_check import check_backbone
from ..modeling.plug import SoftPrompt
from ..modeling.prefix import position_limit
from ..processing import PPlugProcessor
from .decoding import Answers, ModelInputs
from .private_weights import PrivateWeights, check_state
from .resources import Resources

PROMPT = "prompt"  # name of the tensor


class PrivatePrompt(PrivateWeights):
    """A soft prompt on a language model, in the place where a plug had its own.

    Args:
        language_model: frozen.
        tokenizer: of the language model.
        plug: fields of the plug's configuration that say where the soft prompt stands and how prompts are written, see
            `of_plug`.
        shape: [P, H] of the soft prompt.
    """

    file = "prompt.safetensors"

    def __init__(
        self,
        language_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        plug: Mapping[str, Any],
        shape: Sequence[int],
    ):
        P, H = shape
        config = PPlugConfig(
            **plug,
            is_encoder_decoder=bool(language_model.config.is_encoder_decoder),
            hidden_size=H,
            encoder_size=1,  # there is none
            projector_size=1,
            num_persona_tokens=P,
        )
        self.model = _PromptModel(config, language_model, tokenizer)
        self.processor = PPlugProcessor.from_model(self.model)

    @staticmethod
    def of_plug(config: PPlugConfig) -> dict[str, object]:
        """Return the fields of a plug's configuration that its soft prompt needs without it."""
        return {name: getattr(config, name) for name in ("placement", "chat", "system", "embedding_norm")}

    def __enter__(self) -> PrivatePrompt:
        self.model.prompt.requires_grad_(True)
        return self

    def __exit__(self, *error: object) -> None:
        self.model.prompt.requires_grad_(False)

    @torch.no_grad()
    def reset(self, seed: int, start: Mapping[str, Tensor] | None = None) -> None:
        if start is not None:
            return self.load(start)
        self.model.prompt.zero_()
        return None

    def parameters(self) -> list[nn.Parameter]:
        return [self.model.prompt]

    def state(self) -> dict[str, Tensor]:
        return {PROMPT: (self.model.prompt.detach() * self.model.scale).cpu().clone()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        check_state(state, {PROMPT: self.model.prompt})
        self.model.prompt.copy_(state[PROMPT] / self.model.scale)

    def loss(self, prompts: Sequence[str], answers: Sequence[str], max_length: int, max_answer_length: int) -> Tensor:
        batch = self.processor(
            text=prompts, persona=None, labels=answers, max_length=max_length, max_target_length=max_answer_length
        ).to(device=self.model.prompt.device)
        return self.model(**batch).loss

    def generate(self, inputs: ModelInputs, resources: Resources) -> Answers:
        return resources.generate(inputs, self.model, description="")

    def training(self, mode: bool) -> None:
        self.model.train(mode)


class _PromptModel(PPlugForConditionalGeneration):
    """A plug's model whose soft prompt is the same for all rows.

    The prompt is in units of the root mean square component of a token embedding, as a plug's weights are: then a learning
    rate means the same for every language model.
    """

    def __init__(self, config: PPlugConfig, language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__(config)
        self._reading = check_backbone(language_model)
        self.backbone, self._position_limit = language_model, position_limit(language_model)
        self.tokenizer, self.generation_config = tokenizer, language_model.generation_config
        self.prompt = nn.Parameter(torch.zeros(config.sizes[3], config.sizes[2]))  # [P, H]
        self.scale = config.scale
        self.eval().to(language_model.device)

    def _personalizer(self, name: str | None = None) -> Any:
        return self._of_batch

    def _of_batch(self, users: Sequence[object], *rest: object) -> SoftPrompt:
        """Return the soft prompt for each row of a batch, in the place of what a plug computes."""
        embeddings = (self.scale * self.prompt).expand(len(users), -1, -1)
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        return SoftPrompt(embeddings, mask, mask.new_full((len(mask),), self.config.placement == "answer").bool())
