"""Every family of language models that transformers lists, built tiny, and a verdict on a plug for it.

The families come from the library's own lists and their sizes from rules, so that a new release shows its new ones.
"""

import copy
import re
import warnings

import tiny
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto import modeling_auto

from pplug_hf.errors import PPlugError
from pplug_hf.modeling.backbone import state_norm
from pplug_hf.modeling.prefix import word_embeddings

V = len(tiny.VOCABULARY)
LARGEST = 3_000_000  # weights; what stays larger by the rules is not judged

# Names of sizes, and what they become. The first that matches counts.
RULES = [
    (r"vocab_size|num_embeddings$", V),
    (r"rotary_dim", 4),
    (r"attention_interval|attn_layer_period|layer_group_size|sliding_window_pattern", 2),
    (r"attn_layer_offset|expert_layer_offset", 1),
    (r"(key_value|kv|k_v)_heads|multi_query_group_num", 2),
    (r"heads_per_ngram", 2),
    (r"heads?$|n_head|mamba_n_heads|num_heads", 2),
    (r"head_dim|head_size|kv_channels|d_kv|attention_head_dim|d_head", 8),
    (r"layers_per_|num_layers_per_stack", 1),
    (r"layers$|n_layer$|num_blocks$|num_hidden_layers", 2),
    (r"hidden_size_per_layer_input", 4),
    (r"shared_layers", 0),
    (
        r"^(attention_)?hidden_size$|d_model|n_embd|^dim$|embedding_size|dim_model|word_embed_proj_dim|lru_width|embed_dim",
        16,
    ),
    (r"intermediate_size|ffn_dim|ffn_hidden|d_ff|dff|dim_ff|n_inner|feed_forward_size|mlp_dim|ff_dim", 24),
    (r"max_.*position|n_positions|n_ctx|context_length|max_seq|seq_length|max_source|max_target", 128),
    (r"index_topk", 64),  # all tokens: of fewer, rounding may choose others
    (r"experts_per_tok|top_?k$|moe_k$", 2),
    (r"topk_group|n_group", 1),
    (r"num_(local_|shared_)?experts|n_routed_experts|moe_num_experts|n_shared_experts", 4),
    (r"_rank$", 8),
    (r"state_size|d_state|ssm_state", 8),
    (r"sliding_window$|attention_window|local_attention|chunk_size", 8),
    (r"image_size", 8),
    (r"patch_size", 4),
]


def families():
    """Return (model type, kind) of all that transformers lists as causal or encoder-decoder language models."""
    causal, seq2seq = (
        getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES") for kind in ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")
    )
    return [(name, "causal") for name in causal] + [(name, "encoder-decoder") for name in seq2seq]


def sizes(cls, **more):
    """Return the arguments of a configuration class for a model of a few thousand weights."""
    default = cls().to_dict()
    small, specials = {}, iter(range(4, 40))
    for name, value in default.items():
        sub = cls.sub_configs.get(name)
        if sub is not None and isinstance(value, dict):
            sub = CONFIG_MAPPING[value["model_type"]] if sub.__name__ == "AutoConfig" else sub
            small[name] = sizes(sub, **SETTINGS.get(sub.model_type, {})) | (
                {"model_type": value["model_type"]} if "model_type" in value else {}
            )
        elif name in ("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id"):
            small[name] = {"p": tiny.PAD, "e": tiny.EOS, "b": tiny.BOS, "d": tiny.EOS}[name[0]]
        elif re.search(r"token_(id|index)$", name) and isinstance(value, int) and value >= V:
            small[name] = next(specials)
        elif isinstance(value, float) and re.search("drop|jitter|noise", name):
            small[name] = 0.2  # freezing has to silence them
        elif isinstance(value, int) and not isinstance(value, bool):
            new = next((new for rule, new in RULES if re.search(rule, name)), value)
            small[name] = min(value, new) if value > 0 else value
    return small | more


def backbone(model_type, kind):
    """Return a tiny model in eval mode whose answers depend on every word."""
    cls = CONFIG_MAPPING[model_type]
    config = cls(**sizes(cls, **SETTINGS.get(model_type, {})))
    if kind == "causal" and getattr(config, "is_encoder_decoder", False):
        config.is_encoder_decoder = False  # the decoder alone
    if kind == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    if kind == "encoder-decoder" and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = tiny.PAD
    config.forced_eos_token_id = None
    auto = AutoModelForSeq2SeqLM if kind == "encoder-decoder" else AutoModelForCausalLM
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"has {size:,} weights")
    torch.manual_seed(0)
    model = auto.from_config(config).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and not any(s in name.lower() for s in ("a_log", "conv", "position", "router", "rotary")):
                torch.nn.init.normal_(p, std=0.3)
            elif p.ndim == 1 and "scale" in name and not p.any():
                p.fill_(1.0)  # switches off what Gemma 3n adds to every layer
    model.tie_weights()
    return model.eval()


# What the rules leave inconsistent.
SETTINGS: dict = {
    **{name: {"scale_embedding": True} for name in ("pegasus", "marian", "mbart", "m2m_100", "bart")},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2, "n_routed_experts": 4, "qk_rope_head_dim": 8},
    "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 1},
    "gemma3n_text": {
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
    },
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32, "mamba_n_groups": 1},
    **{
        name: {"layer_types": ["linear_attention", "full_attention"]}
        for name in ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp_text", "kimi_linear")
    },
    "diffllama": {"attention_dropout": 0.0},
    "ministral": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "xmod": {"default_language": "en_XX"},
    "xlnet": {"n_head": 2, "d_head": 8, "d_model": 16, "d_inner": 24},
    "xlm": {"emb_dim": 16, "n_heads": 2, "max_position_embeddings": 128, "causal": True},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8, "qk_head_dim": 16},
}


def verdict(model_type, kind):
    """Return "works" (perhaps with a condition), "refused: ..." or "not judged: ..."; raise if an answer is wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            bare = backbone(model_type, kind)
            ids = torch.tensor([[20, 21, 22, 23, 24, 25]] * 2)
            with torch.no_grad():
                bare(input_ids=ids, **({"decoder_input_ids": ids} if bare.config.is_encoder_decoder else {}))
        except Exception as error:
            return f"not judged: {type(error).__name__}: {next(iter(str(error).splitlines()), '')[:80]}"
        try:
            model = tiny.from_backbone(
                copy.deepcopy(bare),
                tiny.shared_encoder(),
                tokenizer=tiny.tokenizer("llama"),
                train_input_encoder=False,
            )
        except PPlugError as error:
            return f"refused: {str(error).partition('soft prompt: ')[2].partition('. Choose')[0]}"
        return works(model, bare, model_type, seq2seq=bool(bare.config.is_encoder_decoder))


@torch.no_grad()
def works(model, bare, model_type, seq2seq):
    """Check the answers of a model against its bare backbone's; return the conditions that it works under."""
    tiny.randomise(model.plug)
    ids = torch.tensor([[20, 21, 22, 23, 24], [30, 31, 32, 33, 34]])
    ones = torch.ones_like(ids)
    inner = {"decoder_input_ids": ids[:, :3]} if seq2seq else {}
    position = {} if seq2seq else {"position_ids": ones.cumsum(1) - 1}

    own = bare(input_ids=ids, attention_mask=ones, **inner, **position).logits
    near(model(ids, plug=[None] * 2, **inner).logits, own, "a row without a plug is not the bare backbone's")
    frozen = model.backbone(input_ids=ids, attention_mask=ones, **inner, **position).logits
    training = model.train().backbone(input_ids=ids, attention_mask=ones, **inner, **position).logits
    assert torch.equal(training, frozen), "training mode changes the answers"
    # Not bit for bit: a contiguous input of the output layer may take another matrix kernel, on some processors.
    error = (frozen - own).abs().max()
    assert error < 1e-5, f"freezing changes the answers ({error:.1e})"
    model.eval()
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 1}
    got = model.generate(ids, plug=[None] * 2, **options)
    same = torch.equal(got, bare.generate(ids, attention_mask=ones, **options))
    assert same, "without a plug, it generates other tokens than the bare backbone"

    asked = {"persona": [tiny.HISTORY] * 2, "query": ["sea"] * 2}
    labels = ids[:, 1:3] if seq2seq else torch.cat([torch.full_like(ids[:, :2], -100), ids[:, 2:]], dim=1)
    batch = {"input_ids": ids, "labels": labels, **asked}
    quiet = model(**batch).loss
    near(model.train()(**batch).loss, quiet, "training mode is noisy")
    model.eval()

    side = torch.zeros_like(ids[:, :2])
    parts = [(ids, side), (ones, side)] if seq2seq else [(side, ids), (side, ones)]
    padded, mask = (torch.cat(pair, dim=1) for pair in parts)
    for placement in ("answer", "prompt"):
        model.config.placement = placement
        alone = model(ids, **asked, **inner).logits
        if placement == "answer" and not model._reading.by_ids:
            near(alone[:, -1], behind(model, ids, asked, inner), "a soft prompt behind the prompt is read otherwise")
        generated = model.generate(ids, **asked, **options)
        if not seq2seq:
            said = torch.equal(generated[:, ids.shape[1]], alone[:, -1].argmax(dim=-1))
            assert said or not model._reading.pure, f"generate does not say what forward does (placement {placement})"
        try:
            logits = model(padded, attention_mask=mask, **asked, **inner).logits
        except PPlugError:
            return "works: rows of equal length only"
        near(logits if seq2seq else logits[:, 2:], alone, f"padding changes an answer (placement {placement})")
    if model._reading.by_ids and model._reading.pure:
        return "works: by ids"
    return "works" if model._reading.pure else "works: by ids, some of which a soft token keeps"


def behind(model, ids, asked, inner):
    """Logits [B, V] of the token behind the prompt and its soft prompt, from the bare backbone."""
    backbone, soft = model.backbone, model.soft_prompt(asked["persona"], asked["query"])
    if inner:
        state_norm(backbone)  # refuses an encoder of another width
        encoded = backbone.get_encoder()(input_ids=ids, return_dict=True)
        encoded["last_hidden_state"] = torch.cat([encoded.last_hidden_state, soft], dim=1)
        return backbone(encoder_outputs=encoded, **inner).logits[:, -1]
    words = word_embeddings(backbone)(ids)
    both = torch.cat([words, soft.to(words)], dim=1)  # [B, T + P, H]
    position = torch.arange(both.shape[1]).expand(both.shape[:2])
    return backbone(inputs_embeds=both, position_ids=position).logits[:, -1]


def near(got, expected, what):
    """Raise unless one row at least is equal: routers of experts may flip by rounding."""
    error = (got - expected).flatten(-2).abs().amax(-1).min() if got.ndim > 1 else (got - expected).abs()
    assert error <= 2e-3 * expected.abs().max().clamp(min=1), f"{what} ({error:.4f})"


# What is expected of families that do not simply work, by model type and kind: the beginning of the verdict.
LENGTH, REFUSED, UNKNOWN = "works: rows of equal length only", "refused", "not judged"
EXPECTED = {
    **{
        (name, "causal"): LENGTH
        for name in [
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "marian",
            "mbart",
            "mvp",
            "pegasus",
            "plbart",
            "prophetnet",
            "recurrent_gemma",
            "rwkv",
            "trocr",
        ]
    },
    **{
        (name, "causal"): REFUSED
        for name in [
            "bamba",
            "cpmant",
            "ctrl",
            "falcon_h1",
            "gemma3",
            "gemma4",
            "gemma4_unified",
            "nemotron_h",
            "openai-gpt",
            "roc_bert",
            "xlm",
            "xlnet",
        ]
    },
    **{
        (name, "causal"): UNKNOWN
        for name in [
            "blt",
            "cohere_compass_text",
            "dbrx",
            "dory",
            "dots3_note",
            "gemma3n",
            "gemma4_assistant",
            "gemma4_unified_assistant",
            "hrm_text",
            "mimo_v2_flash",
            "musicgen",
            "musicgen_melody",
            "qwen4_exp",
            "qwen4_exp_text",
            "reformer",
            "xlstm",
            "zamba",
            "zamba2",
        ]
    },
    **{
        (name, "encoder-decoder"): UNKNOWN
        for name in [
            "granite_speech",
            "granite_speech_plus",
            "nemo_speechlm",
            "omniasr",
            "qwen3_asr",
            "vibevoice_asr",
            "voxtral_realtime",
        ]
    },
    **{("deepseek_v4", "causal"): "works: by ids", ("gemma3n_text", "causal"): "works: by ids, some"},
    **{("gemma4_text", "causal"): "works: by ids, some"},
    **{(name, "encoder-decoder"): "works: by ids" for name in ("fsmt", "marian", "pegasus")},
}
