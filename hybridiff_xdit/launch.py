"""``torchrun --nproc_per_node=2 -m hybridiff_xdit.launch SCRIPT [flags]``: an xDiT example script with hybrid-cond."""

from .xdit.script import main

if __name__ == "__main__":
    main()
