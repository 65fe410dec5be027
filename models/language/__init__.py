"""Language models that run in process: a transformer of the Llama type, its files, its tokenizer."""

from bayesinf.models.language.cache import KeysValues as KeysValues
from bayesinf.models.language.cache import LanguageCache as LanguageCache
from bayesinf.models.language.cache import copy_rows as copy_rows
from bayesinf.models.language.loading import load_gguf as load_gguf
from bayesinf.models.language.loading import load_safetensors as load_safetensors
from bayesinf.models.language.loading import load_smollm2 as load_smollm2
from bayesinf.models.language.tokenizer import CharTokenizer as CharTokenizer
from bayesinf.models.language.tokenizer import Tokenizer as Tokenizer
from bayesinf.models.language.tokenizer import smollm2_prompt as smollm2_prompt
from bayesinf.models.language.transformer import Block as Block
from bayesinf.models.language.transformer import Rotary as Rotary
from bayesinf.models.language.transformer import Transformer as Transformer
