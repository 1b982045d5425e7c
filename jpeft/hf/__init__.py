"""Pretrained models: Hugging Face's folders of safetensors, and llama.cpp's GGUF.

Safetensors need nothing more; `pip install 'jpeft[hf]'` brings gguf, which decodes the
blocks of GGUF files.
"""

from jpeft.hf._gguf import gguf_metadata as gguf_metadata
from jpeft.hf._gguf import gguf_tensors as gguf_tensors
from jpeft.hf.base import Report as Report
from jpeft.hf.base import load_base as load_base
from jpeft.hf.names import MAPS as MAPS
from jpeft.hf.names import Rule as Rule
