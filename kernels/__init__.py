"""Operations of the DiT block that are worth fusing: one file each, the plain definition first.

The model calls `rms_modulate`, `qk_norm_rope`, `attention` and `swiglu`, and nothing else of this folder.
"""
