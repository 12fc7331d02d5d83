#!/usr/bin/env bash
# transformers 5.24.0, tokenizers 0.23.3: a config.json beside a tokenizer changes the ids that it gives.
#
# AutoTokenizer keeps a list of model types whose published tokenizer_class it takes for wrong, `qwen2` among them.
# In a folder of such a type it builds the class registered for the type instead, and Qwen2Tokenizer takes the
# vocabulary and the merges from tokenizer.json but sets its own normalizer, pre-tokenizer and decoder. So a
# tokenizer that splits text in another way, saved with save_pretrained and loaded with from_pretrained by one
# version of the library, comes back as another, without a warning. The folder alone, or with a config.json of
# qwen3, which has the same tokenizer class registered, gives what was saved; PreTrainedTokenizerFast always does.
# Same cause, other model types: https://github.com/huggingface/transformers/issues/45920 (closed)
#
# Seen with transformers 5.24.0, for 'a\n\n1234':
#     saved ['a', 'ĊĊ', '123', '4']
#     no config.json: TokenizersBackend ['a', 'ĊĊ', '123', '4']
#     qwen3: TokenizersBackend ['a', 'ĊĊ', '123', '4']
#     qwen2: Qwen2Tokenizer ['a', 'ĊĊ', '1', '2', '3', '4']
#     qwen2, PreTrainedTokenizerFast: ['a', 'ĊĊ', '123', '4']
#
# Exits 0 while only AutoTokenizer in the folder of qwen2 differs, 1 once that is not so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 tokenizers==0.23.3 numpy==2.4.6
cat > "$folder/run.py" <<'PY'
import pathlib
import sys

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

root, text = pathlib.Path(sys.argv[1]), "a\n\n1234"
tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "12", "123", "<e>"]
vocabulary = {token: index for index, token in enumerate(tokens)}
backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ"), ("1", "2"), ("12", "3")]))
backend.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\p{L}+|\s+"), behavior="isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
])
backend.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
saved = tokenizer.tokenize(text)
print(f"saved {saved}")
loaded = {}
for name, config in (("no config.json", None), ("qwen3", Qwen3Config()), ("qwen2", Qwen2Config())):
    tokenizer.save_pretrained(root / name)
    if config is not None:
        config.save_pretrained(root / name)
    again = AutoTokenizer.from_pretrained(root / name)
    loaded[name] = again.tokenize(text)
    print(f"{name}: {type(again).__name__} {loaded[name]}")
direct = PreTrainedTokenizerFast.from_pretrained(root / "qwen2").tokenize(text)
print(f"qwen2, PreTrainedTokenizerFast: {direct}")
kept = saved == direct == loaded["no config.json"] == loaded["qwen3"]
sys.exit(0 if kept and loaded["qwen2"] != saved else 1)
PY
"$folder/venv/bin/python" "$folder/run.py" "$folder" 2> "$folder/log" || { code=$?; tail -3 "$folder/log"; exit $code; }
