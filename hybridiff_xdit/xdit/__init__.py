"""The xDiT door: `hybrid-cond` on xDiT's groups, runtime state and runner.

The only folder that imports xfuser. Reading order: `options` (the flags), `compat` (what we touch of xDiT), `sequence`,
`groups` and `batch` (the strategy on xDiT's groups), `models` and `runner` (xDiT's runner with the strategy in it),
`plugin` (the strategy for an xDiT that loads plugins), `processes` (torchrun), `output` (what is shown), `cli`
(``xdit-hybrid``); others are `catalogue` (``models``), `compare`, `serve` and `serving`.
"""
