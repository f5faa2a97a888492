"""The definition of the method: pure torch, no dispatch, no I/O. Start with fake_quant.py."""

from bitquest.numerics.estimators import ALL_ESTIMATORS, Clip, Estimator, Inside, StraightThrough, Trust
from bitquest.numerics.fake_quant import Encoded, dequantize, encode, fake_quantize, quantize
from bitquest.numerics.grids import ALL_GRIDS, FP4, INT8_SYMMETRIC, TERNARY, CodebookGrid, Grid, UniformGrid, integer_grid
from bitquest.numerics.integers import IntegerForm, integer_form, integer_linear, weight_only_linear
from bitquest.numerics.multipliers import gaussian_mse, gaussian_step
from bitquest.numerics.packing import pack, packed_width, unpack
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.rotations import ALL_ROTATIONS, BlockHadamard, NoRotation, Rotation, rotation_from_json
from bitquest.numerics.scaling import (
    ALL_GRANULARITIES,
    ALL_SCALE_RULES,
    AbsMax,
    AbsMean,
    GaussianMSE,
    Granularity,
    Learned,
    PerGroup,
    PerRow,
    PerTensor,
    ScaleRule,
)
from bitquest.numerics.sparsity import ALL_SPARSITIES, Dense, NofM, Sparsity

__all__ = [
    "ALL_ESTIMATORS",
    "ALL_GRANULARITIES",
    "ALL_GRIDS",
    "ALL_ROTATIONS",
    "ALL_SCALE_RULES",
    "ALL_SPARSITIES",
    "FP4",
    "INT8_SYMMETRIC",
    "TERNARY",
    "AbsMax",
    "AbsMean",
    "BlockHadamard",
    "Clip",
    "CodebookGrid",
    "Dense",
    "Encoded",
    "Estimator",
    "GaussianMSE",
    "Granularity",
    "Grid",
    "Inside",
    "IntegerForm",
    "Learned",
    "NoRotation",
    "NofM",
    "PerGroup",
    "PerRow",
    "PerTensor",
    "Quantizer",
    "Rotation",
    "ScaleRule",
    "Sparsity",
    "StraightThrough",
    "Trust",
    "UniformGrid",
    "dequantize",
    "encode",
    "fake_quantize",
    "gaussian_mse",
    "gaussian_step",
    "integer_form",
    "integer_grid",
    "integer_linear",
    "pack",
    "packed_width",
    "quantize",
    "rotation_from_json",
    "unpack",
    "weight_only_linear",
]
