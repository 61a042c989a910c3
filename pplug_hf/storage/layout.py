"""Names of the files in a plug folder. Other files beside them (checkpoints, logs, predictions) are not the plug."""

import os

from huggingface_hub.constants import HF_HOME

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
ARTEFACT = "method.json"  # of what `pplug-hf fit` has trained, which is not a plug
HIDDEN = ".pplug-"  # prefix of the files that exist while a plug is saved
SAVED = f"{HIDDEN}saved"  # folder of a new plug whose files are moved into place
PROMPTS = f"{HIDDEN}prompts"  # folder of a training's prompt cache

# The vocabularies of transformers' tokenizers: the values of their `vocab_files_names`.
VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "spm.model", "spm_char.model", "sentencepiece.model"),
    *("sentencepiece.bpe.model", "source.spm", "target.spm", "prophetnet.tokenizer", "tekken.json"),
    *("vocab.json", "vocab.txt", "vocab-src.json", "vocab-tgt.json", "target_vocab.json", "entity_vocab.json"),
    *("merges.txt", "bpe.codes", "dict.txt", "byte_maps.json", "normalizer.json", "emoji.json"),
    *("word_shape.json", "word_pronunciation.json"),
)
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
CHAT_TEMPLATES = "additional_chat_templates"  # folder of the others, where transformers has saved several
TOKENIZER_FILES = (
    *(TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE),
    *VOCABULARIES,
)
GENERATION_CONFIG = "generation_config.json"
PROCESSOR_CONFIG = "processor_config.json"
# The weights come last: if they are there, the download is complete.
PLUG_FILES = (CONFIG, GENERATION_CONFIG, PROCESSOR_CONFIG, *TOKENIZER_FILES, WEIGHTS)
# Files of a backbone or an encoder that are read into memory as a whole.
FROZEN_FILES = (
    *(CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
)
# How it was trained: {"task": ..., "settings": {name: value}, "defaults": {name: value}, "data": {"name": ..., "examples":
# ..., "users": ..., "digest": ...}}. The card names the data, and the settings that differ from the defaults.
TRAIN_SETTINGS = "train_settings.json"
# What a checkpoint was made of; `pplug-hf train` resumes from one of the same run only.
TRAIN_RUN = "train_run.json"

DEFAULT_FOLDER = os.path.join(HF_HOME, "pplug_hf", "vectors")  # of the vector store
REWARDS_FOLDER = os.path.join(HF_HOME, "pplug_hf", "rewards")  # of the tables of rewards
TASK_LORAS_FOLDER = os.path.join(HF_HOME, "pplug_hf", "task-loras")  # on which weights of users stand
ANSWERS_FOLDER = os.path.join(HF_HOME, "pplug_hf", "answers")  # of a selector's pool to questions of the train split
