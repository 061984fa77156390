"""One rank of a module of the package, as `python -m` runs it: ``xdit_module_worker.py MODULE [flags]``."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
