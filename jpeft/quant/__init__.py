"""Quantised arrays: make them, read them, exchange them with other libraries."""

from jpeft.quant import rules as rules
from jpeft.quant.arrays import codebook as codebook
from jpeft.quant.arrays import dequantize as dequantize
from jpeft.quant.arrays import quantize as quantize
from jpeft.quant.exchange import from_bitsandbytes as from_bitsandbytes
from jpeft.quant.exchange import from_gguf as from_gguf
from jpeft.quant.exchange import to_bitsandbytes as to_bitsandbytes
from jpeft.quant.leaf import Quantized as Quantized
from jpeft.quant.rounding import rounding as rounding
