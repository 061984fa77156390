"""The xDiT door: `hybrid-cond` on xDiT's groups, runtime state, runner and example scripts.

The only folder that imports xfuser. Reading order: `options` (the flags), `compat` (what we touch of xDiT),
`pipelines`, `models` and `runner` (xDiT's runner with ours in it), `processes` (torchrun), `output` (what is shown),
`cli` (``xdit-hybrid``), `compare` (``xdit-hybrid compare``), `script` (``python -m hybridiff_xdit.launch``).
"""
