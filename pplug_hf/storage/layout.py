"""What a plug folder is made of, by name. What else lies beside it (checkpoints, logs, predictions) is not the plug."""

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"

# The vocabularies of transformers' tokenizers.
VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "spm.model", "sentencepiece.model"),
    *("sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json"),
)
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    *(TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *VOCABULARIES,
)
GENERATION_CONFIG = "generation_config.json"
PROCESSOR_CONFIG = "processor_config.json"
# The weights last: where they are, a download was not cut off.
PLUG_FILES = (CONFIG, GENERATION_CONFIG, PROCESSOR_CONFIG, *TOKENIZER_FILES, WEIGHTS)
# What is read whole of a backbone or an encoder.
PART_FILES = (
    *(CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
)
# How it was trained: {"task": ..., "settings": {name: value}, "defaults": {name: value}}. The card says which differ.
TRAIN_SETTINGS = "train_settings.json"
