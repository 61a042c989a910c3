"""Models of real size with random weights, and made-up data with the lengths of LaMP. Nothing is downloaded.

Histories: log-normal, median 90 items, at most 1,000 (512 in training, as in the paper). Prompts: 30 to 250 tokens.
Answers: 5 to 30 tokens.
"""

import itertools
import random
import string
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from pplug_hf import Persona, PPlugForConditionalGeneration

MAX_PROMPT, MAX_ANSWER, MAX_HISTORY = 256, 32, 512
VOCABULARY = 32_000
SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")
PAD, EOS, BOS, UNK = range(4)
LETTERS = string.ascii_lowercase[:24]  # whose runs of up to three, twice, fit the vocabulary


def t5_small(**changes: Any) -> T5ForConditionalGeneration:
    """The shape of t5-small: 60M parameters."""
    shape = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8} | changes
    config = T5Config(vocab_size=VOCABULARY, pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD, **shape)
    return T5ForConditionalGeneration(config).eval()


def llama_60m(**changes: Any) -> LlamaForCausalLM:
    """Llama's architecture with 58M parameters, 33M of them in the two embedding tables."""
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8} | changes
    config = LlamaConfig(
        vocab_size=VOCABULARY, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS, tie_word_embeddings=False, **shape
    )
    return LlamaForCausalLM(config).eval()


BACKBONES = {"t5": t5_small, "llama": llama_60m}


def built(make: Callable[[], PreTrainedModel], dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """On the device and in its dtype from the start, so that the CPU's memory never holds a large model."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return make()
    finally:
        torch.set_default_dtype(default)


def bert_encoder(layers: int = 12, width: int = 768) -> SentenceTransformer:
    """A sentence encoder of BERT's architecture; 12 layers of 768 are the shape of bge-base."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        pad_token_id=PAD,
    )
    with tempfile.TemporaryDirectory() as folder:
        BertModel(config).save_pretrained(folder)
        tokenizer(bos=True, eos=True).save_pretrained(folder)
        modules = [Transformer(folder, max_seq_length=512), Pooling(width, pooling_mode="cls"), Normalize()]
        encoder = SentenceTransformer(modules=modules, device="cpu")
    encoder[0].auto_model.config.name_or_path = ""  # the folder is gone
    return encoder.eval()


def tokenizer(bos: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """A word-piece tokenizer whose pieces are runs of one to three letters: a word of six letters is two tokens."""
    runs = ["".join(run) for n in (1, 2, 3) for run in itertools.product(LETTERS, repeat=n)]
    pieces = [*SPECIAL, *runs, *("##" + run for run in runs)]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    template = " ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos)
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    names |= {"cls_token": "<s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, **names, model_input_names=["input_ids", "attention_mask"], model_max_length=512
    )


def personalised(backbone: str | PreTrainedModel, encoder: SentenceTransformer | None = None, **choices: Any) -> Any:
    """A plug whose every weight matters, on a backbone by name (t5, llama) or a finished one.

    Without an encoder a narrow one stands in, for figures that never encode a text; vectors are 768 wide either way.
    """
    model: PreTrainedModel = BACKBONES[backbone]() if isinstance(backbone, str) else backbone
    own = tokenizer(bos=not model.config.is_encoder_decoder, eos=model.config.is_encoder_decoder)
    paper = {"placement": "prompt", "num_persona_tokens": 1, "projector_size": None, "learn_temperature": False}
    choices = {**paper, "attention_temperature": 0.1, "train_input_encoder": False, "output_init": 0.5, **choices}
    made = PPlugForConditionalGeneration.from_backbone(
        model, encoder or bert_encoder(layers=1), tokenizer=own, **choices
    )
    return made


def lengths(n: int, rng: np.random.Generator, longest: int = 1000) -> list[int]:
    """Items of n histories."""
    return np.exp(rng.normal(np.log(90), 0.8, n)).astype(int).clip(1, longest).tolist()


def text(tokens: int, rng: random.Random) -> str:
    """Made-up words of six letters that are `tokens` tokens together, to within one."""
    return " ".join("".join(rng.choices(LETTERS, k=6)) for _ in range(max(1, tokens // 2)))


def items(n: int, seed: int = 0, width: int = 768) -> torch.Tensor:
    """[n, width] unit vectors, as an encoder would give them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, width, generator=generator), dim=-1)


def persona(model: PPlugForConditionalGeneration, n: int, seed: int = 0) -> Persona:
    """A user with n items that are encoded already."""
    return Persona(items(n, seed, model.config.sizes[0]), model.personalizer.spec)
