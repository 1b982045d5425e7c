"""Kernels: quantise, dequantise and multiply by 4-bit matrices on TPU, GPU and CPU."""

from jpeft.kernels.four_bit import dequantize as dequantize
from jpeft.kernels.four_bit import matmul as matmul
from jpeft.kernels.four_bit import matmul_transposed as matmul_transposed
from jpeft.kernels.four_bit import quantize as quantize
