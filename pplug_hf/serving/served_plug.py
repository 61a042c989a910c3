"""`ServedPlug`: what an engine asks a plug with, which is the plug's own: its tokenizer, chat template and end tokens."""

from __future__ import annotations

import copy

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..modeling import PPlugForConditionalGeneration
from ..processing import PPlugProcessor


class ServedPlug:
    """A plug of a model, ready to be asked.

    Args:
        model: with the plug.
        name: of the plug.
        tokenizer: for a plug that has none of its own.
    """

    def __init__(self, model: PPlugForConditionalGeneration, name: str, tokenizer: PreTrainedTokenizerBase):
        plug = model._loaded(name)
        self.processor = PPlugProcessor.from_config(plug.personalizer.config, plug.tokenizer or tokenizer)
        self.settings: GenerationConfig = copy.deepcopy(plug.generation_config)
        self.settings.update(do_sample=False, num_beams=1, temperature=1.0, top_p=1.0, top_k=50)
        ends = self.settings.eos_token_id
        self.ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
        if self.settings.pad_token_id is None:
            self.settings.pad_token_id = self.fill
        defaults = (model.generation_config, model.backbone.generation_config)  # of what the settings leave open
        self.forces_end = any(
            getattr(each, "forced_eos_token_id", None) is not None for each in (self.settings, *defaults)
        )

    @property
    def fill(self) -> int:
        """The token that pads shorter prompts, which no model reads."""
        pad = self.processor.tokenizer.pad_token_id
        return pad if pad is not None else next(iter(self.ends), 0)

    def decode(self, tokens: list[int]) -> str:
        """Return the text of an answer."""
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
