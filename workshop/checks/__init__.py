"""The checks of the exercises: each runs a learner's code under load, and knows the wrong answers that people give.

A package for each exercise, with the name of its notebook, and in it a module for each task; tasks are called like
functions. `rules` has what can be wrong whatever the task is.
"""

import sys

# A check may be the first cell to run after a restart of the kernel; what is missing then is said in one line.
if "IPython" in sys.modules:
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    if shell is not None and shell.extension_manager is not None:
        shell.extension_manager.load_extension("workshop")
