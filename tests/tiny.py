"""Tiny models with random weights, the same in every run: language models, a sentence encoder, a plug on top."""

import functools
import json
import tempfile

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from pplug_hf import PPlugConfig, PPlugForConditionalGeneration

FAMILIES = ("t5", "flan-t5", "bart", "gpt2", "llama", "qwen3")
CAUSAL = ("gpt2", "llama", "qwen3")
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<system>", "<user>", "<bot>")
PAD, EOS, BOS, UNK = range(4)
WORDS = (  # noqa: SIM905
    "a about all and best bird blue book cat city cold dark day dog dream end film fire fish for garden good great "
    "green home i in is it like long love moon my new night of old on rain red river sea short sky snow song star "
    "story summer sun the tree two war warm what winter with write"
).split()
VOCABULARY = (*SPECIAL, *WORDS)

# The paper's choices of a plug.
PAPER = {
    "placement": "prompt",
    "num_persona_tokens": 1,
    "projector_size": None,
    "attention_temperature": 1.0,
    "learn_temperature": False,
    "train_input_encoder": True,
}

HISTORY = ["a dark film about the sea", "the best book of the summer", "i like rain", "my dog and the moon"]
HISTORIES = [HISTORY, HISTORY[2:3], []]  # of three users, one of whom is new
PROMPTS = ["write a story about the night sky", "what is a good film", "the"]
ANSWERS = ["the moon is cold", "a film of war and snow and love", "sea"]

_SMALL = {"vocab_size": len(VOCABULARY), "pad_token_id": PAD, "eos_token_id": EOS}
_DECODER = _SMALL | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attention_dropout": 0.2,
    "max_position_embeddings": 128,
}
_T5 = _SMALL | {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.2,
    "decoder_start_token_id": 0,
}


def _flan_t5():
    """An output layer of its own, as transformers leaves it after loading: of FlanT5's configuration it ties both."""
    model = T5ForConditionalGeneration(T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.all_tied_weights_keys.pop("lm_head.weight", None)
    return model


_BACKBONES = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**_T5)),
    "flan-t5": _flan_t5,
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            **_SMALL,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            encoder_layerdrop=0.2,
            attention_dropout=0.2,
            max_position_embeddings=128,
            bos_token_id=BOS,
            decoder_start_token_id=EOS,
            forced_eos_token_id=None,
            scale_embedding=True,
            tie_word_embeddings=False,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**_SMALL, bos_token_id=EOS, n_embd=16, n_layer=2, n_head=2, n_positions=128, resid_pdrop=0.2)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_DECODER, bos_token_id=BOS)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_DECODER, bos_token_id=None, head_dim=8)),
}


def backbone(family="gpt2", seed=0):
    """A language model in eval mode whose answers depend on every word: weights far larger than a fresh model's."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        language_model = _BACKBONES[family]()
        for parameter in language_model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        language_model.tie_weights(recompute_mapping=False)
    return language_model.eval()


# What each family's tokenizer adds by itself.
_ADDED = {
    "t5": "$A <eos>",
    "flan-t5": "$A <eos>",
    "bart": "<bos> $A <eos>",
    "llama": "<bos> $A",
    "encoder": "<bos> $A <eos>",
}


def tokenizer(family="gpt2"):
    """One token per word."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if family in _ADDED:
        words.post_processor = processors.TemplateProcessing(
            single=_ADDED[family], special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
        )
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    special |= {"model_input_names": ["input_ids", "attention_mask"]}
    if family in ("bart", "llama", "encoder"):
        special |= {"bos_token": "<bos>", "cls_token": "<bos>", "sep_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def gguf(path, architecture="llama", seed=0, words=True):
    """Write a language model of two layers, most of its weights in 8 bits, with its tokenizer into a file.

    Returns the weights as they are in the file.
    """
    from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "<bos>", "<eos>"], show_progress=False)
    bpe.train_from_iterator([" ".join(WORDS)] * 2, trainer)
    bpe = json.loads(bpe.to_str())["model"]
    size = len(bpe["vocab"])
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"q": 2, "k": 1}
    config = LlamaConfig(vocab_size=size, **shape, num_attention_heads=heads["q"], num_key_value_heads=heads["k"])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = {name: torch.randn(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, 2)
    file = GGUFWriter(path, architecture)
    file.add_name("tiny")
    file.add_vocab_size(size)
    file.add_context_length(128)
    file.add_embedding_length(32)
    file.add_feed_forward_length(64)
    file.add_block_count(2)
    file.add_head_count(heads["q"])
    file.add_head_count_kv(heads["k"])
    file.add_layer_norm_rms_eps(1e-6)
    if words:
        file.add_tokenizer_model("gpt2")
        file.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
        file.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
        file.add_bos_token_id(1)
        file.add_eos_token_id(2)
        file.add_unk_token_id(0)
    for name, tensor in state.items():
        weights = tensor.numpy()
        if tensor.ndim > 1:
            weights = quants.quantize(weights, GGMLQuantizationType.Q8_0)
            state[name] = torch.from_numpy(quants.dequantize(weights, GGMLQuantizationType.Q8_0))
        if (kind := name.split(".")[-2][0]) in heads and "attn" in name:  # llama.cpp turns pairs of neighbours
            rows = heads[kind]
            weights = weights.reshape(rows, 2, len(weights) // rows // 2, -1).swapaxes(1, 2).reshape(weights.shape)
        file.add_tensor(
            names.get_name(name.removesuffix(".weight")) + ".weight",
            weights,
            raw_dtype=GGMLQuantizationType.Q8_0 if tensor.ndim > 1 else None,
        )
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return state


def encoder(pooling="cls", normalize=True, dense=None, width=12, seed=0, include_prompt=True, **kwargs):
    """A sentence encoder with dropout, in eval mode. `dense` is the width of a head behind the pooling."""
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        bert = BertModel(
            BertConfig(
                vocab_size=len(VOCABULARY),
                hidden_size=width,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=16,
                max_position_embeddings=64,
                initializer_range=0.3,
                pad_token_id=PAD,
            )
        )
        bert.save_pretrained(folder)
        tokenizer("encoder").save_pretrained(folder)
        modules = [Transformer(folder), Pooling(width, pooling_mode=pooling, include_prompt=include_prompt)]
        if dense is not None:
            modules.append(Dense(width, dense))
        if normalize:
            modules.append(Normalize())
        sentence_encoder = SentenceTransformer(modules=modules, device="cpu", **kwargs)
    modules[0].auto_model.config.name_or_path = ""  # the folder is gone
    return sentence_encoder.eval()


@functools.cache
def shared_encoder():
    """One for all models that do not change it: a plug freezes it and copies it, nothing else."""
    return encoder()


def config(**fields):
    """A configuration with the paper's choices, where others are not given."""
    return PPlugConfig(**(PAPER | fields))


def from_backbone(*args, **choices):
    """A new plug with the paper's choices, where others are not given."""
    return PPlugForConditionalGeneration.from_backbone(*args, **(PAPER | choices))


def model(family="gpt2", seed=0, **choices):
    """A plug whose every weight is random and matters, on a frozen backbone; with the paper's choices as in `from_backbone`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        language_model = from_backbone(backbone(family), shared_encoder(), tokenizer=tokenizer(family), **choices)
    randomise(language_model.plug, seed)
    return language_model


@torch.no_grad()
def randomise(plug, seed=0):
    """Give a plug weights as training might leave them: nothing is zero, and the two encoders are no longer equal."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(plug.named_parameters()):
        spread = 0.05 if name.startswith("input_encoder") else 0.5
        parameter += spread * torch.randn(parameter.shape, generator=generator)


def vectors(n, width=12, seed=0):
    """[n, width] random item vectors."""
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
