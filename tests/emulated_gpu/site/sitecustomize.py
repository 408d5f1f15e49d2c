"""For processes that a test starts: the emulated device of the process that started them."""

import os
import sys

if "EMULATED_GPU" in os.environ:
    tests = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    sys.path.append(tests)
    try:
        from emulated_gpu import Options, install

        install(Options.parse(os.environ["EMULATED_GPU"]))
    finally:
        sys.path.remove(tests)
