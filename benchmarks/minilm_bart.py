"""A BART whose encoder is a real MiniLM, weight by weight, with a new decoder: the benchmarks' small language model.

model, tokenizer = minilm_bart(folder, encoder_layers=4, decoder_layers=2, dropout=0.2)
"""

import torch
from tokenizers import decoders
from transformers import AutoTokenizer, BartConfig, BertModel, PreTrainedTokenizerFast
from transformers import BartForConditionalGeneration as Bart
from transformers import PreTrainedTokenizerBase as Tokenizer

from pplug_hf.tasks.task import TASKS


def minilm_bart(folder: str, encoder_layers: int, decoder_layers: int, dropout: float) -> tuple[Bart, Tokenizer]:
    """The model, untrained but for its encoder and embeddings, and its tokenizer.

    Args:
        folder: of a BERT and its tokenizer.
        encoder_layers: of its layers, from the bottom.
        decoder_layers: new ones.
        dropout: in training.
    """
    tokenizer = bert_tokenizer(folder)
    bert = BertModel.from_pretrained(folder, add_pooling_layer=False)
    bert.encoder.layer = bert.encoder.layer[:encoder_layers]
    bert.config.num_hidden_layers = len(bert.encoder.layer)
    model = bart_from_bert(bert, tokenizer, decoder_layers, dropout)
    assert_same_encoder(model, bert, tokenizer)
    return model, tokenizer


def bart_from_bert(bert: BertModel, tokenizer: Tokenizer, decoder_layers: int, dropout: float) -> Bart:
    """A BART whose encoder computes what `bert` computes (both are post-LN); the decoder layers are new."""
    c = bert.config
    config = BartConfig(
        vocab_size=c.vocab_size,
        d_model=c.hidden_size,
        encoder_layers=c.num_hidden_layers,
        encoder_attention_heads=c.num_attention_heads,
        encoder_ffn_dim=c.intermediate_size,
        decoder_layers=decoder_layers,
        decoder_attention_heads=c.num_attention_heads,
        decoder_ffn_dim=c.intermediate_size,
        max_position_embeddings=c.max_position_embeddings,
        activation_function=c.hidden_act,
        dropout=dropout,
        attention_dropout=0.0,  # with it the attention takes a path three times as slow on a CPU
        activation_dropout=0.0,
        scale_embedding=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
        forced_bos_token_id=None,
        forced_eos_token_id=None,
    )
    model = Bart(config)
    encoder, decoder, embeddings = model.model.encoder, model.model.decoder, bert.embeddings
    with torch.no_grad():
        model.model.shared.weight.copy_(embeddings.word_embeddings.weight)
        # BART keeps two unused rows in front. All tokens are of type 0, so that type's vector is a constant.
        positions = embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]
        for half in (encoder, decoder):  # the decoder reads the same words: it starts with the same scale
            half.embed_positions.weight[2:].copy_(positions)
            half.layernorm_embedding.load_state_dict(embeddings.LayerNorm.state_dict())
        for new, old in zip(encoder.layers, bert.encoder.layer, strict=True):
            for target, source in (
                (new.self_attn.q_proj, old.attention.self.query),
                (new.self_attn.k_proj, old.attention.self.key),
                (new.self_attn.v_proj, old.attention.self.value),
                (new.self_attn.out_proj, old.attention.output.dense),
                (new.self_attn_layer_norm, old.attention.output.LayerNorm),
                (new.fc1, old.intermediate.dense),
                (new.fc2, old.output.dense),
                (new.final_layer_norm, old.output.LayerNorm),
            ):
                target.load_state_dict(source.state_dict())
    return model


@torch.no_grad()
def assert_same_encoder(model: Bart, bert: BertModel, tokenizer: Tokenizer) -> float:
    """Largest difference of the outputs on padded text: layer norms add 1e-5 here and 1e-12 in BERT."""
    texts = [
        "A quiet film about rain.",
        "Generate a headline for the following article: " + "the storm came back " * 30,
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    model.eval(), bert.eval()
    ours = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    theirs = bert(input_ids=ids, attention_mask=mask).last_hidden_state
    difference = (ours - theirs)[mask.bool()].abs().max().item()
    assert difference < 2e-3, f"the encoder is not BERT's: outputs differ by {difference:.2g}"
    return difference


def bert_tokenizer(folder: str) -> Tokenizer:
    """BERT's tokenizer with BART's token names, whose decoding gives back "sci-fi" and "[1]", not "sci - fi" and "[ 1 ]".

    `BertTokenizer` makes a new decoder whenever it is loaded, so the class has to be the general one.
    """
    backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    glued = [decoders.Replace(apart, sign) for apart, sign in ((" - ", "-"), ("[ ", "["), (" ]", "]"))]
    backend.decoder = decoders.Sequence([decoders.WordPiece(), decoders.Fuse(), *glued])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="[CLS]",
        eos_token="[SEP]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )
    for label in (label for task in TASKS.values() for label in task.labels):
        text = tokenizer.decode(tokenizer(label)["input_ids"], skip_special_tokens=True)
        assert text == label, f"the label {label!r} is decoded as {text!r}: no answer could be right"
    return tokenizer
