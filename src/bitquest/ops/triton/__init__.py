"""GPU kernels in Triton. Only the modules in here import triton; `import bitquest` imports none of them.

quantize.py            rotate, scale, round, mask and pack rows in one pass; or rotate them alone
dequantize.py          packed codes or integer factors back to values, for the products of the backward pass
quantize_backward.py   (G ⊙ M)Hᵀ in one pass, through RMSNorm or SwiGLU if they were fused in front

Every launcher is a plain function on tensors that raises ConfigError for what it cannot do; the operators of ops/ fall
back to numerics there.
"""
