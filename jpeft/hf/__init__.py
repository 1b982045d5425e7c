"""Pretrained models of Hugging Face's and llama.cpp's kinds of file.

Needs `pip install 'jpeft[hf]'` for GGUF files, nothing more for safetensors.
"""

from jpeft.hf._gguf import gguf_metadata as gguf_metadata
